//! How far ahead of the page that is read a sender re-arms.
//!
//! Re-arming costs by the call, more than by the page: KVM takes a lock of the whole VM and has all
//! its vCPUs flush their TLBs, once a call. So a sender re-arms many stripes at once. But a page that is
//! re-armed long before it is read is written meanwhile, and has to be sent again. So they are as
//! many as it gets through in [`AHEAD`], by its speed so far: a round is longer than that
//! by far, and what is written so often comes again in any case.
//!
//! Nothing is promised by it: pages stay dirty in the ledger until their stripe is done. Who stops
//! in the middle, asked back or broken, leaves pages that are armed and dirty; whoever has their
//! stripe next re-arms them once more.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::pages::dirty::{DirtyError, DirtySources, STRIPE_WORDS, WORD_PAGES};
use crate::pages::ledger::Share;
use crate::pages::partition::Stripe;

/// How long before it is read a page is re-armed, about.
const AHEAD: Duration = Duration::from_millis(10);

/// Dirty pages that are re-armed at once, at most, 16 MiB: as long as that takes, KVM holds a lock that
/// vCPUs wait for.
const MOST_PAGES: u64 = 4096;

/// Pages of a stripe: fewer are never re-armed at once, if they are dirty.
const STRIPE_PAGES: u64 = STRIPE_WORDS as u64 * WORD_PAGES;

/// Words of the bitmap that are looked through for them, at most: those of 4 GiB.
const MOST_WORDS: usize = 16 << 10;

/// A sender's re-arming.
#[derive(Debug)]
pub(crate) struct Ahead {
    /// Dirty pages to re-arm at once.
    most_pages: u64,
    /// What is armed of the round's stripes, to the last one that is: a region and its pages.
    armed: (u16, Range<u64>),
    /// When that was, and how many dirty pages it was.
    last: Option<(Instant, u64)>,
    words: Vec<u64>,
}

impl Ahead {
    pub(crate) fn new() -> Self {
        Self {
            most_pages: STRIPE_PAGES,
            armed: (0, 0..0),
            last: None,
            words: Vec::with_capacity(MOST_WORDS),
        }
    }

    /// A share begins: nothing of it is armed.
    pub(crate) fn begin(&mut self) {
        self.armed = (0, 0..0);
        self.last = None;
    }

    /// Sees to it that the stripe is armed which the share gave last.
    pub(crate) fn rearm(
        &mut self,
        stripe: Stripe,
        share: &Share,
        sources: &DirtySources,
    ) -> Result<(), DirtyError> {
        let (region, pages) = &self.armed;
        if *region == stripe.region && pages.contains(&stripe.first_page()) {
            return Ok(());
        }
        let now = Instant::now();
        if let Some((then, pages)) = self.last {
            self.learn(pages, now - then);
        }
        let pages = share.look_ahead(self.most_pages, MOST_WORDS, &mut self.words);
        let first_page = stripe.first_page();
        sources.rearm(stripe.region, first_page, &self.words)?;
        let end_page = first_page + self.words.len() as u64 * WORD_PAGES;
        self.armed = (stripe.region, first_page..end_page);
        self.last = Some((now, pages));
        Ok(())
    }

    /// So many pages took so long.
    fn learn(&mut self, pages: u64, took: Duration) {
        let fits = u128::from(pages) * AHEAD.as_nanos() / took.as_nanos().max(1);
        let fits = u64::try_from(fits).unwrap_or(u64::MAX);
        // What goes into empty buffers goes fast: not more than twice as many.
        self.most_pages = fits.min(self.most_pages * 2).clamp(1, MOST_PAGES);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::pages::dirty::{DirtyBitmap, DirtySource};
    use crate::pages::ledger::Ledger;
    use crate::pages::memory::{Layout, PAGE_BYTES, RegionLayout};
    use crate::pages::partition::Partition;

    fn layout(regions: &[u64]) -> Layout {
        let mut guest_addr = 0;
        let regions = regions.iter().map(|pages| {
            let len_bytes = pages * PAGE_BYTES;
            let region = RegionLayout { guest_addr, len_bytes, backing_page_bytes: PAGE_BYTES };
            guest_addr += len_bytes;
            region
        });
        Layout::new(regions.collect()).unwrap()
    }

    /// Notes what is re-armed.
    struct Noted {
        armed: Arc<Mutex<(u64, DirtyBitmap)>>,
    }

    impl DirtySource for Noted {
        fn name(&self) -> &'static str {
            "noted"
        }

        fn start(&self) -> Result<(), DirtyError> {
            Ok(())
        }

        fn harvest(&self, _: &mut DirtyBitmap) -> Result<(), DirtyError> {
            Ok(())
        }

        fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
            let (calls, armed) = &mut *self.armed.lock().unwrap();
            *calls += 1;
            armed.merge_words(region, first_page, words);
            Ok(())
        }

