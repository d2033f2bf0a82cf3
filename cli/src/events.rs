//! What happens in a migration, as it happens: lines of JSON for programs that watch it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use clap::Args;
use crossbeam_channel::{Receiver, Sender, bounded};
use pageferry::convergence::Verdict;
use pageferry::{Event, Snapshot};
use pageferry_report::document::ms;
use pageferry_report::facts::Facts;
use pageferry_report::heartbeat::realtime_ns;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use serde::Serialize;

use crate::outcome::{Failure, Outcome};
use crate::report::{GuestAt, Report};

/// Lines that wait for whoever reads them; what comes on top is counted, and nothing waits for it.
const MOST_WAITING: usize = 4096;
/// How long the end of a migration, and that of a program, wait for whoever reads.
const PATIENCE: Duration = Duration::from_secs(2);
/// A downtime that would be longer is told of nobody as one to expect.
pub(crate) const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Where to.
#[derive(Debug, Clone, Default, Args)]
pub struct EventArgs {
    /// Write what happens to this file as it happens, as lines of JSON: /dev/fd/3, say, or a FIFO that
    /// somebody reads. A file that is there is added to.
    #[arg(long, value_name = "FILE")]
    pub events: Option<PathBuf>,
}

impl EventArgs {
    /// Opens the file, if one is wanted.
    pub fn open(&self) -> Result<Events, Failure> {
        let Some(path) = &self.events else { return Ok(Events::default()) };
        let file = open(path).map_err(|error| {
            let nobody = error.raw_os_error() == Some(Errno::NXIO.raw_os_error());
            let hint = if nobody {
                ": a FIFO needs its reader before, and a socket will not do"
            } else {
                ""
            };
            format!("--events {}: {error}{hint}", path.display())
        })?;
        let events = Events { log: Some(Arc::new(Log::start(file)?)) };
        // Keys are in files, of which these have the names.
        let command = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
        let facts = Box::new(Facts::here(Vec::new()));
        events.tell(Happening::Began { command: command.collect(), facts });
        Ok(events)
    }
}

/// Does not wait for a FIFO's reader, which no signal could end. Whoever writes to it waits.
fn open(path: &Path) -> io::Result<File> {
    let at_once = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().append(true).create(true).custom_flags(at_once).open(path)?;
    fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok(file)
}

/// Takes what happens, if anybody wants to know, from any thread. Cheap to clone. The last of it writes what is
/// left, for 2 seconds at most.
#[derive(Debug, Clone, Default)]
pub struct Events {
    log: Option<Arc<Log>>,
}

impl Events {
    /// Waits for nothing.
    pub fn tell(&self, happening: Happening) {
        if let Some(log) = &self.log {
            log.add(happening, Duration::ZERO);
        }
    }

    /// How a migration ended. Where nobody reads it waits for room, for 2 seconds at most.
    pub fn ended(&self, report: &Report) {
        self.end(Happening::Ended {
            outcome: report.outcome,
            guest_at: report.guest_at,
            error: report.error.clone(),
            report: serde_json::to_value(report).ok(),
        });
    }

    /// The same, where none has begun.
    pub fn ended_before(&self, why: &str) {
        let (outcome, guest_at) = (Outcome::Cancelled, GuestAt::Source);
        let (error, report) = (Some(why.to_owned()), None);
        self.end(Happening::Ended { outcome, guest_at, error, report });
    }

    fn end(&self, ended: Happening) {
        if let Some(log) = &self.log {
            log.add(ended, PATIENCE);
        }
    }
}

