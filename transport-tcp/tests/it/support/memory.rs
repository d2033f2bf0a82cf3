//! Guest memory for tests: anonymous mappings.
#![expect(unsafe_code, reason = "GuestMemory is described by raw pointers into mappings")]

use std::sync::Arc;

use memmap2::{MmapMut, MmapOptions};
use pageferry::memory::{GuestMemory, PAGE_BYTES, PageRange, RawRegion, RegionLayout};

use super::Random;

/// Zeroed guest memory with regions of so many pages, with gaps between them.
pub(crate) fn guest_memory(region_pages: &[u64]) -> Arc<GuestMemory> {
    let mut mappings = Vec::new();
    let mut regions = Vec::new();
    let mut guest_addr = 0;
    for pages in region_pages {
        let len_bytes = pages * PAGE_BYTES;
        let mut mapping: MmapMut =
            MmapOptions::new().len(usize::try_from(len_bytes).unwrap()).map_anon().unwrap();
        regions.push(RawRegion {
            layout: RegionLayout { guest_addr, len_bytes, backing_page_bytes: PAGE_BYTES },
            host_addr: mapping.as_mut_ptr(),
            file: None,
        });
        mappings.push(mapping);
        guest_addr += len_bytes + (1 << 30);
    }
    // SAFETY: each region is a whole anonymous mapping, which the value owns from here on.
    // Nobody can make a reference into it any more.
    let memory = unsafe { GuestMemory::from_raw_parts(regions, Some(Box::new(mappings))) };
    Arc::new(memory.unwrap())
}

/// Every page of a region.
pub(crate) fn whole_regions(memory: &GuestMemory) -> impl Iterator<Item = PageRange> {
    memory.layout().regions().iter().zip(0..).map(|(layout, region)| PageRange {
        region,
        first_page: 0,
        pages: u32::try_from(layout.pages()).unwrap(),
    })
}

pub(crate) fn bytes_of(memory: &GuestMemory, range: PageRange) -> Vec<u8> {
    let mut bytes = Vec::new();
    memory.copy_out(range, &mut bytes).unwrap();
    bytes
}

/// Fills all memory with noise.
pub(crate) fn fill(memory: &GuestMemory, random: &mut Random) {
    for range in whole_regions(memory) {
        let words = range.len_bytes() / 8;
        let bytes: Vec<u8> = (0..words).flat_map(|_| random.next().to_le_bytes()).collect();
        memory.copy_in(range, &bytes).unwrap();
    }
}

pub(crate) fn assert_same(left: &GuestMemory, right: &GuestMemory) {
    for range in whole_regions(left) {
        // Not assert_eq: nobody wants to read both memories.
        assert!(bytes_of(left, range) == bytes_of(right, range), "region {} differs", range.region);
    }
}

pub(crate) fn assert_untouched(memory: &GuestMemory) {
    for range in whole_regions(memory) {
        assert!(bytes_of(memory, range).iter().all(|&byte| byte == 0));
    }
}
