//! The JSON object of measurements. `docs/report.md` describes every field.

use std::ops::Add;
use std::time::Duration;

use pageferry::Statistics;
use pageferry::transport::ZeroCopyCounts;
use serde::{Deserialize, Serialize};

use crate::facts::Facts;
use crate::latency::Latency;

/// Version of the object. Fields are added, never repurposed; what breaks a reader counts this up.
pub const SCHEMA: u32 = 1;

/// Why a text is no document.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DocumentError {
    /// It is no JSON, or not of this shape.
    #[error("no document of pageferry's measurements")]
    Malformed(#[from] serde_json::Error),
    /// It is of another version.
    #[error("schema {found}, this program reads {SCHEMA}")]
    Schema {
        /// The version it has.
        found: u32,
    },
}

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Kind {
    /// One migration: `pageferry-vmm demo`.
    Demo,
    /// A sweep of migrations.
    Migrate,
    /// Latencies.
    Latency,
    /// The engine against others.
    Compare,
    /// Several documents together.
    Report,
}

/// Everything that a measurement has to say. Parts that it does not measure are empty.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Document {
    /// [`SCHEMA`].
    pub schema: u32,
    /// What was measured.
    pub kind: Kind,
    /// Where.
    pub facts: Facts,
    /// Migrations.
    #[serde(default)]
    pub migrations: Vec<Migration>,
    /// Latencies.
    #[serde(default)]
    pub latencies: Vec<Latency>,
    /// Comparisons.
    #[serde(default)]
    pub comparisons: Vec<Comparison>,
    /// Pages written by RDMA; null where that was not measured.
    #[serde(default)]
    pub page_writes: Option<PageWrites>,
}

impl Document {
    /// With nothing measured yet.
    pub fn new(kind: Kind, facts: Facts) -> Self {
        let (migrations, latencies, comparisons) = (Vec::new(), Vec::new(), Vec::new());
        Self { schema: SCHEMA, kind, facts, migrations, latencies, comparisons, page_writes: None }
    }

    /// From its JSON.
    pub fn parse(text: &str) -> Result<Self, DocumentError> {
        #[derive(Deserialize)]
        struct Version {
            schema: u32,
        }
        // Asked first: a document of another version may have any other shape.
        let Version { schema: found } = serde_json::from_str(text)?;
        if found != SCHEMA {
            return Err(DocumentError::Schema { found });
        }
        Ok(serde_json::from_str(text)?)
    }

    /// Adds what another one says. The machine stays this one's.
    pub fn add(&mut self, other: Self) {
        self.migrations.extend(other.migrations);
        self.latencies.extend(other.latencies);
        self.comparisons.extend(other.comparisons);
        self.page_writes = self.page_writes.take().or(other.page_writes);
    }
}

/// How a migration was set up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// What moved the pages.
    pub transport: String,
    /// Data channels.
    pub channels: u16,
    /// What backed guest memory, on both sides.
    pub backing: String,
    /// "kvm" or "process".
    pub guest: String,
    /// What told which pages the guest wrote.
    pub dirty_source: String,
    /// How the guest wrote.
    pub workload: String,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Guest memory.
    pub memory_bytes: u64,
    /// What of it the guest wrote to.
    pub working_set_bytes: u64,
    /// Pages the guest was to write a second; null is as fast as it could.
    pub dirty_rate: Option<u64>,
    /// Threads that used CPUs and memory as a busy guest does, while the guest ran.
    pub guest_load: u16,
    /// Threads of the host that did so all the time.
    pub host_load: u16,
}

impl Setting {
    /// In a few words.
    pub fn title(&self) -> String {
        let channels = if self.channels == 1 { "channel" } else { "channels" };
        let rate = self.dirty_rate.map_or_else(String::new, |rate| format!(" at {rate}/s"));
        let mut title = format!("{}, {} {channels}", self.transport, self.channels);
        // Who looks at a trace alone may not know all of them.
        for part in [&self.backing, &self.workload].into_iter().filter(|part| !part.is_empty()) {
            title.extend([", ", part]);
        }
        title.push_str(&rate);
        for (name, threads) in [("guest", self.guest_load), ("host", self.host_load)] {
            if threads > 0 {
                title.extend([format!(", {name} load {threads}")]);
            }
        }
        title
    }
}

