//! Where guest memory is in this process.

use std::ops::Range;

use pageferry::memory::RawRegion;

/// Bytes given to one system call, so that the lock on the address space is let go now and then.
/// A multiple of every huge page size up to 1 GiB; larger ones are taken whole.
const CALL_BYTES: u64 = 1 << 30;

/// Addresses of a region in this process.
pub(crate) fn addresses(region: &RawRegion) -> Range<u64> {
    let start = region.host_addr.addr() as u64;
    start..start + region.layout.len_bytes
}

/// A region's addresses, cut for one call each.
pub(crate) fn call_ranges(region: &RawRegion) -> impl Iterator<Item = Range<u64>> + use<> {
    let Range { start, end } = addresses(region);
    let step = CALL_BYTES.max(region.layout.backing_page_bytes);
    (0..region.layout.len_bytes.div_ceil(step)).map(move |call| {
        let first = start + call * step;
        first..end.min(first.saturating_add(step))
    })
}
