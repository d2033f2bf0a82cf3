//! Guest memory that is used for something else the moment it is given back.
#![expect(unsafe_code, reason = "writes to its own mapping by raw pointers")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::{MmapMut, MmapRaw};
use pageferry::memory::{GuestMemory, PAGE_BYTES, RawRegion, RegionLayout};
use pageferry::testing::Random;

const PAGE: usize = 4096;

/// What the memory holds after it was given back.
pub(crate) const NEXT_USE: u8 = 0xee;

/// Memory that was lent to a transport. It stays mapped, so that late writes show here, and late
/// reads at the peer.
pub(crate) struct Lent {
    mapping: Arc<MmapRaw>,
    returned: Arc<AtomicBool>,
}

/// Dropped with the last reference to the memory.
struct Borrower(Lent);

impl Lent {
    /// One region of noise, in which no page is like another.
    pub(crate) fn new(pages: u64, random: &mut Random) -> (Arc<GuestMemory>, Self) {
        let len_bytes = pages * PAGE_BYTES;
        let len = usize::try_from(len_bytes).expect("fits into the address space");
        let mut mapping = MmapMut::map_anon(len).expect("memory for a test");
        let words = (0..PAGE / 8).flat_map(|_| random.next_u64().to_le_bytes());
        let noise: Vec<u8> = words.collect();
        for (number, page) in (0_u64..).zip(mapping.chunks_exact_mut(PAGE)) {
            page.copy_from_slice(&noise);
            page[..8].copy_from_slice(&number.to_le_bytes());
        }
        let lent = Self { mapping: Arc::new(mapping.into()), returned: Arc::default() };
        let region = RawRegion {
            layout: RegionLayout { guest_addr: 0, len_bytes, backing_page_bytes: PAGE_BYTES },
            host_addr: lent.mapping.as_mut_ptr(),
            file: None,
        };
        let borrower = Borrower(lent.share());
        // SAFETY: a whole anonymous mapping, which the value keeps by its owner, and to which
        // nobody has a reference.
        let memory = unsafe { GuestMemory::from_raw_parts(vec![region], Some(Box::new(borrower))) };
        (Arc::new(memory.expect("a layout that makes sense")), lent)
    }

    fn share(&self) -> Self {
        Self { mapping: Arc::clone(&self.mapping), returned: Arc::clone(&self.returned) }
    }

    pub(crate) fn is_returned(&self) -> bool {
        self.returned.load(Ordering::SeqCst)
    }

    /// The first page that somebody wrote to after it was given back.
    pub(crate) fn first_disturbed(&self) -> Option<usize> {
        let (start, len) = (self.mapping.as_mut_ptr(), self.mapping.len());
        poison::lift(start, len);
        let mut copy = vec![0; len];
        // SAFETY: the mapping is as long as that and readable; the copy does not overlap it.
        unsafe { start.copy_to_nonoverlapping(copy.as_mut_ptr(), len) };
        copy.chunks_exact(PAGE).position(|page| page != [NEXT_USE; PAGE])
    }
}

impl Drop for Borrower {
    fn drop(&mut self) {
        let Lent { mapping, returned } = &self.0;
        // SAFETY: the mapping is as long as that and writable, and nobody has a reference into it.
        unsafe { mapping.as_mut_ptr().write_bytes(NEXT_USE, mapping.len()) };
        poison::lay(mapping.as_mut_ptr(), mapping.len());
        returned.store(true, Ordering::SeqCst);
    }
}

/// Has AddressSanitizer end the process at the first access from user space, system calls of libc
/// included. What the kernel does by itself only shows in the bytes.
#[cfg(asan)]
mod poison {
    use std::ffi::c_void;

    unsafe extern "C" {
        fn __asan_poison_memory_region(start: *const c_void, len: usize);
        fn __asan_unpoison_memory_region(start: *const c_void, len: usize);
    }

    pub(super) fn lay(start: *mut u8, len: usize) {
        // SAFETY: marks the bytes and touches none of them.
        unsafe { __asan_poison_memory_region(start.cast(), len) }
    }

    pub(super) fn lift(start: *mut u8, len: usize) {
        // SAFETY: as above.
        unsafe { __asan_unpoison_memory_region(start.cast(), len) }
    }
}

#[cfg(not(asan))]
mod poison {
    pub(super) fn lay(_: *mut u8, _: usize) {}
    pub(super) fn lift(_: *mut u8, _: usize) {}
}
