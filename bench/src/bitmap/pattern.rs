//! Which pages are dirty.

use pageferry::dirty::DirtyBitmap;
use serde::Serialize;

use crate::random::Random;

/// Dirty pages in a run, when they are clustered: a huge page.
const CLUSTER_PAGES: u64 = 512;

/// How dirty pages lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Pattern {
    /// All pages are alike: none or all are dirty.
    Uniform,
    /// In runs of [`CLUSTER_PAGES`].
    Clustered,
    /// One by one.
    Scattered,
}

impl Pattern {
    /// The patterns that make a difference.
    pub(super) fn of_share(share: f64) -> &'static [Self] {
        if share <= 0.0 || share >= 1.0 {
            &[Self::Uniform]
        } else {
            &[Self::Clustered, Self::Scattered]
        }
    }

    /// Marks about that share of pages, at random distances, and no other.
    pub(super) fn mark(self, bitmap: &mut DirtyBitmap, share: f64) {
        // Every word is written, so that all of the bitmap is memory of its own.
        bitmap.fill();
        if share >= 1.0 {
            return;
        }
        bitmap.clear();
        if share <= 0.0 {
            return;
        }
        let run_pages = if self == Self::Clustered { CLUSTER_PAGES } else { 1 };
        let pages = bitmap.region_pages(0);
        // From the begin of one run to that of the next, on average.
        let period = run_pages as f64 / share;
        // Evenly between nothing and twice the average, in 2⁻²⁰ pages.
        let gaps = 2.0 * (period - run_pages as f64) * f64::from(1 << 20);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "positive, and saturates"
        )]
        let gaps = gaps as u64;
        let mut random = Random::new(run_pages);
        // Exact: a page number in 2⁻²⁰, up to 2⁶⁰ of them.
        let mut at = random.below(gaps + 1);
        let words = bitmap.region_words_mut(0);
        while at >> 20 < pages {
            let first = at >> 20;
            let end = (first + run_pages).min(pages);
            mark_run(words, first, end);
            at += (run_pages << 20) + random.below(gaps + 1);
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Uniform => "",
            Self::Clustered => "clustered",
            Self::Scattered => "scattered",
        }
    }
}

fn mark_run(words: &mut [u64], first: u64, end: u64) {
    let mut page = first;
    while page < end {
        let bit = page % 64;
        let count = (64 - bit).min(end - page);
        let mask = u64::MAX >> (64 - count) << bit;
        if let Some(word) = usize::try_from(page / 64).ok().and_then(|word| words.get_mut(word)) {
            *word |= mask;
        }
        page += count;
    }
}

#[cfg(test)]
mod tests {
    use pageferry::memory::{Layout, PAGE_BYTES, RegionLayout};

    use super::*;

    fn bitmap(pages: u64) -> DirtyBitmap {
        let region = RegionLayout {
            guest_addr: 0,
            len_bytes: pages * PAGE_BYTES,
            backing_page_bytes: PAGE_BYTES,
        };
        DirtyBitmap::new(&Layout::new(vec![region]).unwrap())
    }

    #[test]
    fn about_that_share_is_marked() {
        let pages = 1 << 22;
        let mut bitmap = bitmap(pages);
        for share in [0.0, 0.001, 0.1, 0.9, 1.0] {
            for pattern in Pattern::of_share(share) {
                pattern.mark(&mut bitmap, share);
                let marked = bitmap.count() as f64 / pages as f64;
                assert!((marked - share).abs() <= share * 0.5, "{pattern:?} {share}: {marked}");
            }
        }
    }

    #[test]
    fn a_run_crosses_words_and_marks_nothing_else() {
        let mut words = [0; 3];
        mark_run(&mut words, 60, 130);
        assert_eq!(words, [0xf << 60, u64::MAX, 0b11]);
    }

    #[test]
    fn clusters_end_with_memory() {
        let mut bitmap = bitmap(100);
        Pattern::Clustered.mark(&mut bitmap, 0.99);
        assert!(bitmap.count() <= 100);
    }
}