#[derive(Debug)]
struct Log {
    /// None once it is to end.
    lines: Option<Sender<Line>>,
    left_out: AtomicU64,
    written: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Log {
    fn start(file: File) -> io::Result<Self> {
        let (lines, wanted) = bounded(MOST_WAITING);
        // Is closed at the end.
        let (done, written) = bounded(0);
        let body = move || {
            let _done = done;
            write(file, &wanted);
        };
        let thread = thread::Builder::new().name("events".into()).spawn(body)?;
        let (lines, thread) = (Some(lines), Some(thread));
        Ok(Self { lines, left_out: AtomicU64::new(0), written, thread })
    }

    fn add(&self, happening: Happening, patience: Duration) {
        let Some(lines) = &self.lines else { return };
        let left_out = self.left_out.swap(0, Ordering::Relaxed);
        if lines.send_timeout(Line::new(left_out, happening), patience).is_err() {
            self.left_out.fetch_add(left_out + 1, Ordering::Relaxed);
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.lines = None;
        // Who does not read does not keep the program.
        let _ = self.written.recv_timeout(PATIENCE);
        if let Some(thread) = self.thread.take().filter(JoinHandle::is_finished) {
            let _ = thread.join();
        }
    }
}

/// Each line at once, in one write.
fn write(mut file: File, lines: &Receiver<Line>) {
    for line in lines {
        let written = serde_json::to_vec(&line).map_err(Into::into).and_then(|mut line| {
            line.push(b'\n');
            file.write_all(&line)
        });
        if let Err(error) = written {
            say!("no more events are written: {error}");
            return;
        }
    }
}

/// A line.
#[derive(Debug, Serialize)]
struct Line {
    /// By `CLOCK_REALTIME`, since 1970. Lines of two threads may be in another order than their times.
    realtime_ms: f64,
    /// Events before this one that nobody read in time.
    #[serde(skip_serializing_if = "is_zero")]
    left_out: u64,
    #[serde(flatten)]
    happening: Happening,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde has it")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Line {
    fn new(left_out: u64, happening: Happening) -> Self {
        // Microseconds are what a double has of them.
        let realtime_ms = (realtime_ns() / 1000) as f64 / 1e3;
        Self { realtime_ms, left_out, happening }
    }
}

/// What happens. docs/report.md says what each is; names and fields are a contract.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[expect(missing_docs, reason = "docs/report.md has them, and a test looks for each")]
pub enum Happening {
    Began {
        command: Vec<String>,
        facts: Box<Facts>,
    },
    Listening {
        address: String,
    },
    Connected {
        peer: String,
    },
    Agreed {
        version: u16,
        channels: u16,
        verify: bool,
        page_sums: bool,
    },
    Registering {
        memory_bytes: u64,
    },
    Registered {
        registered_bytes: u64,
        took_ms: f64,
    },
    RoundStarted {
        round: u32,
        dirty_pages: u64,
    },
    Progress {
        phase: String,
        round: u32,
        round_pages: u64,
        left_pages: u64,
        pages: u64,
        landed_bytes: u64,
        wire_bytes: u64,
        throttle_percent: u8,
        expected_ms: Option<f64>,
        landed_by_channel: Vec<u64>,
    },
    RoundFinished {
        round: u32,
        dirty_pages: u64,
        landed_bytes: u64,
        took_ms: f64,
        verdict: &'static str,
        expected_ms: Option<f64>,
    },
    ChannelLost {
        channel: u16,
    },
    ChannelsReopened {
        channels: u32,
        epoch: u32,
        after_ms: f64,
    },
    Rebalanced {
        weights: Vec<u32>,
    },
    Forecast {
        meets_limit: bool,
        least_ms: Option<f64>,
        limit_ms: f64,
        bytes_per_second: f64,
        dirty_pages_per_second: f64,
    },
    Throttled {
        percent: u8,
    },
    CannotThrottle,
    GuestPaused,
    LinkLost {
        why: String,
        at_most_ms: f64,
    },
    Rejoined {
        epoch: u32,
        after_ms: f64,
    },
    CalledOff {
        attempt: u32,
        stage: Option<String>,
        stood_ms: Option<f64>,
    },
    Loaded,
    Committed,
    GuestRunsThere,
    GuestPausedThere,
    GuestKept,
    Ended {
        outcome: Outcome,
        guest_at: GuestAt,
        error: Option<String>,
        report: Option<serde_json::Value>,
    },
}

impl Happening {
    /// How far it is.
    pub fn progress(snapshot: &Snapshot) -> Self {
        Self::Progress {
            phase: snapshot.phase.to_string(),
            round: snapshot.round,
            round_pages: snapshot.round_pages,
            left_pages: snapshot.left_pages,
            pages: snapshot.pages.total(),
            landed_bytes: snapshot.landed_bytes,
            wire_bytes: snapshot.wire_bytes,
            throttle_percent: snapshot.throttle_percent,
            expected_ms: snapshot.expected_downtime.and_then(estimate_ms),
            landed_by_channel: snapshot
                .channels
                .iter()
                .map(|channel| channel.landed_bytes)
                .collect(),
        }
    }

    /// What the engine says. Of events that are newer than this there is nothing to say.
    pub fn of(event: &Event) -> Option<Self> {
        Some(match event {
            &Event::Agreed(agreement) => Self::Agreed {
                version: agreement.version,
                channels: agreement.channels,
                verify: agreement.verify,
                page_sums: agreement.page_sums,
            },
            &Event::Registering { bytes } => Self::Registering { memory_bytes: bytes },
            Event::Registered(registration) => Self::Registered {
                registered_bytes: registration.registered_bytes,
                took_ms: ms(registration.took),
            },
            &Event::RoundStarted { round, dirty_pages } => {
                Self::RoundStarted { round, dirty_pages }
            }
            &Event::RoundFinished { round, ref statistics, verdict } => Self::RoundFinished {
                round,
                dirty_pages: statistics.dirty_pages,
                landed_bytes: statistics.landed_bytes,
                took_ms: ms(statistics.took),
                verdict: name(verdict),
                expected_ms: verdict.expected().and_then(estimate_ms),
            },
            &Event::ChannelLost { channel } => Self::ChannelLost { channel },
            &Event::ChannelsReopened { channels, epoch, after } => {
                Self::ChannelsReopened { channels, epoch, after_ms: ms(after) }
            }
            Event::Rebalanced { weights } => Self::Rebalanced { weights: weights.clone() },
            Event::Forecast(forecast) => Self::Forecast {
                meets_limit: forecast.meets_limit,
                least_ms: estimate_ms(forecast.least),
                limit_ms: ms(forecast.limit),
                bytes_per_second: forecast.bytes_per_second,
                dirty_pages_per_second: forecast.dirty_pages_per_second,
            },
            &Event::Throttled { percent } => Self::Throttled { percent },
            Event::CannotThrottle => Self::CannotThrottle,
            Event::GuestPaused => Self::GuestPaused,
            &Event::CalledOff { attempt, stage, stood } => Self::CalledOff {
                attempt,
                stage: stage.map(|stage| stage.to_string()),
                stood_ms: stage.map(|_| ms(stood)),
            },
            Event::LinkLost { why, at_most } => {
                Self::LinkLost { why: why.clone(), at_most_ms: ms(*at_most) }
            }
            &Event::Rejoined { epoch, after } => Self::Rejoined { epoch, after_ms: ms(after) },
            Event::Loaded => Self::Loaded,
            Event::Committed => Self::Committed,
            Event::GuestRunsThere => Self::GuestRunsThere,
            Event::GuestPausedThere => Self::GuestPausedThere,
            Event::GuestKept => Self::GuestKept,
            _ => return None,
        })
    }
}

fn name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Iterate { .. } => "iterate",
        Verdict::Approach { .. } => "approach",
        Verdict::SwitchOver { .. } => "switch_over",
        Verdict::PostCopy { .. } => "post_copy",
        Verdict::GiveUp { .. } => "give_up",
        _ => "unknown",
    }
}

