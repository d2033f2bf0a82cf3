//! `AtomicBitmapSource` over memory that a device writes to through `vm-memory`.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::suite::{self, Bench, Writer};
use pageferry::memory::{GuestMemory, PAGE_BYTES, PageRange};
use pageferry_rust_vmm::bitmap::BitmapError;
use pageferry_rust_vmm::{AtomicBitmapSource, guest_memory};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

const MIB: u64 = 1 << 20;

type Tracked = GuestMemoryMmap<AtomicBitmap>;
type MaybeTracked = GuestMemoryMmap<Option<AtomicBitmap>>;

/// A device of the VMM. Every other page is written across its middle, as a copy of many bytes.
struct Device<'m> {
    memory: &'m Tracked,
    ranges: Vec<PageRange>,
}

impl Writer for Device<'_> {
    fn ranges(&self) -> Vec<PageRange> {
        self.ranges.clone()
    }

    fn touch(&self, range: PageRange) {
        let region = self.memory.iter().nth(range.region.into()).unwrap();
        for page in range.first_page..range.first_page + u64::from(range.pages) {
            let addr = GuestAddress(region.start_addr().0 + page * PAGE_BYTES);
            let count: u32 = self.memory.load(addr, Ordering::Relaxed).unwrap();
            if page % 2 == 0 {
                self.memory.store(count.wrapping_add(1), addr, Ordering::Relaxed).unwrap();
            } else {
                self.memory
                    .write_slice(&[count.to_ne_bytes()[0].wrapping_add(1); 4096], addr)
                    .unwrap();
            }
        }
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

fn region(addr: u64, len_bytes: u64, bitmap: Option<u64>) -> GuestRegionMmap<Option<AtomicBitmap>> {
    let len_bytes = usize::try_from(len_bytes).unwrap();
    let page = |bytes| NonZeroUsize::new(usize::try_from(bytes).unwrap()).unwrap();
    let bitmap = bitmap.map(|page_bytes| AtomicBitmap::new(len_bytes, page(page_bytes)));
    let mapped = MmapRegionBuilder::new_with_bitmap(len_bytes, bitmap)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .build()
        .unwrap();
    GuestRegionMmap::new(mapped, GuestAddress(addr)).unwrap()
}

fn described<M>(memory: &Arc<M>) -> GuestMemory
where
    M: GuestMemoryBackend + Send + Sync + 'static,
    M::R: Send + Sync,
{
    guest_memory(Arc::clone(memory)).unwrap()
}

/// Two regions, the second of which is not a whole number of words or of larger pages.
fn passes_all(page_bytes: u64) {
    let page = NonZeroUsize::new(usize::try_from(page_bytes).unwrap()).unwrap();
    let regions = [(0, 4 * MIB), (16 * MIB, MIB + 5 * PAGE_BYTES)].map(|(addr, len_bytes)| {
        let len_bytes = usize::try_from(len_bytes).unwrap();
        let bitmap = AtomicBitmap::new(len_bytes, page);
        let mapped = MmapRegionBuilder::new_with_bitmap(len_bytes, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .build()
            .unwrap();
        GuestRegionMmap::new(mapped, GuestAddress(addr)).unwrap()
    });
    let memory = Arc::new(Tracked::from_regions(regions.into()).unwrap());
    let guest = described(&memory);
    let source = AtomicBitmapSource::new(Arc::clone(&memory), &guest).unwrap();
    let ranges = (0..).zip(guest.layout().regions()).map(|(region, layout)| PageRange {
        region,
        first_page: 3,
        pages: u32::try_from(layout.pages() - 8).unwrap(),
    });
    let writer = Device { memory: &memory, ranges: ranges.collect() };
    let granule_pages = (page_bytes / PAGE_BYTES).max(1);
    suite::passes_all(&Bench { memory: &guest, source: &source, writer: &writer, granule_pages });
}

#[test]
fn pages_of_4_kib() {
    passes_all(PAGE_BYTES);
}

#[test]
fn pages_of_64_kib() {
    passes_all(16 * PAGE_BYTES);
}

#[test]
fn pages_of_1_kib() {
    passes_all(1024);
}

#[test]
fn bitmaps_that_do_not_fit_are_refused() {
    let optional = |memory: &Arc<MaybeTracked>, guest: &GuestMemory| {
        AtomicBitmapSource::with_bitmaps(
            Arc::clone(memory),
            guest,
            |region: &GuestRegionMmap<Option<AtomicBitmap>>| (**region).bitmap().as_ref(),
        )
    };
    let memory = |regions: Vec<_>| Arc::new(MaybeTracked::from_regions(regions).unwrap());
    let good = memory(vec![region(0, MIB, Some(4096))]);
    let guest = described(&good);
    optional(&good, &guest).unwrap();

    let none = memory(vec![region(0, MIB, Some(4096)), region(MIB, MIB, None)]);
    let error = optional(&none, &described(&none)).unwrap_err();
    assert!(matches!(error, BitmapError::NoBitmap { guest_addr: MIB }), "{error}");
    let odd = memory(vec![region(0, MIB, Some(5000))]);
    let error = optional(&odd, &described(&odd)).unwrap_err();
    assert!(matches!(error, BitmapError::PageSize { .. }), "{error}");
    // The same addresses for the guest, but another mapping.
    let twin = memory(vec![region(0, MIB, Some(4096))]);
    let more = memory(vec![region(0, MIB, Some(4096)), region(MIB, MIB, Some(4096))]);
    for other in [&twin, &more] {
        let error = optional(other, &guest).unwrap_err();
        assert!(matches!(error, BitmapError::OtherMemory), "{error}");
    }
    let error = optional(&good, &described(&more)).unwrap_err();
    assert!(matches!(error, BitmapError::OtherMemory), "{error}");
}
