//! Histograms of times.
//!
//! A thread that measures has [`Latencies`] of its own, so that recording is a few instructions on
//! memory that nobody else uses; they are added up at the end. Where times are taken at a rate, a
//! [`Pacer`] says when each was due: counted from then, a stall counts once for every one that it
//! held up, and not once in all.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};
use serde::{Deserialize, Serialize};

use crate::hgrm;

/// Shortest and longest time that can be told apart from others; what is beyond counts as that.
const BOUNDS_NS: (u64, u64) = (1, 60_000_000_000);
/// Decimal digits that are right.
const DIGITS: u8 = 3;
/// Points of a curve each time that the distance to 100 % halves.
const POINTS: u32 = 5;

/// Times that one thread measured, or several together.
#[derive(Debug, Clone)]
pub struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        Self::new()
    }
}

impl Latencies {
    /// None yet.
    ///
    /// # Panics
    ///
    /// Never: the bounds are this module's own, and the library takes them.
    pub fn new() -> Self {
        let (shortest, longest) = BOUNDS_NS;
        let histogram = Histogram::new_with_bounds(shortest, longest, DIGITS);
        Self(histogram.expect("bounds that a histogram can have"))
    }

    /// Adds one.
    pub fn record(&mut self, time: Duration) {
        let (shortest, longest) = BOUNDS_NS;
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.0.saturating_record(nanoseconds.clamp(shortest, longest));
    }

    /// Adds another thread's.
    pub fn add(&mut self, other: &Self) {
        // Both have the same bounds, so there is nothing that does not fit.
        let added = self.0.add(&other.0);
        debug_assert!(added.is_ok(), "{added:?}");
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// So many of a hundred are as short as this, or shorter.
    pub fn percentile(&self, percentile: f64) -> Duration {
        Duration::from_nanos(self.0.value_at_percentile(percentile))
    }

    /// For JSON. `what` was measured over `transport`, at a rate if one was intended.
    pub fn summary(&self, what: What, transport: &str, rate: Option<u32>) -> Latency {
        let at = |percentile: f64| self.0.value_at_percentile(percentile);
        let curve = self.0.iter_quantiles(POINTS).map(|step| Point {
            percentile: rounded(step.quantile_iterated_to() * 100.0),
            ns: step.value_iterated_to(),
        });
        Latency {
            what,
            transport: transport.to_owned(),
            rate,
            count: self.0.len(),
            min_ns: self.0.min(),
            mean_ns: rounded(self.0.mean()),
            p50_ns: at(50.0),
            p90_ns: at(90.0),
            p99_ns: at(99.0),
            p99_9_ns: at(99.9),
            p99_99_ns: at(99.99),
            max_ns: self.0.max(),
            curve: curve.collect(),
            recording: None,
        }
    }

    /// As text that HdrHistogram's plotter reads, in microseconds.
    pub fn write_hgrm(&self, into: &mut impl Write) -> io::Result<()> {
        hgrm::write(&self.0, into)
    }
}

/// To as many decimals as mean something, and none that come from counting in halves.
fn rounded(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

/// What a time is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum What {
    /// From the re-arm of a batch's first page until the source knows that all of it has landed.
    Batch,
    /// From the sending of one page until the source knows that it has landed.
    Page,
    /// From the sending of a control frame until its echo is there.
    Control,
    /// From the sending of the commit until its answer, without what the destination took to let
    /// the guest run.
    Commit,
}

impl What {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Batch => "batch",
            Self::Page => "page",
            Self::Control => "control",
            Self::Commit => "commit",
        }
    }

    /// For people.
    pub fn description(self) -> &'static str {
        match self {
            Self::Batch => "batch: re-arm to landed",
            Self::Page => "one page: send to landed",
            Self::Control => "control: round trip",
            Self::Commit => "commit to answer",
        }
    }
}

/// A point of a percentile curve.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// 0 to 100.
    pub percentile: f64,
    /// So many of a hundred took this long at most.
    pub ns: u64,
}

/// What it costs to record.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Recording {
    /// Nanoseconds for each.
    pub ns_each: f64,
    /// All of them, as a share of the time that the transfers took.
    pub share_of_transfer: f64,
    /// Gigabits of pages a second of transfers without recording, in turn with those with it.
    pub plain_gbps_median: f64,
    /// The same with it.
    pub recorded_gbps_median: f64,
}

