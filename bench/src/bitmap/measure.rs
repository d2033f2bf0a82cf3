//! The work that is measured.

use std::hint::black_box;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use pageferry::dirty::{DirtyBitmap, runs};
use pageferry::ledger::Ledger;
use pageferry::memory::Layout;
use pageferry::partition::Partition;
use pageferry_cli::outcome::Failure;

use crate::output::median;

/// A sample takes about this long at least, so that the clock does not matter.
const SAMPLE: Duration = Duration::from_millis(2);

/// Repeats work until its time can be told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sampler {
    pub(super) samples: u16,
}

impl Sampler {
    /// Adds one bitmap to another, as a harvest does with each tracker's.
    pub(super) fn harvest(self, into: &mut DirtyBitmap, from: &DirtyBitmap) -> f64 {
        self.alone(|| black_box(&mut *into).merge(black_box(from)))
    }

    /// Counts pages.
    pub(super) fn count(self, bitmap: &DirtyBitmap) -> f64 {
        self.alone(|| {
            black_box(black_box(bitmap).count());
        })
    }

    /// The floor: every word is looked at and nothing is done with it. Each thread has a
    /// contiguous part.
    pub(super) fn read(self, bitmap: &DirtyBitmap, threads: u16) -> Result<f64, Failure> {
        let words = bitmap.region_words(0);
        let part_words = words.len().div_ceil(usize::from(threads)).max(1);
        let work = words.chunks(part_words).map(|part| {
            move || {
                let all = black_box(part).iter().fold(0, |all, word| all | word);
                black_box(all);
            }
        });
        self.together(work.collect())
    }

    /// Finds the dirty stripes and the runs in them, each thread those of its channel, as senders
    /// do in a round.
    pub(super) fn scan(
        self,
        layout: &Layout,
        bitmap: &DirtyBitmap,
        threads: u16,
    ) -> Result<f64, Failure> {
        let mut ledger = Ledger::new(layout);
        ledger.dirty.clear();
        ledger.dirty.merge(bitmap);
        let (_loan, shares) = ledger.lend(&Partition::new(layout, threads));
        let work = shares.into_iter().map(|mut share| {
            move || {
                share.rewind();
                while let Some((stripe, bits)) = share.next_dirty() {
                    for run in runs(&bits) {
                        black_box(stripe.first_page() + run.start..stripe.first_page() + run.end);
                    }
                }
            }
        });
        self.together(work.collect())
    }

    /// Median time of one piece of work on this thread, in nanoseconds.
    fn alone(self, mut work: impl FnMut()) -> f64 {
        let repeats = repeats(&mut work);
        let samples = (0..self.samples).map(|_| {
            let began = Instant::now();
            for _ in 0..repeats {
                work();
            }
            nanoseconds(began.elapsed(), repeats)
        });
        median(samples).unwrap_or(0.0)
    }

    /// Median time until all pieces of work are done, each by a thread of its own that began
    /// together with the others, in nanoseconds.
    fn together(self, work: Vec<impl FnMut() + Send>) -> Result<f64, Failure> {
        let barrier = &Barrier::new(work.len());
        // The slowest decides for all: they must do the same number of rounds.
        let rounds = &std::sync::atomic::AtomicU32::new(1);
        let samples = self.samples;
        thread::scope(|scope| {
            let threads: Vec<_> = work
                .into_iter()
                .map(|mut work| {
                    scope.spawn(move || {
                        let wanted = repeats(&mut work);
                        rounds.fetch_max(wanted, std::sync::atomic::Ordering::Relaxed);
                        let time = |_| {
                            barrier.wait();
                            let repeats = rounds.load(std::sync::atomic::Ordering::Relaxed);
                            let began = Instant::now();
                            for _ in 0..repeats {
                                work();
                            }
                            (began, Instant::now(), repeats)
                        };
                        (0..samples).map(time).collect::<Vec<_>>()
                    })
                })
                .collect();
            let mut times = Vec::new();
            for thread in threads {
                times.push(thread.join().map_err(|_| "a measuring thread panicked")?);
            }
            let samples = (0..usize::from(samples)).filter_map(|sample| {
                let of_sample = || times.iter().map(|times| times[sample]);
                let began = of_sample().map(|(began, ..)| began).min()?;
                let (_, ended, repeats) = of_sample().max_by_key(|(_, ended, _)| *ended)?;
                Some(nanoseconds(ended.duration_since(began), repeats))
            });
            Ok(median(samples).unwrap_or(0.0))
        })
    }
}

/// How often work must be repeated to fill a sample. Does it once before, to warm up.
fn repeats(work: &mut impl FnMut()) -> u32 {
    work();
    let began = Instant::now();
    work();
    let once = began.elapsed().as_nanos().max(1);
    u32::try_from(SAMPLE.as_nanos().div_ceil(once)).unwrap_or(u32::MAX)
}

fn nanoseconds(took: Duration, repeats: u32) -> f64 {
    took.as_secs_f64() * 1e9 / f64::from(repeats)
}
