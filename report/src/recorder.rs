//! What a migration does over time: looked at now and then from a thread of its own, so that the
//! migration pays nothing for it.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pageferry::{Event, MigrationHandle, Snapshot};

use crate::document::{Round, Sample, ms};
use crate::heartbeat::realtime_ns;

/// How often one looks at first.
const INTERVAL: Duration = Duration::from_millis(2);

/// A look that took longer, since the thread had to wait for a CPU, is of no known moment.
const LONGEST_LOOK: Duration = Duration::from_micros(500);

/// Samples to keep. When there are more, every second one is dropped, and one looks half as often.
const MOST_SAMPLES: usize = 2000;

/// Rounds to keep. When there are more, every second one is dropped, and of those that follow as many.
const MOST_ROUNDS: usize = 2000;

/// Records one migration until it is finished or dropped.
#[derive(Debug)]
pub struct Recorder {
    began_realtime_ns: u64,
    began: Instant,
    stop: Arc<AtomicBool>,
    rounds: Arc<Mutex<Rounds>>,
    thread: Option<JoinHandle<Vec<Sample>>>,
}

impl Recorder {
    /// Begins. The migration may begin later; times count from here.
    pub fn start(handle: MigrationHandle) -> std::io::Result<Self> {
        let (began_realtime_ns, began) = (realtime_ns(), Instant::now());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let body = move || watch(&handle, began, &stopped);
        let thread = thread::Builder::new().name("recorder".into()).spawn(body)?;
        Ok(Self { began_realtime_ns, began, stop, rounds: Arc::default(), thread: Some(thread) })
    }

    /// When it began, by `CLOCK_REALTIME`.
    pub fn began_realtime_ns(&self) -> u64 {
        self.began_realtime_ns
    }

    /// A sink for the engine's events.
    pub fn sink(&self) -> impl FnMut(&Event) + Send + 'static + use<> {
        let (began, rounds) = (self.began, Arc::clone(&self.rounds));
        move |event| {
            if let Event::RoundStarted { round, dirty_pages } = *event {
                let round = Round { round, ms: ms(began.elapsed()), dirty_pages };
                rounds.lock().unwrap_or_else(PoisonError::into_inner).add(round);
            }
        }
    }

    /// Ends, and returns what there was to see.
    pub fn finish(mut self) -> (Vec<Round>, Vec<Sample>) {
        let samples = self.join();
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut rounds.kept), samples)
    }

    fn join(&mut self) -> Vec<Sample> {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return Vec::new() };
        thread.thread().unpark();
        // A recorder that panicked has recorded nothing.
        thread.join().unwrap_or_default()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.join();
    }
}

fn watch(handle: &MigrationHandle, began: Instant, stop: &AtomicBool) -> Vec<Sample> {
    let mut series = Series::default();
    let mut interval = INTERVAL;
    loop {
        let last = stop.load(Ordering::Relaxed);
        let before = began.elapsed();
        let snapshot = handle.snapshot();
        // The last one is right whenever it was: nothing changes any more.
        let after = if last { before } else { began.elapsed() };
        series.add(before..=after, &snapshot);
        if last {
            return series.samples;
        }
        if series.samples.len() > MOST_SAMPLES {
            series.thin_out();
            interval *= 2;
        }
        thread::park_timeout(interval);
    }
}

/// Rounds as far as they are kept: the first, the newest, and one in so many between.
#[derive(Debug)]
struct Rounds {
    kept: Vec<Round>,
    one_in: u32,
}

impl Default for Rounds {
    fn default() -> Self {
        Self { kept: Vec::new(), one_in: 1 }
    }
}

impl Rounds {
    fn add(&mut self, mut round: Round) {
        if let [.., before, last] = self.kept[..]
            && last.round.saturating_sub(before.round) < self.one_in
        {
            // It was the newest, and is one of those between.
            round.dirty_pages = round.dirty_pages.saturating_add(last.dirty_pages);
            self.kept.pop();
        }
        self.kept.push(round);
        if self.kept.len() > MOST_ROUNDS {
            self.one_in = self.one_in.saturating_mul(2);
            for round in std::mem::take(&mut self.kept) {
                self.add(round);
            }
        }
    }
}

#[derive(Debug, Default)]
struct Series {
    samples: Vec<Sample>,
}

impl Series {
    /// Adds what was seen at some moment of that time.
    fn add(&mut self, time: RangeInclusive<Duration>, snapshot: &Snapshot) {
        let (at, end) = time.into_inner();
        if end.saturating_sub(at) > LONGEST_LOOK {
            return;
        }
        self.samples.push(Sample {
            ms: ms(at),
            landed_bytes: snapshot.landed_bytes,
            remaining_bytes: snapshot.left_bytes(),
        });
    }

    fn thin_out(&mut self) {
        let mut keep = false;
        self.samples.retain(|_| {
            keep = !keep;
            keep
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_too_long_loses_every_second_sample() {
        let sample =
            |number: u32| Sample { ms: number.into(), landed_bytes: 0, remaining_bytes: 0 };
        let mut series = Series { samples: (0..5).map(sample).collect() };
        series.thin_out();
        assert_eq!(series.samples, [0, 2, 4].map(sample));
    }

    #[test]
    fn rounds_without_number_take_little_room_and_say_all_that_was_written() {
        let mut rounds = Rounds::default();
        for number in 1..=1_000_000 {
            rounds.add(Round { round: number, ms: number.into(), dirty_pages: 3 });
            assert!(rounds.kept.len() <= MOST_ROUNDS);
            assert_eq!(rounds.kept.last().unwrap().round, number);
        }
        let kept = &rounds.kept;
        assert!(kept.len() > MOST_ROUNDS / 3, "{}", kept.len());
        assert_eq!(kept[0], Round { round: 1, ms: 1.0, dirty_pages: 3 });
        // As many pages a second as if all had been kept.
        for pair in kept.windows(2) {
            let between = f64::from(pair[1].round - pair[0].round);
            assert!((pair[1].dirty_pages as f64 / between - 3.0).abs() < 1e-9, "{pair:?}");
        }
    }

    #[test]
    fn a_look_that_took_long_is_no_sample() {
        let snapshot = pageferry::Source::new().handle().snapshot();
        let mut series = Series::default();
        let [begin, end, late] = [10_000, 10_100, 14_000].map(Duration::from_micros);
        series.add(begin..=late, &snapshot);
        series.add(begin..=end, &snapshot);
        assert_eq!(series.samples.iter().map(|it| it.ms).collect::<Vec<_>>(), [10.0]);
    }

    #[test]
    fn a_recorder_sees_the_end() {
        let source = pageferry::Source::new();
        let recorder = Recorder::start(source.handle()).unwrap();
        let mut sink = recorder.sink();
        sink(&Event::RoundStarted { round: 1, dirty_pages: 7 });
        sink(&Event::GuestPaused);
        let (rounds, samples) = recorder.finish();
        assert_eq!(
            rounds.iter().map(|round| (round.round, round.dirty_pages)).next(),
            Some((1, 7))
        );
        assert!(!samples.is_empty());
    }
}