/// A histogram in a few figures. What is named after a percentile is the time within which so many
/// of a hundred were done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// What was measured.
    pub what: What,
    /// Over which transport.
    pub transport: String,
    /// How many a second were intended, and the times count from when each was due; null where the
    /// next began when the one before it was done.
    pub rate: Option<u32>,
    /// How many there are.
    pub count: u64,
    /// The shortest.
    pub min_ns: u64,
    /// Their mean.
    pub mean_ns: f64,
    /// The median.
    pub p50_ns: u64,
    /// 90 %.
    pub p90_ns: u64,
    /// 99 %.
    pub p99_ns: u64,
    /// 99.9 %.
    pub p99_9_ns: u64,
    /// 99.99 %.
    pub p99_99_ns: u64,
    /// The longest.
    pub max_ns: u64,
    /// The whole of it.
    pub curve: Vec<Point>,
    /// What recording cost; null if nobody looked.
    pub recording: Option<Recording>,
}

/// Times of one stretch of time, for a log.
#[derive(Debug, Clone)]
pub struct Interval {
    /// What was measured.
    pub what: What,
    /// From when.
    pub began: SystemTime,
    /// For how long.
    pub took: Duration,
    /// The times.
    pub latencies: Latencies,
}

/// Why histograms could not be kept.
#[derive(Debug, thiserror::Error)]
#[error("failed to write {path}")]
pub struct KeepError {
    path: String,
    #[source]
    cause: Box<dyn std::error::Error + Send + Sync>,
}

/// Writes `DIR/NAME.hlog`, an interval log of HdrHistogram's (V2, deflated), and for each thing
/// that was measured `DIR/NAME-WHAT.hgrm`, its distribution over all intervals.
pub fn keep(directory: &Path, name: &str, intervals: &[Interval]) -> Result<(), KeepError> {
    let path = directory.join(format!("{name}.hlog"));
    let failed = |path: &Path, cause| KeepError { path: path.display().to_string(), cause };
    std::fs::create_dir_all(directory).map_err(|error| failed(directory, error.into()))?;
    write_log(&path, intervals).map_err(|cause| failed(&path, cause))?;
    for (what, latencies) in by_kind(intervals) {
        let path = directory.join(format!("{name}-{}.hgrm", what.name()));
        write_distribution(&path, &latencies).map_err(|error| failed(&path, error.into()))?;
    }
    Ok(())
}

/// What was measured, over all intervals, in the order of its first one.
pub fn by_kind(intervals: &[Interval]) -> Vec<(What, Latencies)> {
    let mut kinds: Vec<(What, Latencies)> = Vec::new();
    for interval in intervals {
        match kinds.iter_mut().find(|(what, _)| *what == interval.what) {
            Some((_, latencies)) => latencies.add(&interval.latencies),
            None => kinds.push((interval.what, interval.latencies.clone())),
        }
    }
    kinds
}

fn write_log(
    path: &Path,
    intervals: &[Interval],
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut file = BufWriter::new(File::create(path)?);
    let mut serializer = V2DeflateSerializer::new();
    let began = intervals.iter().map(|interval| interval.began).min();
    let began = began.unwrap_or(SystemTime::UNIX_EPOCH);
    // Times in the log count from here.
    let mut log = IntervalLogWriterBuilder::new()
        .with_start_time(began)
        .with_base_time(began)
        .with_max_value_divisor(1e6)
        .begin_log_with(&mut file, &mut serializer)?;
    for Interval { what, began: at, took, latencies } in intervals {
        let since = at.duration_since(began).unwrap_or_default();
        log.write_histogram(&latencies.0, since, *took, Tag::new(what.name()))
            .map_err(|error| format!("{error:?}"))?;
    }
    Ok(file.flush()?)
}

fn write_distribution(path: &Path, latencies: &Latencies) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    latencies.write_hgrm(&mut file)?;
    file.flush()
}

/// When each of a number of things is due that are to be done at a rate.
#[derive(Debug, Clone, Copy)]
pub struct Pacer {
    began: Instant,
    rate: u32,
    done: u32,
}

impl Pacer {
    /// So many a second, from now on.
    pub fn new(began: Instant, rate: u32) -> Self {
        Self { began, rate: rate.max(1), done: 0 }
    }

