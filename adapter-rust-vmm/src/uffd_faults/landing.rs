//! Memory that missing pages land in: another mapping of what is behind the guest's, or memory of its own.

use std::any::Any;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr;
use std::sync::Arc;

use pageferry::memory::{GuestMemory, PAGE_BYTES, RawRegion};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use super::UffdFaultsError;

/// A mapping of this process, until it is dropped.
#[derive(Debug)]
struct Mapping {
    address: usize,
    len_bytes: usize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and nobody uses it any more: it is dropped with the memory that was made of it.
        let unmapped =
            unsafe { munmap(ptr::with_exposed_provenance_mut(self.address), self.len_bytes) };
        if let Err(error) = unmapped {
            tracing::error!(%error, "left memory mapped that pages landed in");
        }
    }
}

/// Memory for the pages of `memory` to land in.
pub(super) fn landing(memory: &Arc<GuestMemory>) -> Result<GuestMemory, UffdFaultsError> {
    let (mut regions, mut mappings) = (Vec::new(), Vec::new());
    for region in memory.regions() {
        let guest_addr = region.layout.guest_addr;
        let mapping =
            map(region).map_err(|cause| UffdFaultsError::Landing { guest_addr, cause })?;
        let host_addr = ptr::with_exposed_provenance_mut(mapping.address);
        regions.push(RawRegion { layout: region.layout, host_addr, file: region.file });
        mappings.push(mapping);
    }
    // The guest's memory too: its files' descriptors are borrowed.
    let owner: Box<dyn Any + Send + Sync> = Box::new((mappings, Arc::clone(memory)));
    // SAFETY: each region is a mapping of its own, made here to be read and written, and lives as long as the owner. No
    // reference into it exists. A file is the one that it is a shared mapping of.
    Ok(unsafe { GuestMemory::from_raw_parts(regions, Some(owner)) }?)
}

fn map(region: &RawRegion) -> io::Result<Mapping> {
    let len_bytes = usize::try_from(region.layout.len_bytes).map_err(io::Error::other)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let address = if let Some(file) = region.file {
        // SAFETY: open as long as the region is mapped, and the caller has the region.
        let fd = unsafe { BorrowedFd::borrow_raw(file.fd) };
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping, wherever there is room.
        unsafe { mmap(ptr::null_mut(), len_bytes, protection, flags, fd, file.offset_bytes) }?
    } else {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: likewise.
        unsafe { mmap_anonymous(ptr::null_mut(), len_bytes, protection, flags) }?
    };
    let mapping = Mapping { address: address.expose_provenance(), len_bytes };
    if region.layout.backing_page_bytes == PAGE_BYTES {
        // A page that lands is one page of memory. Kernels without transparent huge pages do not know the advice.
        // SAFETY: it changes no byte.
        let _ = unsafe { madvise(address, len_bytes, Advice::LinuxNoHugepage) };
    }
    Ok(mapping)
}
