//! Where guest memory is in a process.

use std::ops::Range;

use pageferry::memory::{GuestMemory, RawRegion};

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