/// The guest's standstill in milliseconds, in parts that follow one another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Downtime {
    /// Stopping the guest.
    pub pause: f64,
    /// Asking what it wrote last.
    pub final_harvest: f64,
    /// Sending that.
    pub final_pages: f64,
    /// Moving the state of its devices.
    pub device_state: f64,
    /// Handing it over.
    pub commit: f64,
    /// Letting it run.
    pub resume: f64,
}

impl From<&pageferry::Downtime> for Downtime {
    fn from(took: &pageferry::Downtime) -> Self {
        Self {
            pause: ms(took.pause),
            final_harvest: ms(took.final_harvest),
            final_pages: ms(took.final_pages),
            device_state: ms(took.device_state),
            commit: ms(took.commit),
            resume: ms(took.resume),
        }
    }
}

impl Downtime {
    /// The parts with their names, in order.
    pub fn parts(&self) -> [(&'static str, f64); 6] {
        [
            ("pause", self.pause),
            ("final harvest", self.final_harvest),
            ("final pages", self.final_pages),
            ("device state", self.device_state),
            ("commit", self.commit),
            ("resume", self.resume),
        ]
    }

    /// All of them.
    pub fn total(&self) -> f64 {
        self.parts().iter().map(|(_, part)| part).sum()
    }
}

/// What became of sends that asked the kernel not to copy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZeroCopy {
    /// Sends that are complete.
    pub sent: u64,
    /// Those of them that the kernel copied after all.
    pub copied_by_kernel: u64,
    /// Bytes of either.
    pub sent_bytes: u64,
    /// Bytes of those that were copied.
    pub copied_bytes: u64,
}

/// Of two sides, or two transfers.
impl Add for ZeroCopy {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            sent: self.sent + other.sent,
            copied_by_kernel: self.copied_by_kernel + other.copied_by_kernel,
            sent_bytes: self.sent_bytes + other.sent_bytes,
            copied_bytes: self.copied_bytes + other.copied_bytes,
        }
    }
}

impl From<ZeroCopyCounts> for ZeroCopy {
    fn from(counts: ZeroCopyCounts) -> Self {
        let ZeroCopyCounts { sent, copied_by_kernel, sent_bytes, copied_bytes } = counts;
        Self { sent, copied_by_kernel, sent_bytes, copied_bytes }
    }
}

/// What load there really was while a migration went on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// CPU seconds a second that the guest's load took.
    pub guest_cpus: f64,
    /// Bytes a second that it read and wrote, in 10⁹.
    pub guest_gigabytes_per_second: f64,
    /// The same of the host's.
    pub host_cpus: f64,
    /// The same of the host's.
    pub host_gigabytes_per_second: f64,
}

/// The longest time between two beats of the guest's heart in a slice of time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Gap {
    /// When it ended, from the beginning of the migration.
    pub ms: f64,
    /// How long it was.
    pub gap_ms: f64,
}

/// A moment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// From the beginning of the migration.
    pub ms: f64,
    /// Page bytes that have landed.
    pub landed_bytes: u64,
    /// Bytes of pages still to be looked at in this round.
    pub remaining_bytes: u64,
}

/// The beginning of a round. Of very many some are left out.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Its number, from 1.
    pub round: u32,
    /// When, from the beginning of the migration.
    pub ms: f64,
    /// Pages that were dirty; those of the rounds that are left out before it count.
    pub dirty_pages: u64,
}

/// One live migration.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Migration {
    /// How it was set up.
    pub setting: Setting,
    /// "completed", "failed", "cancelled" or "uncertain".
    pub outcome: String,
    /// Why it is not "completed".
    pub error: Option<String>,
    /// Whether the guest's memory was right afterwards; null if nobody looked.
    pub oracle_ok: Option<bool>,
    /// From the call to its return.
    pub total_ms: f64,
    /// Before the first page.
    pub setup_ms: f64,
    /// Registering guest memory.
    pub registration_ms: f64,
    /// From the first page to the last one landed.
    pub transfer_ms: f64,
    /// All the guest stood still, comparing memory apart.
    pub downtime_ms: f64,
    /// Its parts.
    pub downtime: Downtime,
    /// How long it stood still besides, until memory was compared on both sides.
    #[serde(default)]
    pub verify_ms: f64,
    /// What it was to be at most.
    pub downtime_limit_ms: f64,
    /// Bits on the wire a second, in 10⁹.
    pub throughput_gbps: f64,
    /// Pages the guest wrote a second, in the last round that it ran.
    pub dirty_pages_per_second: f64,
    /// Pages sent.
    pub data_pages: u64,
    /// Pages found to be zero, and not sent.
    pub zero_pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Page bytes copied in user space.
    pub user_copied_bytes: u64,
    /// System calls of the source that moved data.
    pub system_calls: u64,
    /// What became of zero-copy sends.
    pub zero_copy: ZeroCopy,
    /// CPU time of the source's process meanwhile, the guest's included; null if not measured.
    pub cpu_ms: Option<f64>,
    /// Load besides.
    pub load: Load,
    /// The longest time between two heartbeats.
    pub heartbeat_gap_ms: Option<f64>,
    /// When each round began.
    pub rounds: Vec<Round>,
    /// Over time.
    pub samples: Vec<Sample>,
    /// Over time; the clock of both sides is the host's.
    pub heartbeat_gaps: Vec<Gap>,
}

