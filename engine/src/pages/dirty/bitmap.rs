//! A bit for each page of guest memory, in whole words a region.

use std::ops::Range;

use crate::pages::memory::Layout;

/// Pages in one bitmap word.
pub const WORD_PAGES: u64 = u64::BITS as u64;

/// Bitmap words in a stripe, the unit of ownership: 2 MiB of guest memory, one huge page.
pub const STRIPE_WORDS: usize = 8;

/// Which pages are dirty. Each region begins at a stripe of its own, so stripes never mix regions
/// and can be given to threads as they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyBitmap {
    stripes: Box<[[u64; STRIPE_WORDS]]>,
    regions: Vec<RegionBits>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct RegionBits {
    words: Range<usize>,
    pages: u64,
}

impl DirtyBitmap {
    /// A clean bitmap for a memory map.
    pub fn new(layout: &Layout) -> Self {
        let mut regions = Vec::with_capacity(layout.regions().len());
        let mut stripes = 0;
        for region in layout.regions() {
            let start = stripes * STRIPE_WORDS;
            // Address space bounds a layout far below what usize can count.
            let words =
                usize::try_from(region.pages().div_ceil(WORD_PAGES)).unwrap_or(usize::MAX / 16);
            regions.push(RegionBits { words: start..start + words, pages: region.pages() });
            stripes += words.div_ceil(STRIPE_WORDS);
        }
        Self { stripes: vec![[0; STRIPE_WORDS]; stripes].into_boxed_slice(), regions }
    }

    fn words(&self) -> &[u64] {
        self.stripes.as_flattened()
    }

    fn words_mut(&mut self) -> &mut [u64] {
        self.stripes.as_flattened_mut()
    }

    /// Takes the words out, and leaves a bitmap that is only good for
    /// [`put_stripes`](Self::put_stripes).
    pub(crate) fn take_stripes(&mut self) -> Box<[[u64; STRIPE_WORDS]]> {
        std::mem::take(&mut self.stripes)
    }

    /// Puts the words back that were taken out.
    pub(crate) fn put_stripes(&mut self, stripes: Box<[[u64; STRIPE_WORDS]]>) {
        self.stripes = stripes;
    }

    /// Number of regions.
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// Pages of a region.
    ///
    /// # Panics
    ///
    /// If `region` is not in the layout the bitmap was made for; so do the other methods.
    pub fn region_pages(&self, region: u16) -> u64 {
        self.regions[usize::from(region)].pages
    }

    /// The words of a region; bit `i` of word `w` is page `w * 64 + i`.
    pub fn region_words(&self, region: u16) -> &[u64] {
        &self.words()[self.regions[usize::from(region)].words.clone()]
    }

    /// The words of a region, to add pages to. Bits beyond its last page are cleared by
    /// [`trim`](Self::trim).
    pub fn region_words_mut(&mut self, region: u16) -> &mut [u64] {
        let words = self.regions[usize::from(region)].words.clone();
        &mut self.words_mut()[words]
    }

    /// Marks one page.
    pub fn set(&mut self, region: u16, page: u64) {
        let word = usize::try_from(page / WORD_PAGES).unwrap_or(usize::MAX);
        self.region_words_mut(region)[word] |= 1 << (page % WORD_PAGES);
    }

    /// Whether a page is marked.
    pub fn get(&self, region: u16, page: u64) -> bool {
        let word = usize::try_from(page / WORD_PAGES).unwrap_or(usize::MAX);
        self.region_words(region)[word] >> (page % WORD_PAGES) & 1 == 1
    }

    /// Adds words to a region, beginning with the word that holds `first_page`.
    pub fn merge_words(&mut self, region: u16, first_page: u64, words: &[u64]) {
        let start = usize::try_from(first_page / WORD_PAGES).unwrap_or(usize::MAX);
        let into = &mut self.region_words_mut(region)[start..start + words.len()];
        into.iter_mut().zip(words).for_each(|(mine, theirs)| *mine |= theirs);
    }

