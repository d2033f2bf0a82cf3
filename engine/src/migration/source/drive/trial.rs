//! A trial: whether the guest could go, and what that would be like. Parts of its memory are sent, which the
//! destination throws away; the guest runs on and is never paused for a switchover.

use std::time::{Duration, Instant};

use super::{DIRTY_SOURCES, Drive};
use crate::error::Error;
use crate::host::{Guarded, caught};
use crate::machine::Machine;
use crate::pages::dirty::{DirtyBitmap, DirtySources, WORD_PAGES};
use crate::pages::memory::{Layout, RegionLayout};
use crate::snapshot::Phase;

/// Of a round: 16 MiB, for which a link of 1 Gb/s takes an eighth of a second; and as many more of those that the
/// guest has dirtied.
const ROUND_PAGES: u64 = 4096;

/// What a trial has to see before it says what it has learned.
const ROUNDS: u32 = 4;

/// Words that are re-armed by one call.
const REARMED_WORDS: usize = 64;

impl Drive<'_> {
    /// Rounds over parts of memory, one after the other and again from the beginning, for that long and at least
    /// some.
    pub(super) fn try_out<M: Machine>(
        &mut self,
        machine: &mut Guarded<M>,
        at_most: Duration,
    ) -> Result<(), Error> {
        self.source.shared.set_phase(Phase::PreCopy);
        // It is not slowed down, so that nothing may be foretold of a slower one.
        self.convergence.forbid_throttling();
        let began = Instant::now();
        let mut parts = Parts::new(self.memory.layout());
        while began.elapsed() < at_most || self.number_of_rounds() < ROUNDS {
            self.take_wishes();
            self.rehearse(machine)?;
            // At first all of memory. What is not sent is re-armed too, since trackers may report it again until
            // it is.
            let dirty = self.channels.dirty()?;
            caught(DIRTY_SOURCES, || rearm(&self.dirty, dirty))??;
            keep_first(dirty, ROUND_PAGES);
            parts.next(dirty);
            let round = self.begin_round(true)?;
            self.ping()?;
            let mut waiting = self.waiting_for_round();
            self.await_round(&mut waiting, true, None)?;
            self.finish_round(&round);
            self.take_wishes();
            self.judge(&round)?;
            self.rest(self.convergence.rest(round.at.elapsed()))?;
        }
        Ok(())
    }
}

/// From now on what is written to these pages is in the next harvest.
fn rearm(
    sources: &DirtySources,
    pages: &DirtyBitmap,
) -> Result<(), crate::pages::dirty::DirtyError> {
    for (region, _) in (0..).zip(0..pages.regions()) {
        let mut first_page = 0;
        for words in pages.region_words(region).chunks(REARMED_WORDS) {
            sources.rearm(region, first_page, words)?;
            first_page += words.len() as u64 * WORD_PAGES;
        }
    }
    Ok(())
}

/// Forgets all but the first pages of those.
fn keep_first(pages: &mut DirtyBitmap, most: u64) {
    let mut left = most;
    for (region, _) in (0..).zip(0..pages.regions()) {
        for word in pages.region_words_mut(region) {
            if left == 0 {
                *word = 0;
            }
            while u64::from(word.count_ones()) > left {
                *word &= !(1 << (63 - word.leading_zeros()));
            }
            left -= u64::from(word.count_ones());
        }
    }
}

/// The pages of all regions, in turn.
struct Parts {
    /// Of each region.
    pages: Vec<u64>,
    region: usize,
    page: u64,
}

impl Parts {
    fn new(layout: &Layout) -> Self {
        let pages = layout.regions().iter().map(RegionLayout::pages).collect();
        Self { pages, region: 0, page: 0 }
    }

    /// Adds the next ones.
    fn next(&mut self, into: &mut DirtyBitmap) {
        let all: u64 = self.pages.iter().sum();
        for _ in 0..ROUND_PAGES.min(all) {
            if let Ok(region) = u16::try_from(self.region) {
                into.set(region, self.page);
            }
            self.page += 1;
            if self.page == self.pages[self.region] {
                self.page = 0;
                self.region = (self.region + 1) % self.pages.len();
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::pages::dirty::runs;
    use crate::testing::TestMemory;

    fn ranges(pages: &DirtyBitmap) -> Vec<Vec<Range<u64>>> {
        (0..3).map(|region| runs(pages.region_words(region)).collect()).collect()
    }

    #[test]
    fn parts_are_all_pages_in_turn() {
        let memory = TestMemory::new(&[5000, 1, 3000]);
        let mut parts = Parts::new(memory.memory().layout());
        let mut next = || {
            let mut pages = DirtyBitmap::new(memory.memory().layout());
            parts.next(&mut pages);
            ranges(&pages).concat()
        };
        assert_eq!(next(), [Range { start: 0, end: 4096 }]);
        // 904, 1 and 3000, and 191 from the beginning.
        assert_eq!(next(), [0..191, 4096..5000, 0..1, 0..3000]);
    }

    #[test]
    fn the_first_pages_are_kept() {
        let memory = TestMemory::new(&[100, 1, 300]);
        let mut pages = DirtyBitmap::new(memory.memory().layout());
        pages.fill();
        keep_first(&mut pages, 111);
        assert_eq!(ranges(&pages).concat(), [0..100, 0..1, 0..10]);
        keep_first(&mut pages, 500);
        assert_eq!(pages.count(), 111);
        keep_first(&mut pages, 0);
        assert!(pages.is_empty());
    }
}
