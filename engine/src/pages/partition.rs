//! Who owns which page.
//!
//! The bitmap is cut into stripes of whole words, dealt out to the channels. A stripe belongs to
//! one sender thread, so its words need no lock and no atomic, and its pages travel on one
//! channel in order: the newest bytes win without a barrier between rounds. Another partition
//! takes effect by a fenced epoch only, see [`ledger`](crate::ledger).

use std::ops::Range;
use std::sync::Arc;

use crate::pages::dirty::{DirtyBitmap, STRIPE_WORDS, WORD_PAGES};
use crate::pages::memory::Layout;

/// Stripes that are dealt out together, where there are plenty: runs of pages get long, and threads
/// read lines of the bitmap apart from each other.
const MOST_AT_ONCE: u32 = 512;

/// How often a channel gets stripes, at least, where there are enough: what is dirty lies in
/// heaps, and each channel is to get its part of a heap.
const TURNS: u32 = 16;

/// Whole bitmap words of one region that belong together. At the end of a region it may be
/// shorter than others; none spans regions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stripe {
    /// The region.
    pub region: u16,
    /// Index of the first word in the region's words.
    pub first_word: usize,
    /// Number of words, 1 to [`STRIPE_WORDS`].
    pub words: usize,
}

impl Stripe {
    /// First page, counted from the start of the region.
    pub fn first_page(&self) -> u64 {
        self.first_word as u64 * WORD_PAGES
    }
}

/// The cut of one layout over a number of channels. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Partition {
    regions: Arc<[RegionStripes]>,
    owned: Arc<[Owned]>,
}

/// What a channel owns.
#[derive(Debug, Clone, Default)]
struct Owned {
    /// The numbers of its stripes over all regions, ascending.
    stripes: Vec<Range<u32>>,
    /// How many these are: there may be as many ranges as stripes.
    count: usize,
}

#[derive(Debug)]
struct RegionStripes {
    /// Number of the first stripe.
    first: u32,
    words: usize,
}

impl Partition {
    /// Deals the stripes of a layout out to `channels` channels in turn, a few at a time.
    ///
    /// # Panics
    ///
    /// If `channels` is 0.
    pub fn new(layout: &Layout, channels: u16) -> Self {
        Self::weighted(layout, &vec![1; usize::from(channels)], &DirtyBitmap::new(layout))
    }

    /// Deals the stripes out in shares of `weights`, one a channel, as evenly spread as they can
    /// be: with weights 3 and 1 every fourth turn is the second's. A channel of weight 0 gets none.
    ///
    /// Stripes with a dirty page and those without are dealt out apart: what is left of a round is
    /// shared by all, and so is memory as a whole in the rounds to come.
    ///
    /// # Panics
    ///
    /// If all weights are 0: somebody must own a page. If the bitmap is of another layout.
    pub fn weighted(layout: &Layout, weights: &[u32], dirty: &DirtyBitmap) -> Self {
        let mut count = 0;
        let regions = layout.regions().iter().map(|region| {
            let words = usize::try_from(region.pages().div_ceil(WORD_PAGES)).unwrap_or(usize::MAX);
            let first = count;
            // 2³² stripes are more than any address space holds.
            count += u32::try_from(words.div_ceil(STRIPE_WORDS)).unwrap_or(u32::MAX);
            RegionStripes { first, words }
        });
        let regions = regions.collect();
        let is_dirty: Vec<bool> = (0..)
            .take(layout.regions().len())
            .flat_map(|region| dirty.region_words(region).chunks(STRIPE_WORDS))
            .map(|stripe| stripe.iter().any(|word| *word != 0))
            .collect();
        let dirty_count = u32::try_from(is_dirty.iter().filter(|dirty| **dirty).count());
        let dirty_count = dirty_count.unwrap_or(u32::MAX);
        let mut dirty_to = Dealer::new(weights, dirty_count);
        let mut clean_to = Dealer::new(weights, count - dirty_count);
        let mut owned = vec![Owned::default(); weights.len()];
        for (number, is_dirty) in (0..count).zip(is_dirty) {
            let to = if is_dirty { dirty_to.next() } else { clean_to.next() };
            let Owned { stripes, count } = &mut owned[to];
            *count += 1;
            match stripes.last_mut().filter(|last| last.end == number) {
                Some(last) => last.end = number + 1,
                None => stripes.push(number..number + 1),
            }
        }
        Self { regions, owned: owned.into() }
    }

    /// Number of channels.
    pub fn channels(&self) -> u16 {
        u16::try_from(self.owned.len()).unwrap_or(u16::MAX)
    }