fn estimate_ms(expected: Duration) -> Option<f64> {
    (expected < DAY).then(|| ms(expected))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::fd::OwnedFd;

    use pageferry::Phase;
    use serde_json::Value;

    use super::*;

    /// Each happening once. One that is new does not compile before it is here.
    fn all() -> Vec<Happening> {
        use Happening::*;
        let text = String::new;
        let first = Began { command: Vec::new(), facts: Box::default() };
        let next = |happening: &Happening| {
            Some(match happening {
                Began { .. } => Listening { address: text() },
                Listening { .. } => Connected { peer: text() },
                Connected { .. } => {
                    Agreed { version: 1, channels: 2, verify: true, page_sums: true }
                }
                Agreed { .. } => Registering { memory_bytes: 1 },
                Registering { .. } => Registered { registered_bytes: 4096, took_ms: 1.0 },
                Registered { .. } => RoundStarted { round: 1, dirty_pages: 1 },
                RoundStarted { .. } => Progress {
                    phase: Phase::PreCopy.to_string(),
                    round: 1,
                    round_pages: 1,
                    left_pages: 1,
                    pages: 1,
                    landed_bytes: 1,
                    wire_bytes: 1,
                    throttle_percent: 10,
                    expected_ms: None,
                    landed_by_channel: vec![1],
                },
                Progress { .. } => RoundFinished {
                    round: 1,
                    dirty_pages: 1,
                    landed_bytes: 1,
                    took_ms: 1.0,
                    verdict: "iterate",
                    expected_ms: None,
                },
                RoundFinished { .. } => Forecast {
                    meets_limit: true,
                    least_ms: Some(1.0),
                    limit_ms: 1.0,
                    bytes_per_second: 1.0,
                    dirty_pages_per_second: 1.0,
                },
                Forecast { .. } => ChannelLost { channel: 1 },
                ChannelLost { .. } => ChannelsReopened { channels: 1, epoch: 1, after_ms: 1.0 },
                ChannelsReopened { .. } => Rebalanced { weights: vec![1, 2] },
                Rebalanced { .. } => Throttled { percent: 10 },
                Throttled { .. } => CannotThrottle,
                CannotThrottle => GuestPaused,
                GuestPaused => CalledOff { attempt: 1, stage: None, stood_ms: None },
                CalledOff { .. } => LinkLost { why: text(), at_most_ms: 1.0 },
                LinkLost { .. } => Rejoined { epoch: 1, after_ms: 1.0 },
                Rejoined { .. } => Loaded,
                Loaded => Committed,
                Committed => GuestRunsThere,
                GuestRunsThere => GuestPausedThere,
                GuestPausedThere => GuestKept,
                GuestKept => {
                    let (outcome, guest_at) = (Outcome::Completed, GuestAt::Destination);
                    Ended { outcome, guest_at, error: None, report: None }
                }
                Ended { .. } => return None,
            })
        };
        std::iter::successors(Some(first), next).collect()
    }

    #[test]
    fn every_event_and_field_is_in_the_documentation() {
        let documentation = include_str!("../../docs/report.md");
        let (_, documentation) = documentation.split_once("\n## Events\n").expect("a section");
        let named = |name: &str| documentation.contains(&format!("`{name}`"));
        for happening in all() {
            let line = serde_json::to_value(Line::new(1, happening)).expect("JSON");
            for (field, value) in line.as_object().expect("an object") {
                assert!(named(field), "{field} of {line}");
                let name =
                    value.as_str().filter(|_| ["event", "verdict", "phase"].contains(&&**field));
                assert!(name.is_none_or(named), "{line}");
            }
        }
    }

    /// Who reads too slowly is told how much it missed, and nobody waits for it.
    #[test]
    fn what_nobody_reads_in_time_is_counted() {
        let (reader, writer) = io::pipe().expect("a pipe");
        let log = Log::start(File::from(OwnedFd::from(writer))).expect("a log");
        let mut told = 0;
        let mut tell = || {
            told += 1;
            log.add(Happening::GuestKept, Duration::ZERO);
            log.left_out.load(Ordering::Relaxed)
        };
        // More than the pipe and the queue have room for.
        while tell() < 100 {}
        let reading = thread::spawn(move || {
            let lines = BufReader::new(reader).lines();
            let lines = lines
                .map(|line| serde_json::from_str::<Value>(&line.expect("a line")).expect("JSON"));
            lines
                .map(|line| {
                    1 + line.get("left_out").map_or(0, |count| count.as_u64().expect("a count"))
                })
                .sum()
        });
        while tell() > 0 {
            thread::yield_now();
        }
        drop(log);
        let read: u64 = reading.join().expect("a reader");
        assert_eq!(read, told);
    }
}
