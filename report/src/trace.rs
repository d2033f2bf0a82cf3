//! A document of the events that a program wrote to a file with `--events`: what somebody sends who wants to know why a
//! migration went as it did. `docs/report.md` describes the lines.

use pageferry::memory::PAGE_BYTES;
use serde::Deserialize;
use serde_json::Value;

use crate::document::{Document, Downtime, Kind, Migration, Round, Sample, Setting, ZeroCopy};
use crate::facts::Facts;

/// What a trace is read for. Other events have no fields that are drawn.
#[derive(Debug, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event {
    Began {
        facts: Box<Facts>,
    },
    RoundStarted {
        round: u32,
        dirty_pages: u64,
    },
    Progress {
        landed_bytes: u64,
        left_pages: u64,
    },
    Ended {
        report: Option<Box<Report>>,
    },
    #[serde(other)]
    Other,
}

#[derive(Debug, Deserialize)]
struct Line {
    realtime_ms: f64,
    #[serde(flatten)]
    event: Event,
}

/// The report of a migration, as far as it is drawn.
#[derive(Debug, Deserialize)]
struct Report {
    outcome: String,
    error: Option<String>,
    guest: Option<String>,
    workload: Option<String>,
    vcpus: Option<u8>,
    backing: Option<String>,
    dirty_source: Option<String>,
    transport: String,
    channels: u16,
    memory_bytes: u64,
    working_set_bytes: Option<u64>,
    total_ms: f64,
    setup_ms: f64,
    registration_ms: f64,
    downtime_ms: f64,
    downtime: Downtime,
    verify_ms: f64,
    downtime_limit_ms: Option<f64>,
    pages: Pages,
    bytes_on_wire: u64,
    user_copied_bytes: u64,
    zero_copy: ZeroCopy,
    system_calls: u64,
    cpu_ms: Option<f64>,
    throughput_gbps: f64,
    dirty_pages_per_second: f64,
    heartbeat_gap_ms: Option<f64>,
    oracle_ok: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct Pages {
    data: u64,
    zero: u64,
}

impl From<Report> for Migration {
    fn from(report: Report) -> Self {
        let setting = Setting {
            transport: report.transport,
            channels: report.channels,
            backing: report.backing.unwrap_or_default(),
            guest: report.guest.unwrap_or_default(),
            dirty_source: report.dirty_source.unwrap_or_default(),
            workload: report.workload.unwrap_or_default(),
            vcpus: report.vcpus.unwrap_or_default(),
            memory_bytes: report.memory_bytes,
            working_set_bytes: report.working_set_bytes.unwrap_or_default(),
            ..Setting::default()
        };
        Self {
            setting,
            outcome: report.outcome,
            error: report.error,
            oracle_ok: report.oracle_ok,
            total_ms: report.total_ms,
            setup_ms: report.setup_ms,
            registration_ms: report.registration_ms,
            downtime_ms: report.downtime_ms,
            downtime: report.downtime,
            verify_ms: report.verify_ms,
            downtime_limit_ms: report.downtime_limit_ms.unwrap_or_default(),
            throughput_gbps: report.throughput_gbps,
            dirty_pages_per_second: report.dirty_pages_per_second,
            data_pages: report.pages.data,
            zero_pages: report.pages.zero,
            wire_bytes: report.bytes_on_wire,
            user_copied_bytes: report.user_copied_bytes,
            system_calls: report.system_calls,
            zero_copy: report.zero_copy,
            cpu_ms: report.cpu_ms,
            heartbeat_gap_ms: report.heartbeat_gap_ms,
            ..Self::default()
        }
    }
}

/// What became of a migration whose end is not in its trace.
const UNKNOWN: &str = "unknown";

/// Reads a trace: a migration for each in it, also for one that has no end there. `None` if it is none, or none began.
/// What is no line of JSON, such as half a line at the end of a program that was killed, is passed over.
pub fn read(text: &str) -> Option<Document> {
    let mut document = Document::new(Kind::Report, Facts::default());
    let (mut rounds, mut samples) = (Vec::<Round>::new(), Vec::<Sample>::new());
    for line in text.lines() {
        let line = serde_json::from_str::<Value>(line).and_then(serde_json::from_value::<Line>);
        let Ok(Line { realtime_ms: ms, event }) = line else { continue };
        match event {
            Event::Began { facts } => {
                document.migrations.extend(unended(&mut rounds, &mut samples));
                document.facts = *facts;
            }
            Event::RoundStarted { round, dirty_pages } => {
                rounds.push(Round { round, ms, dirty_pages });
            }
            Event::Progress { landed_bytes, left_pages } => {
                let remaining_bytes = left_pages.saturating_mul(PAGE_BYTES);
                samples.push(Sample { ms, landed_bytes, remaining_bytes });
            }
            Event::Ended { report } => {
                let (mut rounds, mut samples) =
                    (std::mem::take(&mut rounds), std::mem::take(&mut samples));
                let Some(report) = report else { continue };
                // From here on times count from its beginning. What was before was a trial's, or a stranger's.
                let began_ms = ms - report.total_ms;
                rounds.retain(|round| round.ms >= began_ms);
                samples.retain(|sample| sample.ms >= began_ms);
                for round in &mut rounds {
                    round.ms -= began_ms;
                }
                for sample in &mut samples {
                    sample.ms -= began_ms;
                }
                document.migrations.push(Migration { rounds, samples, ..Migration::from(*report) });
            }
            Event::Other => {}
        }
    }
    document.migrations.extend(unended(&mut rounds, &mut samples));
    (!document.migrations.is_empty()).then_some(document)
}

/// A migration that has begun and whose end is not there.
fn unended(rounds: &mut Vec<Round>, samples: &mut Vec<Sample>) -> Option<Migration> {
    let (mut rounds, mut samples) = (std::mem::take(rounds), std::mem::take(samples));
    let began_ms = rounds.first()?.ms;
    for round in &mut rounds {
        round.ms -= began_ms;
    }
    for sample in &mut samples {
        sample.ms -= began_ms;
    }
    let total_ms = samples.iter().map(|sample| sample.ms).fold(0.0, f64::max);
    let error = Some("its end is not in the file: the program was killed, or goes on".to_owned());
    let outcome = UNKNOWN.to_owned();
    Some(Migration { outcome, error, total_ms, rounds, samples, ..Migration::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(ms: u32, round: u32) -> String {
        format!(r#"{{"realtime_ms":{ms},"event":"round_started","round":{round},"dirty_pages":9}}"#)
    }

    /// A file that is there is added to: what a run has left open is not the next one's.
    #[test]
    fn runs_in_one_file_are_told_apart() {
        let facts = serde_json::to_string(&Facts::default()).expect("JSON");
        let began = |ms: u32| {
            format!(r#"{{"realtime_ms":{ms},"event":"began","command":[],"facts":{facts}}}"#)
        };
        let lines = [
            began(1),
            round(10, 1),
            round(20, 2),
            "half a l".to_owned(),
            began(1000),
            round(1010, 1),
        ];
        let document = read(&lines.join("\n")).expect("a trace");
        let rounds: Vec<Vec<f64>> = document
            .migrations
            .iter()
            .map(|migration| migration.rounds.iter().map(|round| round.ms).collect())
            .collect();
        assert_eq!(rounds, [vec![0.0, 10.0], vec![0.0]]);
        assert!(document.migrations.iter().all(|migration| migration.outcome == UNKNOWN));
    }

    #[test]
    fn what_is_no_trace_is_none() {
        for text in ["", "{}", "no JSON", r#"{"realtime_ms":1,"event":"began"}"#] {
            assert!(read(text).is_none(), "{text}");
        }
    }
}