    /// Adds all pages of a bitmap of the same layout.
    pub fn merge(&mut self, other: &Self) {
        debug_assert_eq!(self.regions, other.regions);
        let theirs = other.words();
        self.words_mut().iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine |= theirs);
    }

    /// Marks every page.
    pub fn fill(&mut self) {
        for region in 0..self.regions.len() {
            let words = self.regions[region].words.clone();
            self.words_mut()[words].fill(u64::MAX);
        }
        self.trim();
    }

    /// Marks no page.
    pub fn clear(&mut self) {
        self.words_mut().fill(0);
    }

    /// Clears bits beyond the last page of each region.
    pub fn trim(&mut self) {
        let words = self.stripes.as_flattened_mut();
        for region in &self.regions {
            let tail = region.pages % WORD_PAGES;
            if tail != 0 {
                words[region.words.end - 1] &= (1 << tail) - 1;
            }
        }
    }

    /// Number of marked pages.
    pub fn count(&self) -> u64 {
        pages_in(self.words())
    }

    /// The number of dirty pages in each of so many parts of memory, as good as equal in size.
    pub fn counts(&self, parts: usize) -> Vec<u64> {
        let words = self.words();
        let part_words = words.len().div_ceil(parts.max(1)).max(1);
        words.chunks(part_words).map(pages_in).collect()
    }

    /// Whether no page is marked.
    pub fn is_empty(&self) -> bool {
        self.words().iter().all(|word| *word == 0)
    }
}

/// The runs of set bits in words, as ranges of bit numbers counted from the first word; each as
/// long as it can be. Costs a few instructions a run, and one a word that is all the same.
pub fn runs(words: &[u64]) -> impl Iterator<Item = Range<u64>> {
    let end = words.len() as u64 * WORD_PAGES;
    let mut at = 0;
    std::iter::from_fn(move || {
        let begin = next_bit(words, at, 0)?;
        at = next_bit(words, begin, u64::MAX).unwrap_or(end);
        Some(begin..at)
    })
}

/// The first bit at or after `from` that is not like all of `like`'s.
#[inline]
fn next_bit(words: &[u64], from: u64, like: u64) -> Option<u64> {
    let mut index = usize::try_from(from / WORD_PAGES).ok()?;
    let mut different = (words.get(index)? ^ like) & (u64::MAX << (from % WORD_PAGES));
    while different == 0 {
        index += 1;
        different = words.get(index)? ^ like;
    }
    Some(index as u64 * WORD_PAGES + u64::from(different.trailing_zeros()))
}

/// Number of set bits. What is all clean costs what reading it costs.
pub fn pages_in(words: &[u64]) -> u64 {
    const AT_ONCE: usize = 8 * STRIPE_WORDS;
    let ones = |word: &u64| u64::from(word.count_ones());
    let some =
        words.chunks(AT_ONCE).filter(|words| words.iter().fold(0, |all, word| all | word) != 0);
    some.flatten().map(ones).sum()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pages::memory::{PAGE_BYTES, RegionLayout};

    fn layout(region_pages: &[u64]) -> Layout {
        let mut guest_addr = 0;
        let regions = region_pages.iter().map(|pages| {
            let region = RegionLayout {
                guest_addr,
                len_bytes: pages * PAGE_BYTES,
                backing_page_bytes: PAGE_BYTES,
            };
            guest_addr += region.len_bytes + PAGE_BYTES;
            region
        });
        Layout::new(regions.collect()).unwrap()
    }

    #[test]
    fn regions_start_at_words_of_their_own() {
        let mut bitmap = DirtyBitmap::new(&layout(&[1, 65, 64]));
        bitmap.set(1, 64);
        assert_eq!(bitmap.region_words(0), [0]);
        assert_eq!(bitmap.region_words(1), [0, 1]);
        assert_eq!(bitmap.region_words(2), [0]);
        assert!(bitmap.get(1, 64));
        assert_eq!(bitmap.count(), 1);
    }

    #[test]
    fn fill_marks_each_page_once_and_nothing_beyond() {
        let layout = layout(&[1, 65, 64, 127]);
        let bitmap = DirtyBitmap::all(&layout);
        assert_eq!(bitmap.count(), layout.pages());
    }

    proptest! {
        #[test]
        fn runs_are_the_set_bits_and_as_long_as_they_can_be(
            words in prop::collection::vec(
                prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..6,
            ),
        ) {
            let mut found = vec![0_u64; words.len()];
            let mut end_before = None;
            for run in runs(&words) {
                prop_assert!(run.start < run.end);
                prop_assert!(end_before.is_none_or(|end| end < run.start), "two that touch");
                end_before = Some(run.end);
                run.for_each(|bit| found[usize::try_from(bit / 64).unwrap()] |= 1 << (bit % 64));
            }
            prop_assert_eq!(found, words);
        }
    }

    #[test]
    fn words_merge_at_their_page() {
        let mut bitmap = DirtyBitmap::new(&layout(&[200]));
        bitmap.merge_words(0, 64, &[0b101]);
        assert!(bitmap.get(0, 64) && bitmap.get(0, 66) && !bitmap.get(0, 65));
    }
}
