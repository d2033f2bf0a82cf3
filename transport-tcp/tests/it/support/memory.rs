//! Guest memory for tests.

use std::sync::Arc;

use pageferry::memory::{GuestMemory, PageRange};
use pageferry::testing::TestMemory;

use super::Random;

/// Zeroed guest memory with regions of so many pages, with gaps between them.
pub(crate) fn guest_memory(region_pages: &[u64]) -> Arc<GuestMemory> {
    Arc::clone(TestMemory::new(region_pages).memory())
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
        let bytes: Vec<u8> = (0..words).flat_map(|_| random.next_u64().to_le_bytes()).collect();
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