    /// The stripes of a channel, in ascending order.
    pub fn stripes(&self, channel: u16) -> impl Iterator<Item = Stripe> + '_ {
        self.owned(channel).iter().cloned().flatten().map(|number| self.stripe(number))
    }

    /// The numbers of a channel's stripes, ascending.
    pub(crate) fn owned(&self, channel: u16) -> &[Range<u32>] {
        self.owned.get(usize::from(channel)).map_or(&[], |owned| owned.stripes.as_slice())
    }

    /// Number of stripes of a channel.
    pub(crate) fn count(&self, channel: u16) -> usize {
        self.owned.get(usize::from(channel)).map_or(0, |owned| owned.count)
    }

    /// Number of stripes of all channels.
    pub(crate) fn total(&self) -> usize {
        self.owned.iter().map(|owned| owned.count).sum()
    }

    /// A stripe by its number over all regions.
    pub(crate) fn stripe(&self, number: u32) -> Stripe {
        let region = self.regions.partition_point(|region| region.first <= number) - 1;
        let RegionStripes { first, words } = self.regions[region];
        let first_word = (number - first) as usize * STRIPE_WORDS;
        Stripe {
            region: u16::try_from(region).unwrap_or(u16::MAX),
            first_word,
            words: STRIPE_WORDS.min(words - first_word),
        }
    }
}

/// Says to whom stripes go, one after the other.
struct Dealer<'a> {
    weights: &'a [u32],
    sum: i64,
    /// What each channel has saved up.
    credits: Vec<i64>,
    /// Stripes dealt out together, and how many of them are left.
    at_once: u32,
    left: u32,
    /// To whom they go.
    owner: usize,
}

impl<'a> Dealer<'a> {
    fn new(weights: &'a [u32], stripes: u32) -> Self {
        let sum: i64 = weights.iter().map(|weight| i64::from(*weight)).sum();
        assert!(sum > 0, "a partition needs a channel");
        let channels = u32::try_from(weights.len()).unwrap_or(u32::MAX);
        let at_once = (stripes / channels / TURNS).clamp(1, MOST_AT_ONCE);
        Self { weights, sum, credits: vec![0; weights.len()], at_once, left: 0, owner: 0 }
    }

    /// Each channel saves up its weight a turn; the richest takes the stripes and pays for them.
    fn next(&mut self) -> usize {
        if self.left == 0 {
            self.left = self.at_once;
            self.owner = 0;
            for (channel, weight) in self.weights.iter().enumerate() {
                self.credits[channel] += i64::from(*weight);
                if self.credits[channel] > self.credits[self.owner] {
                    self.owner = channel;
                }
            }
            self.credits[self.owner] -= self.sum;
        }
        self.left -= 1;
        self.owner
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pages::memory::{PAGE_BYTES, RegionLayout};

    proptest! {
        #[test]
        fn every_word_belongs_to_one_channel(
            region_pages in prop::collection::vec(1_u64..200_000, 1..5),
            weights in prop::collection::vec(0_u32..5, 1..10),
            heap in 0_u64..200_000,
        ) {
            let sum: u32 = weights.iter().sum();
            prop_assume!(sum > 0);
            let mut guest_addr = 0;
            let regions = region_pages.iter().map(|pages| {
                let len_bytes = pages * PAGE_BYTES;
                let region = RegionLayout { guest_addr, len_bytes, backing_page_bytes: PAGE_BYTES };
                guest_addr += len_bytes;
                region
            });
            let layout = Layout::new(regions.collect()).unwrap();
            let mut dirty = DirtyBitmap::new(&layout);
            (0..heap.min(region_pages[0])).for_each(|page| dirty.set(0, page));
            let partition = Partition::weighted(&layout, &weights, &dirty);
            let mut owners = DirtyBitmap::new(&layout);
            let all_stripes = partition.total();
            let dirty_stripes = usize::try_from(heap.min(region_pages[0]).div_ceil(512)).unwrap();
            for (channel, weight) in (0..).zip(&weights) {
                let mut counts = [0, 0];
                for stripe in partition.stripes(channel) {
                    let words = stripe.first_word..stripe.first_word + stripe.words;
                    let of_heap = dirty.region_words(stripe.region)[words.clone()]
                        .iter()
                        .any(|word| *word != 0);
                    counts[usize::from(of_heap)] += 1;
                    let mine = &mut owners.region_words_mut(stripe.region)[words];
                    prop_assert!(mine.iter().all(|word| *word == 0), "two owners");
                    mine.fill(u64::MAX);
                }
                prop_assert_eq!(counts.iter().sum::<u32>() as usize, partition.count(channel));
                // Dealt out as wanted, to a turn or two.
                for (count, stripes) in
                    counts.into_iter().zip([all_stripes - dirty_stripes, dirty_stripes])
                {
                    let wanted = stripes as f64 * f64::from(*weight) / f64::from(sum);
                    let turn = (stripes / weights.len() / 16).clamp(1, 512) as f64;
                    let off = (f64::from(count) - wanted).abs();
                    prop_assert!(off <= 2.0 * turn, "{count} where {wanted} are due");
                }
            }
            owners.trim();
            prop_assert_eq!(owners.count(), layout.pages());
        }
    }
}
