//! Shows a migration while it runs: a progress bar on a terminal, a line an event elsewhere.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};
use pageferry::convergence::{Forecast, Verdict};
use pageferry::memory::PAGE_BYTES;
use pageferry::{Event, MigrationHandle, Phase, Snapshot, SwitchoverStage};

use crate::events::{DAY, Events, Happening};
use crate::metrics::Side;
use crate::observers::Observers;
use crate::units::time_text;

const TICK: Duration = Duration::from_millis(50);
/// How long a round goes on until it is said how fast, and again. So nothing is slow without a word.
const PACE: Duration = Duration::from_secs(5);

/// How often programs are told how far it is.
const BEAT: Duration = Duration::from_secs(1);

/// Watches until dropped.
#[derive(Debug)]
pub struct Watch {
    bar: ProgressBar,
    events: Events,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Begins.
    pub fn start(
        handle: MigrationHandle,
        observers: &Observers,
        side: Side,
    ) -> std::io::Result<Self> {
        observers.metrics.watch(side, handle.clone());
        let events = &observers.events;
        let bar = if std::io::stderr().is_terminal() {
            ProgressBar::new(1)
        } else {
            ProgressBar::hidden()
        };
        let template = "{prefix:>12} [{bar:30}] {percent:>3} % of {human_len} pages  {msg}";
        bar.set_style(
            ProgressStyle::with_template(template)
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("=> "),
        );
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (bar, events, stop) = (bar.clone(), events.clone(), Arc::clone(&stop));
            let body = move || draw(&bar, &events, &handle, &stop);
            thread::Builder::new().name("watch".into()).spawn(body)?
        };
        Ok(Self { bar, events: events.clone(), stop, thread: Some(thread) })
    }

    /// A sink for the engine's events.
    pub fn sink(&self) -> impl FnMut(&Event) + Send + 'static + use<> {
        let (bar, events) = (self.bar.clone(), self.events.clone());
        move |event| {
            if let Some(happening) = Happening::of(event) {
                events.tell(happening);
            }
            if let Some(line) = line(event) {
                tell(&bar, &line);
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
        self.bar.finish_and_clear();
    }
}

fn tell(bar: &ProgressBar, line: &str) {
    if bar.is_hidden() { say!("{line}") } else { bar.println(line) }
}

/// How fast a round goes that goes on.
struct Pace {
    since: Instant,
    round: u32,
    landed_bytes: u64,
}

impl Pace {
    fn new(snapshot: &Snapshot) -> Self {
        let &Snapshot { round, landed_bytes, .. } = snapshot;
        Self { since: Instant::now(), round, landed_bytes }
    }

    /// What there is to say of it now.
    fn line(&mut self, snapshot: &Snapshot) -> Option<String> {
        if snapshot.phase != Phase::PreCopy || snapshot.round != self.round {
            *self = Self::new(snapshot);
        }
        let (took, before) = (self.since.elapsed(), self.landed_bytes);
        if took < PACE {
            return None;
        }
        *self = Self::new(snapshot);
        let landed_bytes = self.landed_bytes.saturating_sub(before);
        Some(format!(
            "round {} goes on: {} landed in the last {} s, {:.3} Gb/s",
            self.round,
            HumanBytes(landed_bytes),
            took.as_secs(),
            landed_bytes as f64 * 8.0 / took.as_secs_f64() / 1e9,
        ))
    }
}

fn draw(bar: &ProgressBar, events: &Events, handle: &MigrationHandle, stop: &AtomicBool) {
    let mut told = Instant::now();
    let mut pace = Pace::new(&handle.snapshot());
    while !stop.load(Ordering::Relaxed) {
        let snapshot = handle.snapshot();
        if let Some(line) = pace.line(&snapshot) {
            tell(bar, &line);
        }
        if told.elapsed() >= BEAT {
            told = Instant::now();
            events.tell(Happening::progress(&snapshot));
        }
        bar.set_prefix(match snapshot.phase {
            Phase::Setup => "connecting".to_owned(),
            Phase::PreCopy => format!("round {}", snapshot.round),
            Phase::Switchover => "switchover".to_owned(),
            Phase::LinkLost => "link lost".to_owned(),
            Phase::Committed => "commit".to_owned(),
            _ => "done".to_owned(),
        });
        bar.set_length(snapshot.round_pages.max(1));
        bar.set_position(snapshot.round_pages.saturating_sub(snapshot.left_pages));
        bar.set_message(format!("{} landed", HumanBytes(snapshot.landed_bytes)));
        thread::park_timeout(TICK);
    }
}

