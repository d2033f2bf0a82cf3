//! Guest memory for tests: anonymous mappings, all zero at first.
#![expect(unsafe_code, reason = "describes its own mappings by raw parts")]

use std::sync::Arc;

use memmap2::MmapRaw;

use super::Random;
use crate::memory::{GuestMemory, Layout, PAGE_BYTES, PageRange, RawRegion, RegionLayout};

/// Guest memory that a test owns.
#[derive(Debug, Clone)]
pub struct TestMemory {
    memory: Arc<GuestMemory>,
}

impl TestMemory {
    /// Regions of so many pages each, with gaps between them in guest addresses.
    ///
    /// # Panics
    ///
    /// If the machine gives no memory or the layout makes no sense.
    pub fn new(region_pages: &[u64]) -> Self {
        let mut guest_addr = 0;
        let regions: Vec<_> = region_pages
            .iter()
            .map(|pages| {
                let len_bytes = pages * PAGE_BYTES;
                let region = RegionLayout { guest_addr, len_bytes, backing_page_bytes: PAGE_BYTES };
                guest_addr += len_bytes + (1 << 30);
                region
            })
            .collect();
        Self::with_layout(&Layout::new(regions).expect("a test's layout makes sense"))
    }

    /// Memory of a given layout.
    ///
    /// # Panics
    ///
    /// If the machine gives no memory.
    pub fn with_layout(layout: &Layout) -> Self {
        let mappings: Vec<MmapRaw> = layout
            .regions()
            .iter()
            .map(|region| {
                let len = usize::try_from(region.len_bytes).expect("fits into the address space");
                memmap2::MmapMut::map_anon(len).expect("memory for a test").into()
            })
            .collect();
        let regions = layout
            .regions()
            .iter()
            .zip(&mappings)
            .map(|(layout, mapping)| RawRegion {
                layout: *layout,
                host_addr: mapping.as_mut_ptr(),
                file: None,
            })
            .collect();
        // SAFETY: the mappings are as long as the regions, readable and writable, owned by the
        // value as `owner`, and nobody makes references into a MmapRaw.
        let memory = unsafe { GuestMemory::from_raw_parts(regions, Some(Box::new(mappings))) };
        Self { memory: Arc::new(memory.expect("the layout was checked")) }
    }

    /// To hand to the engine or a transport.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Fills a page with bytes that depend on `seed`, none of them a run of zeros.
    ///
    /// # Panics
    ///
    /// If the page is not in the memory; so do the other methods.
    pub fn fill_page(&self, region: u16, page: u64, seed: u64) {
        let mut random = Random::new(seed ^ (page << 20) ^ (u64::from(region) << 60));
        let words = PAGE_BYTES / 8;
        let bytes: Vec<u8> =
            (0..words).flat_map(|_| (random.next_u64() | 1).to_le_bytes()).collect();
        self.write(region, page, &bytes);
    }

    /// Fills every page.
    pub fn fill(&self, seed: u64) {
        for (region, layout) in (0..).zip(self.memory.layout().regions()) {
            (0..layout.pages()).for_each(|page| self.fill_page(region, page, seed));
        }
    }

    /// Writes a whole page.
    pub fn write(&self, region: u16, page: u64, bytes: &[u8]) {
        let range = PageRange { region, first_page: page, pages: 1 };
        self.memory.copy_in(range, bytes).expect("a page of this memory");
    }

    /// The bytes of a page.
    pub fn read(&self, region: u16, page: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        let range = PageRange { region, first_page: page, pages: 1 };
        self.memory.copy_out(range, &mut bytes).expect("a page of this memory");
        bytes
    }

    /// The first page in which two memories of the same layout differ.
    pub fn first_difference(&self, other: &Self) -> Option<(u16, u64)> {
        (0..).zip(self.memory.layout().regions()).find_map(|(region, layout)| {
            (0..layout.pages())
                .find(|page| self.read(region, *page) != other.read(region, *page))
                .map(|page| (region, page))
        })
    }
}
