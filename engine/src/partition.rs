//! Who owns which page.
//!
//! The bitmap is cut into stripes of whole words, dealt out to the channels in turn. A stripe
//! belongs to one sender thread, so its words need no lock and no atomic, and its pages travel
//! on one channel in order: the newest bytes win without a barrier between rounds.

use crate::dirty::WORD_PAGES;
use crate::memory::Layout;

/// Bitmap words in a stripe: 2 MiB of guest memory, one huge page. A stripe at the end of a
/// region may be shorter; none spans regions.
pub const STRIPE_WORDS: usize = 8;

/// Whole bitmap words of one region that belong together.
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

/// The cut of one layout over a number of channels.
#[derive(Debug, Clone)]
pub struct Partition {
    region_words: Vec<usize>,
    channels: usize,
}

impl Partition {
    /// Deals the stripes of a layout out to `channels` channels.
    ///
    /// # Panics
    ///
    /// If `channels` is 0.
    pub fn new(layout: &Layout, channels: u16) -> Self {
        assert!(channels > 0, "a partition needs a channel");
        let words = |pages: u64| usize::try_from(pages.div_ceil(WORD_PAGES)).unwrap_or(usize::MAX);
        let region_words = layout.regions().iter().map(|region| words(region.pages())).collect();
        Self { region_words, channels: usize::from(channels) }
    }

    /// The stripes of a channel, in ascending order.
    pub fn stripes(&self, channel: u16) -> impl Iterator<Item = Stripe> + '_ {
        let channel = usize::from(channel);
        let mut stripes_before = 0;
        self.region_words.iter().zip(0_u16..).flat_map(move |(&words, region)| {
            let stripes = words.div_ceil(STRIPE_WORDS);
            // The first stripe of this region whose number over all regions is ours.
            let offset = (channel + self.channels - stripes_before % self.channels) % self.channels;
            stripes_before += stripes;
            (offset..stripes).step_by(self.channels).map(move |stripe| {
                let first_word = stripe * STRIPE_WORDS;
                Stripe { region, first_word, words: STRIPE_WORDS.min(words - first_word) }
            })
        })
    }

    /// Number of words a channel owns.
    pub fn words(&self, channel: u16) -> usize {
        self.stripes(channel).map(|stripe| stripe.words).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dirty::DirtyBitmap;
    use crate::memory::{PAGE_BYTES, RegionLayout};

    proptest! {
        #[test]
        fn every_word_belongs_to_one_channel(
            region_pages in prop::collection::vec(1_u64..5000, 1..5),
            channels in 1_u16..10,
        ) {
            let mut guest_addr = 0;
            let regions = region_pages.iter().map(|pages| {
                let len_bytes = pages * PAGE_BYTES;
                let region = RegionLayout { guest_addr, len_bytes, backing_page_bytes: PAGE_BYTES };
                guest_addr += len_bytes;
                region
            });
            let layout = Layout::new(regions.collect()).unwrap();
            let partition = Partition::new(&layout, channels);
            let mut owners = DirtyBitmap::new(&layout);
            let mut stripes_of = Vec::new();
            for channel in 0..channels {
                let mut words = 0;
                let mut count = 0_usize;
                for stripe in partition.stripes(channel) {
                    let mine = &mut owners.region_words_mut(stripe.region)
                        [stripe.first_word..stripe.first_word + stripe.words];
                    prop_assert!(mine.iter().all(|word| *word == 0), "two owners");
                    mine.fill(u64::MAX);
                    words += stripe.words;
                    count += 1;
                }
                prop_assert_eq!(words, partition.words(channel));
                stripes_of.push(count);
            }
            owners.trim();
            prop_assert_eq!(owners.count(), layout.pages());
            // Dealt out evenly.
            let spread = stripes_of.iter().max().unwrap() - stripes_of.iter().min().unwrap();
            prop_assert!(spread <= 1);
        }
    }
}