/// A time to expect. The engine tells no times beyond a day apart.
fn ms(expected: &Duration) -> String {
    if *expected < DAY {
        format!("{} ms", expected.as_millis())
    } else {
        "more than a day".to_owned()
    }
}

/// What a person wants to hear of an event.
fn line(event: &Event) -> Option<String> {
    Some(match event {
        Event::RoundFinished { round, statistics, verdict } => {
            let next = match verdict {
                Verdict::Iterate { expected: Some(expected) } => {
                    format!("would take {} to switch over: not yet", ms(expected))
                }
                Verdict::SwitchOver { expected } => {
                    format!("switching over in about {}", ms(expected))
                }
                Verdict::GiveUp { expected } => {
                    format!("would still take {}, giving up", ms(expected))
                }
                Verdict::PostCopy { expected } => {
                    format!("would still take {}, post-copy is due", ms(expected))
                }
                _ => "again".to_owned(),
            };
            format!(
                "round {round}: {} pages looked at, {} landed in {} ms; {next}",
                HumanCount(statistics.dirty_pages),
                HumanBytes(statistics.landed_bytes),
                statistics.took.as_millis(),
            )
        }
        Event::Forecast(Forecast {
            meets_limit,
            least,
            limit,
            bytes_per_second,
            dirty_pages_per_second,
            ..
        }) => {
            let verdict = if *meets_limit { "will converge" } else { "will not converge" };
            format!(
                "{verdict}: {dirty_pages_per_second:.0} pages are dirtied a second, {:.0} can be \
                 moved; downtime will not come below {:.1} ms, the limit is {:.1} ms",
                bytes_per_second / PAGE_BYTES as f64,
                least.as_secs_f64() * 1e3,
                limit.as_secs_f64() * 1e3,
            )
        }
        Event::Registering { bytes } => format!(
            "registering guest memory: up to {} are pinned, and so allocated, until the migration ends",
            HumanBytes(*bytes)
        ),
        Event::Throttled { percent } => format!("guest slowed down by {percent} %"),
        Event::CannotThrottle => {
            "the guest cannot be slowed down here, and is waited for".to_owned()
        }
        Event::CalledOff { attempt, stage: Some(SwitchoverStage::DamagedPages), stood } => format!(
            "switchover {attempt} called off: pages had arrived otherwise than they were sent, and are sent again; the \
             guest goes on here after {:.1} ms",
            stood.as_secs_f64() * 1e3,
        ),
        Event::CalledOff { attempt, stage: Some(stage), stood } => format!(
            "switchover {attempt} called off while {stage}: it would have taken too long; the guest \
             goes on here after {:.1} ms",
            stood.as_secs_f64() * 1e3,
        ),
        Event::CalledOff { attempt, .. } => {
            format!("switchover {attempt} called off; more pages come")
        }
        Event::LinkLost { why, at_most } => {
            format!("the link is lost ({why}); for up to {} it may come back", time_text(at_most))
        }
        Event::Rejoined { after, .. } => {
            format!("the link is back after {:.1} ms", after.as_secs_f64() * 1e3)
        }
        Event::ChannelsReopened { channels, after, .. } => format!(
            "data channels that were lost are there again, {channels} of them, on another link; that took {:.1} ms",
            after.as_secs_f64() * 1e3,
        ),
        Event::GuestPaused => "guest paused at the source".to_owned(),
        Event::Loaded => "guest loaded at the destination".to_owned(),
        Event::GuestRunsThere => "guest runs at the destination".to_owned(),
        Event::GuestPausedThere => {
            "guest is at the destination, paused as it was at the source".to_owned()
        }
        Event::GuestKept => "guest runs on at the source".to_owned(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use pageferry::stats::RoundStatistics;

    use super::*;

    #[test]
    fn a_time_that_is_no_estimate_is_not_told_as_one() {
        let told = |verdict| {
            let statistics = RoundStatistics::default();
            let line = line(&Event::RoundFinished { round: 1, statistics, verdict });
            let line = line.expect("a line");
            line.split_once("; ").expect("what is next").1.to_owned()
        };
        for expected in [DAY, 2 * DAY, Duration::MAX] {
            for verdict in [
                Verdict::Iterate { expected: Some(expected) },
                Verdict::SwitchOver { expected },
                Verdict::GiveUp { expected },
                Verdict::PostCopy { expected },
            ] {
                let told = told(verdict);
                assert!(told.contains("more than a day") && !told.contains(" ms"), "{told}");
            }
        }
        let told = told(Verdict::GiveUp { expected: Duration::from_millis(86_399_999) });
        assert_eq!(told, "would still take 86399999 ms, giving up");
    }
}
