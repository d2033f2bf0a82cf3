//! Guest memory of a rust-vmm VMM, described to the engine.
#![expect(unsafe_code, reason = "raw parts of vm-memory regions are handed to the engine")]

mod backing;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use pageferry::memory::{
    FileBacking, GuestMemory, LayoutError, PAGE_BYTES, RawRegion, RegionLayout,
};
use thiserror::Error;
use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, MemoryRegionAddress,
};

/// Why memory held by `vm-memory` cannot be given to the engine.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// A region has no host address: it is not memory mapped in this process.
    #[error("failed to get the host address of the region at guest address {guest_addr:#x}")]
    NoHostAddress {
        /// The region's guest physical address.
        guest_addr: u64,
        /// What `vm-memory` said.
        #[source]
        cause: GuestMemoryError,
    },
    /// A region's host address and its volatile slice are not the same memory, so it is mapped
    /// only now and then (Xen grants) or its implementation is wrong.
    #[error(
        "the region at guest address {guest_addr:#x} has host address {host_addr:#x}, but its \
         volatile slice is {slice_len_bytes} bytes at {slice_addr:#x}"
    )]
    NotMapped {
        /// The region's guest physical address.
        guest_addr: u64,
        /// Address that `get_host_address` gave.
        host_addr: usize,
        /// Address that `as_volatile_slice` gave.
        slice_addr: usize,
        /// Length in bytes that `as_volatile_slice` gave.
        slice_len_bytes: usize,
    },
    /// Two regions are the same memory of this process, wholly or partly.
    #[error(
        "the regions at guest addresses {guest_addr:#x} and {other_guest_addr:#x} overlap in this \
         process"
    )]
    HostOverlap {
        /// One region's guest physical address.
        guest_addr: u64,
        /// The other's.
        other_guest_addr: u64,
    },
    /// The size of the pages behind a region could not be found out.
    #[error("failed to find the page size of the region at guest address {guest_addr:#x}")]
    PageSize {
        /// The region's guest physical address.
        guest_addr: u64,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// The engine refused the memory map.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// Describes all regions of `memory` to the engine, sorted by guest address.
///
/// Works with every region type that is mapped in this process: `GuestMemoryMmap` with any
/// bitmap, and a VMM's own types. The size of the pages behind each region is read from its file
/// (hugetlbfs), or else from `/proc/self/maps` and, rarely, `smaps`.
///
/// Memory given to `vm-memory` read-only will fault when the engine writes to it at a
/// destination, as it does when `vm-memory` writes to it.
///
/// # Thread safety
///
/// The result is `Send` and `Sync`; so must be `M`.
///
/// # Resource cleanup
///
/// The result keeps `memory`, and with it the mappings, until its last clone is dropped. A VMM
/// that replaces its memory map (hotplug) has to describe the new one: the result shows the map
/// as it was.
pub fn guest_memory<M>(memory: Arc<M>) -> Result<GuestMemory, MemoryError>
where
    M: GuestMemoryBackend + Send + Sync + 'static,
{
    let mut regions = memory.iter().map(raw_region).collect::<Result<Vec<_>, _>>()?;
    // The trait does not promise an order.
    regions.sort_by_key(|region| region.layout.guest_addr);
    refuse_host_overlap(&regions)?;
    let owner = Box::new(memory);
    // SAFETY: each region is a VolatileSlice that was borrowed from `*memory`. Its type promises
    // that these bytes can be read and written, at this address, as long as `*memory` is
    // borrowed; only unsafe code of the region's implementation can make one that breaks this.
    // The Arc given as owner is such a borrow until the value is dropped: `*memory` neither
    // moves nor is dropped, and nobody gets a `&mut` of it while two Arcs or this one exist.
    // Holding raw parts beside the Arc is how self-borrowing cells are built.
    // No Rust references: VolatileSlice exists so that all access is by pointer, for the guest
    // writes to it at any time. No overlap in host memory: checked above. The file is the one
    // the region says it maps, and mapped shared; its fd lives in an Arc that the region owns.
    let memory = unsafe { GuestMemory::from_raw_parts(regions, Some(owner)) }?;
    Ok(memory)
}

fn raw_region<R: GuestMemoryRegion>(region: &R) -> Result<RawRegion, MemoryError> {
    let guest_addr = region.start_addr().raw_value();
    let len_bytes = region.len();
    let no_host_address = |cause| MemoryError::NoHostAddress { guest_addr, cause };
    let host_addr = region.get_host_address(MemoryRegionAddress(0)).map_err(no_host_address)?;
    let slice = region.as_volatile_slice().map_err(no_host_address)?;
    // The guard is what keeps memory mapped that is mapped for each access; where it is mapped
    // for good, the host address is the same, and the guard is not needed.
    let slice_addr = slice.ptr_guard_mut().as_ptr();
    if slice_addr != host_addr || slice.len() as u64 != len_bytes {
        return Err(MemoryError::NotMapped {
            guest_addr,
            host_addr: host_addr.addr(),
            slice_addr: slice_addr.addr(),
            slice_len_bytes: slice.len(),
        });
    }
    let backing_page_bytes = page_bytes(region, host_addr.addr())
        .map_err(|cause| MemoryError::PageSize { guest_addr, cause })?;
    // What is written to a private mapping is not in its file.
    let file = region.file_offset().filter(|_| backing::is_shared(host_addr.addr()));
    let file = file.map(|file_offset| FileBacking {
        fd: file_offset.file().as_raw_fd(),
        offset_bytes: file_offset.start(),
    });
    let layout = RegionLayout { guest_addr, len_bytes, backing_page_bytes };
    Ok(RawRegion { layout, host_addr: slice_addr, file })
}

fn page_bytes<R: GuestMemoryRegion>(region: &R, host_addr: usize) -> io::Result<u64> {
    match region.file_offset() {
        Some(file_offset) => backing::of_file(file_offset.file()),
        // What the VMM knows for sure need not be looked up, and cannot be in a jail without
        // /proc.
        None if region.is_hugetlbfs() == Some(false) => Ok(PAGE_BYTES),
        None => backing::of_mapping(host_addr),
    }
}

fn refuse_host_overlap(regions: &[RawRegion]) -> Result<(), MemoryError> {
    let mut by_host: Vec<_> = regions.iter().collect();
    by_host.sort_by_key(|region| region.host_addr.addr());
    for pair in by_host.windows(2) {
        let [low, high] = pair else { continue };
        if low.layout.len_bytes > (high.host_addr.addr() - low.host_addr.addr()) as u64 {
            return Err(MemoryError::HostOverlap {
                guest_addr: low.layout.guest_addr,
                other_guest_addr: high.layout.guest_addr,
            });
        }
    }
    Ok(())
}