    /// When the next one is due, and the one after that from then on. Whether that is in the past
    /// is up to the caller: a time that counts from here holds what it waited for its turn.
    pub fn next_due(&mut self) -> Instant {
        let due = self.began + Duration::from_secs(1) * self.done / self.rate;
        self.done += 1;
        due
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    use super::*;

    fn some(first: u64, count: u64) -> Latencies {
        let mut latencies = Latencies::new();
        (first..first + count).for_each(|step| latencies.record(Duration::from_nanos(step * 997)));
        latencies
    }

    #[test]
    fn what_threads_measured_adds_up() {
        let mut all = some(1, 1000);
        all.add(&some(1001, 1000));
        assert_eq!(all.count(), 2000);
        let exact = Duration::from_micros(997).as_secs_f64();
        assert!((all.percentile(50.0).as_secs_f64() / exact - 1.0).abs() < 0.001);
        assert_eq!(all.summary(What::Page, "tcp", None), {
            let mut together = Latencies::new();
            (1..=2000).for_each(|step| together.record(Duration::from_nanos(step * 997)));
            together.summary(What::Page, "tcp", None)
        });
    }

    #[test]
    fn times_beyond_the_bounds_count_as_those() {
        let mut latencies = Latencies::new();
        latencies.record(Duration::ZERO);
        latencies.record(Duration::from_secs(3600));
        let summary = latencies.summary(What::Commit, "tcp", None);
        assert_eq!((summary.count, summary.min_ns), (2, 1));
        assert!(summary.max_ns >= BOUNDS_NS.1);
    }

    #[test]
    fn the_librarys_own_reader_reads_the_log() {
        let directory = tempfile::tempdir().unwrap();
        let began = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let interval = |what, seconds, first| Interval {
            what,
            began: began + Duration::from_secs(seconds),
            took: Duration::from_millis(1500),
            latencies: some(first, 500),
        };
        let intervals = [
            interval(What::Batch, 0, 1),
            interval(What::Control, 2, 100),
            interval(What::Batch, 4, 1000),
        ];
        keep(directory.path(), "tcp", &intervals).unwrap();
        let text = std::fs::read(directory.path().join("tcp.hlog")).unwrap();
        let mut deserializer = Deserializer::new();
        let mut read = Vec::new();
        for entry in IntervalLogIterator::new(&text) {
            match entry.expect("an entry") {
                LogEntry::StartTime(time) => {
                    assert_eq!(time, Duration::from_secs(1_700_000_000));
                }
                LogEntry::BaseTime(_) => {}
                LogEntry::Interval(interval) => {
                    // The log has its histograms in base64; the library reads what is inside.
                    let bytes = STANDARD.decode(interval.encoded_histogram()).unwrap();
                    let histogram: Histogram<u64> =
                        deserializer.deserialize(&mut bytes.as_slice()).expect("a histogram");
                    let tag = interval.tag().map(|tag| tag.as_str().to_owned());
                    read.push((tag, interval.start_timestamp(), interval.duration(), histogram));
                }
            }
        }
        assert_eq!(read.len(), intervals.len());
        for ((tag, start, took, histogram), written) in read.iter().zip(&intervals) {
            assert_eq!(tag.as_deref(), Some(written.what.name()));
            assert_eq!(began + *start, written.began);
            assert_eq!(*took, written.took);
            assert_eq!(*histogram, written.latencies.0);
        }
    }

    #[test]
    fn what_is_held_up_counts_from_when_it_was_due() {
        let began = Instant::now();
        let mut pacer = Pacer::new(began, 1000);
        let due: Vec<_> = (0..4).map(|_| pacer.next_due() - began).collect();
        assert_eq!(due, [0, 1, 2, 3].map(Duration::from_millis));
        // A stall of 10 ms with the first one: those due meanwhile waited, too.
        let mut corrected = Latencies::new();
        let done = began + Duration::from_millis(10);
        for due in &due {
            corrected.record(done - (began + *due));
        }
        for (percentile, expected) in [(0.0, 7e-3), (50.0, 8e-3), (100.0, 10e-3)] {
            let found = corrected.percentile(percentile).as_secs_f64();
            assert!((found / expected - 1.0).abs() < 0.002, "{found} at {percentile}");
        }
    }
}
