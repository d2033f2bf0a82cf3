//! Whether the pages that landed are those that were sent, where what carries them does not make sure of it.
//!
//! Both sides keep a checksum of each page: the source of what it is about to send, the destination of what has
//! landed. A page that the guest writes meanwhile has another one at each side; but it is dirty then, and sent again.
//! So once the guest stands still and all has landed the two tables are equal, unless something was changed on the way. Neither is compared page by page: the checksums of a *chunk* of pages are added up as they
//! change, each mixed with its page's number, and what is compared is one number a chunk. What differs is sent again.
//!
//! It costs a look at each page at both sides, while it is in their caches, and four bytes for each page.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::pages::memory::{GuestMemory, Layout, OutOfRange, PageRange, RegionLayout};

/// Most chunks of a guest, however large.
pub const MAX_CHUNKS: u64 = 1024;

/// Fewest pages of a chunk.
const LEAST_CHUNK_PAGES: u64 = 64;

/// CRC-32 of a page. A page that was never mentioned is zero, and stands for nothing.
const NEVER_SENT: u32 = 0;

/// How many chunks a guest has.
pub fn chunk_count(layout: &Layout) -> usize {
    let chunks = pages(layout).div_ceil(chunk_pages(layout));
    usize::try_from(chunks).unwrap_or(usize::MAX)
}

fn pages(layout: &Layout) -> u64 {
    layout.regions().iter().map(RegionLayout::pages).sum()
}

fn chunk_pages(layout: &Layout) -> u64 {
    pages(layout).div_ceil(MAX_CHUNKS).max(LEAST_CHUNK_PAGES)
}

/// Checksums of all pages of a guest, as one side knows them. Used by its threads at once, each for pages that no other
/// one has at that time.
#[derive(Debug)]
pub struct PageSums {
    /// The number of each region's first page, over all regions.
    begins: Vec<u64>,
    all_pages: u64,
    chunk_pages: u64,
    pages: Box<[AtomicU32]>,
    chunks: Box<[AtomicU64]>,
}