impl Migration {
    /// What the engine says of it.
    pub fn of(setting: Setting, statistics: &Statistics) -> Self {
        let downtime = &statistics.downtime;
        Self {
            setting,
            outcome: "completed".to_owned(),
            total_ms: ms(statistics.total),
            setup_ms: ms(statistics.setup),
            registration_ms: ms(statistics.registration.took),
            transfer_ms: ms(statistics.transfer),
            downtime_ms: ms(downtime.total()),
            downtime: downtime.into(),
            verify_ms: ms(downtime.verify),
            throughput_gbps: statistics.throughput_gbps(),
            dirty_pages_per_second: statistics.dirty_pages_per_second,
            data_pages: statistics.pages.data,
            zero_pages: statistics.pages.zero,
            wire_bytes: statistics.wire_bytes,
            user_copied_bytes: statistics.user_copied_bytes,
            system_calls: statistics.system_calls,
            zero_copy: statistics.zero_copy.into(),
            ..Self::default()
        }
    }
}

/// In milliseconds. Microseconds are as far as such figures mean anything.
pub fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Who moved memory, and how fast, each time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Contestant {
    /// Its name.
    pub name: String,
    /// Gigabits of memory a second, one figure a round.
    pub gbps: Vec<f64>,
}

/// Who could not be measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// Its name.
    pub name: String,
    /// Why, and what to do about it.
    pub why: String,
}

/// Several ways to move the same memory, in turn in one run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// What was moved.
    pub title: String,
    /// Who moved it.
    pub contestants: Vec<Contestant>,
    /// Who could not.
    pub missing: Vec<Missing>,
}

/// Single pages written there and back by RDMA, against perftest's ib_write_lat.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PageWrites {
    /// Of one page.
    pub page_bytes: u64,
    /// Of each measurement.
    pub writes: u32,
    /// Both, one right after the other.
    pub pairs: Vec<PageWritePair>,
    /// The median of the pairs'.
    pub ratio_median: Option<f64>,
}

impl PageWrites {
    /// Of so many writes each.
    pub fn new(page_bytes: u64, writes: u32, pairs: Vec<PageWritePair>) -> Self {
        let ratio_median = median(pairs.iter().map(|pair| pair.ratio));
        Self { page_bytes, writes, pairs, ratio_median }
    }
}

/// Half the time there and back, median of the writes, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PageWritePair {
    /// By the engine's transport.
    pub engine_us: f64,
    /// By ib_write_lat.
    pub perftest_us: f64,
    /// The one to the other.
    pub ratio: f64,
}

impl PageWritePair {
    /// With its ratio.
    pub fn new(engine_us: f64, perftest_us: f64) -> Self {
        Self { engine_us, perftest_us, ratio: engine_us / perftest_us }
    }
}

/// The middle one of some figures, the mean of the two in the middle of an even number; `None`
/// of none.
pub fn median(figures: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = figures.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        length if length.is_multiple_of(2) => {
            Some(f64::midpoint(sorted[middle - 1], sorted[middle]))
        }
        _ => Some(sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median([]), None);
        assert_eq!(median([3.0]), Some(3.0));
        assert_eq!(median([9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 9.0]), Some(3.0));
    }

    #[test]
    fn a_document_of_another_version_is_refused_by_its_version() {
        let error = Document::parse(r#"{"schema":2,"shape":"another"}"#).unwrap_err();
        assert_eq!(error.to_string(), "schema 2, this program reads 1");
        for nonsense in ["", "[]", "{}", r#"{"schema":1}"#, r#"{"schema":1,"kind":"dance"}"#] {
            let error = Document::parse(nonsense).unwrap_err();
            assert!(matches!(error, DocumentError::Malformed(_)), "{nonsense}: {error}");
        }
    }
}