        fn put_back(&self, _: &DirtyBitmap) -> Result<(), DirtyError> {
            Ok(())
        }

        fn stop(&self) -> Result<(), DirtyError> {
            Ok(())
        }
    }

    fn noted(layout: &Layout) -> (DirtySources, Arc<Mutex<(u64, DirtyBitmap)>>) {
        let armed = Arc::new(Mutex::new((0, DirtyBitmap::new(layout))));
        let noted = Noted { armed: Arc::clone(&armed) };
        (DirtySources::new(vec![Box::new(noted)]), armed)
    }

    /// A page of each stripe of two regions, which two channels have in turn: all are armed
    /// before they are read, each channel's by its own calls, and these are few.
    #[test]
    fn scattered_pages_are_armed_by_few_calls() {
        let layout = layout(&[64 * 512, 32 * 512 + 65]);
        let (sources, armed) = noted(&layout);
        let mut ledger = Ledger::new(&layout);
        ledger.dirty.clear();
        for (region, stripes) in [(0, 64), (1, 33)] {
            (0..stripes).for_each(|stripe| ledger.dirty.set(region, stripe * 512 + stripe % 64));
        }
        let all = ledger.dirty.clone();
        let (loan, mut shares) = ledger.lend(&Partition::new(&layout, 2));
        let mut ahead = Ahead::new();
        for share in &mut shares {
            ahead.begin();
            while let Some((stripe, bits)) = share.next_dirty() {
                ahead.rearm(stripe, share, &sources).unwrap();
                let armed = &armed.lock().unwrap().1;
                let words = &armed.region_words(stripe.region)[stripe.first_word..];
                assert!(words.iter().zip(&bits).all(|(armed, dirty)| armed & dirty == *dirty));
                share.done();
            }
        }
        drop((shares, loan));
        let (calls, armed) = &*armed.lock().unwrap();
        assert_eq!(*armed, all);
        assert_eq!(*calls, 4, "one for each channel and region");
    }

    /// What was armed ahead and not done is dirty, and armed again by whoever comes next.
    #[test]
    fn who_stops_in_the_middle_leaves_it_dirty() {
        let layout = layout(&[16 * 512]);
        let (sources, armed) = noted(&layout);
        let mut ledger = Ledger::new(&layout);
        ledger.dirty.clear();
        (0..16).for_each(|stripe| ledger.dirty.set(0, stripe * 512));
        let mut left = ledger.dirty.clone();
        let (loan, mut shares) = ledger.lend(&Partition::new(&layout, 1));
        let mut ahead = Ahead::new();
        ahead.begin();
        let (stripe, _) = shares[0].next_dirty().unwrap();
        ahead.rearm(stripe, &shares[0], &sources).unwrap();
        assert_eq!(armed.lock().unwrap().1, left, "all at once");
        shares[0].done();
        left.region_words_mut(0)[0] = 0;
        drop(shares);
        let ledger = loan.take_back().unwrap();
        assert_eq!(ledger.dirty, left);
        armed.lock().unwrap().1.clear();
        let (_loan, mut shares) = ledger.lend(&Partition::new(&layout, 1));
        ahead.begin();
        let (stripe, _) = shares[0].next_dirty().unwrap();
        ahead.rearm(stripe, &shares[0], &sources).unwrap();
        assert_eq!(armed.lock().unwrap().1, left);
    }

    #[test]
    fn a_slow_sender_does_not_arm_far_ahead() {
        let mut ahead = Ahead::new();
        for expected in [1024, 2048, 4096, 4096] {
            ahead.learn(ahead.most_pages, Duration::ZERO);
            assert_eq!(ahead.most_pages, expected);
        }
        // 100 pages in a second, one in ten milliseconds.
        ahead.learn(100, Duration::from_secs(1));
        assert_eq!(ahead.most_pages, 1);
        ahead.learn(0, Duration::from_secs(1));
        assert_eq!(ahead.most_pages, 1);
        ahead.learn(300, AHEAD);
        assert_eq!(ahead.most_pages, 2);
    }
}
