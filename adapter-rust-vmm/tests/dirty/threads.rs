//! Writers that need no guest: threads of this process.
#![expect(unsafe_code, reason = "guest memory is written by raw pointer")]

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::suite::Writer;
use pageferry::memory::{GuestMemory, PageRange};

/// Threads of this process.
pub(crate) struct Threads<'m> {
    pub(crate) memory: &'m GuestMemory,
    pub(crate) ranges: Vec<PageRange>,
}

impl Threads<'_> {
    pub(crate) fn add_one(&self, region: u16, page: u64) {
        let span = self.memory.span(PageRange { region, first_page: page, pages: 1 }).unwrap();
        // SAFETY: the start of a page of guest memory: aligned, mapped, and everyone else here
        // accesses it by volatile loads.
        let counter = unsafe { AtomicU32::from_ptr(span.addr.cast()) };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

impl Writer for Threads<'_> {
    fn ranges(&self) -> Vec<PageRange> {
        self.ranges.clone()
    }

    fn touch(&self, range: PageRange) {
        let end = range.first_page + u64::from(range.pages);
        (range.first_page..end).for_each(|page| self.add_one(range.region, page));
    }

    fn hammer(&self, stop: &AtomicBool) {
        loop {
            self.ranges.iter().for_each(|range| self.touch(*range));
            if stop.load(Ordering::Relaxed) {
                return;
            }
        }
    }
}