impl PageSums {
    /// Of a guest of which nothing was sent.
    pub fn new(layout: &Layout) -> Self {
        let begins = layout.regions().iter().scan(0, |next, region| {
            let begin = *next;
            *next += region.pages();
            Some(begin)
        });
        let all_pages = pages(layout);
        let pages = usize::try_from(all_pages).unwrap_or(usize::MAX);
        Self {
            begins: begins.collect(),
            all_pages,
            chunk_pages: chunk_pages(layout),
            pages: (0..pages).map(|_| AtomicU32::new(NEVER_SENT)).collect(),
            chunks: (0..chunk_count(layout)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Takes in what is in these pages now. `copy` is room for one of them.
    pub fn note_data(
        &self,
        memory: &GuestMemory,
        range: PageRange,
        copy: &mut Vec<u8>,
    ) -> Result<(), OutOfRange> {
        for page in range.first_page..range.first_page + u64::from(range.pages) {
            let sum = sum_of(memory, range.region, page, copy)?;
            self.put(range.region, page, sum);
        }
        Ok(())
    }

    /// These pages are zero there by now, or will be.
    pub fn note_zero(&self, range: PageRange) {
        for page in range.first_page..range.first_page + u64::from(range.pages) {
            self.put(range.region, page, NEVER_SENT);
        }
    }

    fn put(&self, region: u16, page: u64, sum: u32) {
        // What is no page of this layout is none of guest memory either, and was refused.
        let Some(begin) = self.begins.get(usize::from(region)) else { return };
        let page = begin + page;
        let place = usize::try_from(page).ok().and_then(|page| self.pages.get(page));
        let Some(place) = place else { return };
        let before = place.swap(sum, Ordering::Relaxed);
        if before != sum {
            let change = mixed(page, sum).wrapping_sub(mixed(page, before));
            let chunk = usize::try_from(page / self.chunk_pages).unwrap_or(0);
            self.chunks[chunk].fetch_add(change, Ordering::Relaxed);
        }
    }

    /// One number a chunk. All that was noted before is in it if whoever noted it has said so since, or the other side
    /// knows of it: word of that comes by way of the kernel, as guest memory's own bytes do.
    pub fn chunks(&self) -> Vec<u64> {
        self.chunks.iter().map(|chunk| chunk.load(Ordering::Relaxed)).collect()
    }

    /// The pages of chunks that are otherwise at the other side, in order.
    pub fn differing(&self, there: &[u64]) -> Vec<PageRange> {
        let mut ranges = Vec::new();
        let here = self.chunks();
        let differ = (0..).zip(here.iter().zip(there)).filter(|(_, (here, there))| here != there);
        for (chunk, _) in differ {
            let begin: u64 = chunk * self.chunk_pages;
            self.ranges(begin, (begin + self.chunk_pages).min(self.all_pages), &mut ranges);
        }
        ranges
    }

    /// Pages by their numbers as ranges of regions.
    fn ranges(&self, begin: u64, end: u64, into: &mut Vec<PageRange>) {
        let ends = self.begins.iter().skip(1).chain([&self.all_pages]);
        for (region, (first, next)) in (0..).zip(self.begins.iter().zip(ends)) {
            let (from, to) = (begin.max(*first), end.min(*next));
            if from < to {
                let pages = u32::try_from(to - from).unwrap_or(u32::MAX);
                into.push(PageRange { region, first_page: from - first, pages });
            }
        }
    }
}

/// Draws pages at random, of those that are `wanted`; at most so many, in order and none twice. Where few are wanted it
/// finds fewer of them.
pub(crate) fn draw(
    layout: &Layout,
    most: usize,
    mut seed: u64,
    mut is_wanted: impl FnMut(u16, u64) -> bool,
) -> Vec<(u16, u64)> {
    const TRIES_FOR_EACH: usize = 16;
    let all = pages(layout).max(1);
    let mut drawn = BTreeSet::new();
    for _ in 0..most * TRIES_FOR_EACH {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut page = finalized(seed) % all;
        for (region, of_region) in (0..).zip(layout.regions()) {
            if page < of_region.pages() {
                if is_wanted(region, page) {
                    drawn.insert((region, page));
                }
                break;
            }
            page -= of_region.pages();
        }
        if drawn.len() == most {
            break;
        }
    }
    drawn.into_iter().collect()
}

/// The checksum of a page as it is now.
pub(crate) fn sum_of(
    memory: &GuestMemory,
    region: u16,
    first_page: u64,
    copy: &mut Vec<u8>,
) -> Result<u32, OutOfRange> {
    // Others write to it meanwhile, so it cannot be looked at as a slice.
    memory.copy_out(PageRange { region, first_page, pages: 1 }, copy)?;
    Ok(crc32fast::hash(copy))
}

/// What a page's checksum adds to its chunk: nothing for a page that is zero. So that pages that have changed places
/// are found, and two changes do not make up for each other.
fn mixed(page: u64, sum: u32) -> u64 {
    if sum == NEVER_SENT {
        return 0;
    }
    finalized(page.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (u64::from(sum) << 32) ^ u64::from(sum))
}

/// The finalizer of SplitMix64.
fn finalized(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pages::memory::PAGE_BYTES;
    use crate::testing::TestMemory;

    fn layout(regions: &[u64]) -> Layout {
        let region = |(index, pages): (usize, &u64)| RegionLayout {
            guest_addr: (index as u64) << 40,
            len_bytes: pages * PAGE_BYTES,
            backing_page_bytes: PAGE_BYTES,
        };
        Layout::new(regions.iter().enumerate().map(region).collect()).unwrap()
    }

    #[test]
    fn chunks_are_few_and_cover_all_pages() {
        for (regions, chunks) in [
            (&[1][..], 1),
            (&[64], 1),
            (&[65], 2),
            (&[64, 64], 2),
            (&[MAX_CHUNKS * 64], 1024),
            (&[MAX_CHUNKS * 64 + 1], 1009),
            (&[1 << 28], 1024),
        ] {
            assert_eq!(chunk_count(&layout(regions)), chunks, "{regions:?}");
        }
        let sums = PageSums::new(&layout(&[100, 30]));
        let other: Vec<u64> = sums.chunks().iter().map(|chunk| chunk + 1).collect();
        let range = |region, first_page, pages| PageRange { region, first_page, pages };
        let all = [range(0, 0, 64), range(0, 64, 36), range(1, 0, 28), range(1, 28, 2)];
        assert_eq!(sums.differing(&other), all);
        let last = [other[..2].iter().map(|it| it - 1).collect(), other[2..].to_vec()].concat();
        assert_eq!(sums.differing(&last), all[3..]);
        assert!(sums.differing(&sums.chunks()).is_empty());
    }

    #[test]
    fn a_bit_and_a_place_make_a_difference() {
        let (here, there) = (TestMemory::new(&[200]), TestMemory::new(&[200]));
        let noted = |memory: &TestMemory| {
            let sums = PageSums::new(memory.memory().layout());
            let all = PageRange { region: 0, first_page: 0, pages: 200 };
            sums.note_data(memory.memory(), all, &mut Vec::new()).unwrap();
            sums
        };
        here.fill(1);
        there.fill(1);
        assert_eq!(noted(&here).chunks(), noted(&there).chunks());
        let mut page = Vec::new();
        let at = |first_page| PageRange { region: 0, first_page, pages: 1 };
        there.memory().copy_out(at(70), &mut page).unwrap();
        page[4095] ^= 0x80;
        there.memory().copy_in(at(70), &page).unwrap();
        let differing = noted(&there).differing(&noted(&here).chunks());
        assert_eq!(differing, [PageRange { region: 0, first_page: 64, pages: 64 }]);
        // Two pages of one chunk that have changed places.
        there.fill(1);
        let (mut one, mut other) = (Vec::new(), Vec::new());
        there.memory().copy_out(at(3), &mut one).unwrap();
        there.memory().copy_out(at(4), &mut other).unwrap();
        there.memory().copy_in(at(3), &other).unwrap();
        there.memory().copy_in(at(4), &one).unwrap();
        assert_eq!(noted(&there).differing(&noted(&here).chunks()).len(), 1);
    }

    #[test]
    fn pages_are_drawn_from_all_that_are_wanted() {
        let layout = layout(&[10, 300]);
        let drawn = draw(&layout, 64, 1, |_, _| true);
        assert!(drawn.len() == 64 && drawn.is_sorted());
        assert!(drawn.iter().all(|(region, page)| *page < [10, 300][usize::from(*region)]));
        assert!(
            (0..20).any(|seed| draw(&layout, 64, seed, |_, _| true).iter().any(|(r, _)| *r == 0))
        );
        let even = draw(&layout, 256, 2, |_, page| page % 2 == 0);
        assert!(even.len() > 100 && even.iter().all(|(_, page)| page % 2 == 0));
        assert!(draw(&layout, 256, 3, |_, _| false).is_empty());
    }

    /// What a page costs at each side.
    #[test]
    #[ignore = "prints times and checks nothing: ci/test measure"]
    fn measure_sums_of_pages() {
        const PAGES: u32 = 64;
        let memory = TestMemory::new(&[PAGES.into()]);
        memory.fill(1);
        let sums = PageSums::new(memory.memory().layout());
        let range = PageRange { region: 0, first_page: 0, pages: PAGES };
        for _ in 0..3 {
            let (mut copy, began) = (Vec::new(), std::time::Instant::now());
            for _ in 0..4096 {
                sums.note_data(memory.memory(), range, &mut copy).unwrap();
            }
            let pages = f64::from(PAGES) * 4096.0;
            let each = began.elapsed().as_secs_f64() / pages;
            eprintln!("{:.0} ns a page, {:.1} GB/s", each * 1e9, 4096.0 / each / 1e9);
        }
    }

    proptest! {
        /// However it came to be what it is: what counts is the last word on each page.
        #[test]
        fn what_was_noted_last_counts(
            before in prop::collection::vec((0..130_u64, any::<u32>()), 0..200),
            last in prop::collection::btree_map(0..130_u64, any::<u32>(), 0..130),
        ) {
            let (here, there) = (PageSums::new(&layout(&[130])), PageSums::new(&layout(&[130])));
            for (page, sum) in &before {
                here.put(0, *page, *sum);
            }
            for page in 0..130 {
                let sum = last.get(&page).copied().unwrap_or(NEVER_SENT);
                here.put(0, page, sum);
                if sum != NEVER_SENT {
                    there.put(0, page, sum);
                }
            }
            prop_assert_eq!(here.chunks(), there.chunks());
        }
    }
}
