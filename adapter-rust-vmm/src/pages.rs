//! A bit for each page of guest memory that several threads set and clear.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use pageferry::dirty::{DirtyBitmap, WORD_PAGES};
use pageferry::memory::{Layout, RegionLayout};

use crate::bits::words_for;

/// Laid out like the engine's bitmap.
#[derive(Debug)]
pub(crate) struct AtomicPages {
    words: Vec<AtomicU64>,
    regions: Vec<Range<usize>>,
}

impl AtomicPages {
    pub(crate) fn new(layout: &Layout) -> Self {
        let mut end = 0;
        let region_words = |region: &RegionLayout| {
            let start = end;
            end += words_for(region.pages());
            start..end
        };
        let regions = layout.regions().iter().map(region_words).collect();
        let words = std::iter::repeat_with(AtomicU64::default).take(end).collect();
        Self { words, regions }
    }

    /// The words of a region of the layout; bit `i` of word `w` is page `w * 64 + i`.
    pub(crate) fn region(&self, region: u16) -> &[AtomicU64] {
        &self.words[self.regions[usize::from(region)].clone()]
    }

    fn regions(&self) -> impl Iterator<Item = (u16, &[AtomicU64])> {
        (0..).zip(&self.regions).map(|(region, words)| (region, &self.words[words.clone()]))
    }

    /// Adds pages of a region, after they were written.
    pub(crate) fn set(&self, region: u16, pages: Range<u64>) {
        self.each_word(region, pages, |word, bits| {
            word.fetch_or(bits, Ordering::Release);
        });
    }

    /// Each word that has some of these pages, and their bits in it.
    fn each_word(&self, region: u16, pages: Range<u64>, mut see: impl FnMut(&AtomicU64, u64)) {
        let words = self.region(region);
        let mut at = pages.start;
        while at < pages.end {
            let next = (at / WORD_PAGES + 1) * WORD_PAGES;
            let count = pages.end.min(next) - at;
            let bits = (u64::MAX >> (WORD_PAGES - count)) << (at % WORD_PAGES);
            if let Some(word) = usize::try_from(at / WORD_PAGES).ok().and_then(|at| words.get(at)) {
                see(word, bits);
            }
            at = next;
        }
    }

    /// Takes pages of a region away. Of those who do so and then look whether there [are any](Self::any) left of what
    /// they did together, at least one sees that there are none.
    pub(crate) fn take(&self, region: u16, pages: Range<u64>) {
        self.each_word(region, pages, |word, bits| {
            word.fetch_and(!bits, Ordering::SeqCst);
        });
    }

    /// Whether one of these pages is set.
    pub(crate) fn any(&self, region: u16, pages: Range<u64>) -> bool {
        let mut any = 0;
        self.each_word(region, pages, |word, bits| any |= word.load(Ordering::SeqCst) & bits);
        any != 0
    }

    /// Pages that are set.
    pub(crate) fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::SeqCst).count_ones())).sum()
    }

    /// Takes pages of a region away that are about to be read; `words` begin at page `first_page`
    /// and lie inside the region.
    pub(crate) fn clear(&self, region: u16, first_page: u64, words: &[u64]) {
        let mine = self.region(region).iter().skip(words_for(first_page));
        for (mine, theirs) in mine.zip(words).filter(|(_, theirs)| **theirs != 0) {
            // Acquire: who set a bit wrote the page before, and that is to be read.
            mine.fetch_and(!theirs, Ordering::AcqRel);
        }
    }

    /// Adds the pages of a bitmap of the same layout.
    pub(crate) fn add(&self, pages: &DirtyBitmap) {
        for (region, mine) in self.regions() {
            for (mine, theirs) in mine.iter().zip(pages.region_words(region)) {
                mine.fetch_or(*theirs, Ordering::Relaxed);
            }
        }
    }

    /// Adds these pages to a bitmap of the same layout; whether there were any.
    pub(crate) fn merge_into(&self, into: &mut DirtyBitmap) -> bool {
        let mut any = 0;
        for (region, mine) in self.regions() {
            for (theirs, mine) in into.region_words_mut(region).iter_mut().zip(mine) {
                // Acquire, for who set the bit let a write go on with it.
                let word = mine.load(Ordering::Acquire);
                any |= word;
                *theirs |= word;
            }
        }
        any != 0
    }
}
