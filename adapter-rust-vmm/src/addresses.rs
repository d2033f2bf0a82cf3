//! Where guest memory is in a process.

use std::ops::Range;

use pageferry::memory::{GuestMemory, PAGE_BYTES, RawRegion};

/// Bytes given to one system call, so that the lock on the address space is let go now and then.
/// A multiple of every huge page size up to 1 GiB; larger ones are taken whole.
const CALL_BYTES: u64 = 1 << 30;

/// Addresses of a region in this process.
pub(crate) fn addresses(region: &RawRegion) -> Range<u64> {
    let start = region.host_addr.addr() as u64;
    start..start + region.layout.len_bytes
}

/// Guest memory that a process has mapped, all of a region or a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mapped {
    /// Index of the region.
    pub(crate) region: u16,
    /// Its page that is mapped at the first address.
    pub(crate) first_page: u64,
    /// Where, in that process.
    pub(crate) addresses: Range<u64>,
    /// Page size in bytes of the mapping.
    pub(crate) backing_page_bytes: u64,
    /// The region's guest address, for messages.
    pub(crate) guest_addr: u64,
}

impl Mapped {
    /// Its addresses, cut for one call each.
    pub(crate) fn call_ranges(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        cut(self.addresses.clone(), self.backing_page_bytes)
    }
}

/// All guest memory, as this process has it mapped.
pub(crate) fn mapped_here(memory: &GuestMemory) -> Vec<Mapped> {
    let regions = (0..).zip(memory.regions());
    let mapped = regions.map(|(region, raw)| Mapped {
        region,
        first_page: 0,
        addresses: addresses(raw),
        backing_page_bytes: raw.layout.backing_page_bytes,
        guest_addr: raw.layout.guest_addr,
    });
    mapped.collect()
}

/// A region's addresses, cut for one call each.
pub(crate) fn call_ranges(region: &RawRegion) -> impl Iterator<Item = Range<u64>> + use<> {
    cut(addresses(region), region.layout.backing_page_bytes)
}

fn cut(
    Range { start, end }: Range<u64>,
    backing_page_bytes: u64,
) -> impl Iterator<Item = Range<u64>> + use<> {
    let step = CALL_BYTES.max(backing_page_bytes);
    (0..(end - start).div_ceil(step)).map(move |call| {
        let first = start + call * step;
        first..end.min(first.saturating_add(step))
    })
}

/// `pages` of a region, extended to whole pages of its backing.
pub(crate) fn whole_pages(region: &RawRegion, pages: Range<u64>) -> Range<u64> {
    let backing = (region.layout.backing_page_bytes / PAGE_BYTES).max(1);
    let end = pages.end.next_multiple_of(backing).min(region.layout.pages());
    pages.start / backing * backing..end
}

/// Where pages of a region are in this process.
pub(crate) fn page_addresses(region: &RawRegion, pages: &Range<u64>) -> Range<u64> {
    let start = addresses(region).start;
    start + pages.start * PAGE_BYTES..start + pages.end * PAGE_BYTES
}

/// The region that has an address of this process, and the page of it.
pub(crate) fn page_at(memory: &GuestMemory, address: u64) -> Option<(u16, u64)> {
    (0..).zip(memory.regions()).find_map(|(index, region)| {
        let range = addresses(region);
        range.contains(&address).then(|| (index, (address - range.start) / PAGE_BYTES))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry::memory::RegionLayout;

    #[test]
    fn pages_are_extended_to_huge_ones() {
        let layout =
            RegionLayout { guest_addr: 0, len_bytes: 3 << 21, backing_page_bytes: 2 << 20 };
        let mut region = RawRegion { layout, host_addr: std::ptr::null_mut(), file: None };
        assert_eq!(whole_pages(&region, 511..513), 0..1024);
        assert_eq!(whole_pages(&region, 1535..1536), 1024..1536);
        region.layout.backing_page_bytes = PAGE_BYTES;
        assert_eq!(whole_pages(&region, 511..513), 511..513);
    }
}
