//! Pages that were put back: carried over into the next harvests until they are re-armed.

use std::sync::atomic::{AtomicBool, Ordering};

use pageferry::dirty::DirtyBitmap;
use pageferry::memory::Layout;

use crate::misuse::{MisuseError, check_bitmap, check_words};
use crate::pages::AtomicPages;

/// A bit for each page of guest memory, laid out like the engine's bitmap.
///
/// # Thread safety
///
/// [`rearmed`](Self::rearmed) may run in several threads at once. Relaxed atomics are enough:
/// the engine orders harvest and put-back before and after re-arming, and threads that re-arm at
/// the same time do so for different words.
#[derive(Debug)]
pub(crate) struct CarryOver {
    layout: Layout,
    pages: AtomicPages,
    /// Whether a bit may be set. Spares the common migration, which puts nothing back, a walk
    /// over the words with each stripe.
    used: AtomicBool,
}

impl CarryOver {
    pub(crate) fn new(layout: &Layout) -> Self {
        Self {
            layout: layout.clone(),
            pages: AtomicPages::new(layout),
            used: AtomicBool::new(false),
        }
    }

    /// Takes pages back.
    pub(crate) fn put_back(&self, pages: &DirtyBitmap) -> Result<(), MisuseError> {
        check_bitmap(&self.layout, pages)?;
        self.pages.add(pages);
        self.used.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Adds the carried pages to a harvest. They stay carried until they are re-armed.
    pub(crate) fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), MisuseError> {
        check_bitmap(&self.layout, into)?;
        if !self.used.load(Ordering::Relaxed) {
            return Ok(());
        }
        let any = self.pages.merge_into(into);
        self.used.store(any, Ordering::Relaxed);
        Ok(())
    }

    /// Forgets pages that are being re-armed.
    pub(crate) fn rearmed(
        &self,
        region: u16,
        first_page: u64,
        words: &[u64],
    ) -> Result<(), MisuseError> {
        check_words(&self.layout, region, first_page, words)?;
        if !self.used.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.pages.clear(region, first_page, words);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry::memory::{PAGE_BYTES, RegionLayout};

    fn layout(pages: &[u64]) -> Layout {
        let mut guest_addr = 0;
        let regions = pages.iter().map(|pages| {
            let len_bytes = pages * PAGE_BYTES;
            let region = RegionLayout { guest_addr, len_bytes, backing_page_bytes: PAGE_BYTES };
            guest_addr += len_bytes;
            region
        });
        Layout::new(regions.collect()).unwrap()
    }

    #[test]
    fn carried_pages_are_harvested_until_rearmed() {
        let layout = layout(&[70, 130]);
        let carry = CarryOver::new(&layout);
        let mut pages = DirtyBitmap::new(&layout);
        pages.set(0, 69);
        pages.set(1, 128);
        carry.put_back(&pages).unwrap();
        for _ in 0..2 {
            let mut into = DirtyBitmap::new(&layout);
            carry.harvest(&mut into).unwrap();
            assert_eq!(into, pages);
        }
        carry.rearmed(1, 128, &[1]).unwrap();
        let mut into = DirtyBitmap::new(&layout);
        carry.harvest(&mut into).unwrap();
        assert!(into.get(0, 69) && !into.get(1, 128));
    }

    #[test]
    fn foreign_bitmaps_and_ranges_are_refused() {
        let carry = CarryOver::new(&layout(&[70, 130]));
        let mut foreign = DirtyBitmap::new(&layout(&[70]));
        assert_eq!(carry.put_back(&foreign), Err(MisuseError::OtherLayout));
        assert_eq!(carry.harvest(&mut foreign), Err(MisuseError::OtherLayout));
        for (region, first_page, words) in [(2, 0, 1), (0, 1, 1), (0, 0, 3), (0, 192, 1)] {
            let refused = carry.rearmed(region, first_page, &vec![1; words]);
            assert_eq!(refused, Err(MisuseError::OutOfRange { region, first_page, words }));
        }
        let overflow = carry.rearmed(0, u64::MAX - 63, &[1, 1]);
        assert!(matches!(overflow, Err(MisuseError::OutOfRange { .. })));
    }
}
