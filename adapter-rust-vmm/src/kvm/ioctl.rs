//! The dirty log calls, on the caller's buffers, and the dirty ring's.
//!
//! `kvm-ioctls` has no KVM_CLEAR_DIRTY_LOG and no KVM_RESET_DIRTY_RINGS, and its `get_dirty_log`
//! allocates for each call.
#![expect(unsafe_code, reason = "ioctl takes pointers to bitmaps")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1,
};
use kvm_ioctls::VmFd;
use pageferry::dirty::WORD_PAGES;
use rustix::ioctl::{Opcode, Setter, Updater, opcode};

/// Group of all KVM calls (linux/kvm.h).
const KVMIO: u8 = 0xae;
const KVM_GET_DIRTY_LOG: Opcode = opcode::write::<kvm_dirty_log>(KVMIO, 0x42);
const KVM_CLEAR_DIRTY_LOG: Opcode = opcode::read_write::<kvm_clear_dirty_log>(KVMIO, 0xc0);
const KVM_RESET_DIRTY_RINGS: Opcode = opcode::none(KVMIO, 0xc7);

/// Copies the dirty bitmap of a slot of `pages` pages into `into`, whole words.
///
/// With manual protection nothing is cleared; without, the log is cleared and pages are
/// write-protected again.
pub(super) fn get_dirty_log(vm: &VmFd, slot: u32, pages: u32, into: &mut [u64]) -> io::Result<()> {
    if (into.len() as u64) < u64::from(pages).div_ceil(WORD_PAGES) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: into.as_mut_ptr().cast() },
    };
    // SAFETY: the opcode takes a kvm_dirty_log by pointer and writes nothing to it.
    let call = unsafe { Setter::<KVM_GET_DIRTY_LOG, _>::new(log) };
    // SAFETY: the kernel writes ALIGN(pages of the slot, 64) / 8 bytes to the bitmap, which is
    // that long: checked above for `pages`, which is the slot's size by the promise made to
    // KvmDirtyLog's constructor, and a slot's size cannot change while it exists.
    unsafe { rustix::ioctl::ioctl(fd(vm), call) }.map_err(io::Error::from)
}

/// Clears the pages set in `words` in the log of a slot, and write-protects them again.
///
/// Bit 0 of `words` is page `first_page`, a multiple of 64. `pages` must be a multiple of 64 or
/// reach to the slot's end.
pub(super) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    words: &[u64],
) -> io::Result<()> {
    if (words.len() as u64) < u64::from(pages).div_ceil(WORD_PAGES) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the opcode takes a kvm_clear_dirty_log by pointer.
    let call = unsafe { Updater::<KVM_CLEAR_DIRTY_LOG, _>::new(&mut log) };
    // SAFETY: the kernel only reads the bitmap, ALIGN(pages, 64) / 8 bytes of it, which are
    // there: checked above.
    unsafe { rustix::ioctl::ioctl(fd(vm), call) }.map_err(io::Error::from)
}

/// Has KVM protect the pages of all entries that were marked as harvested, in the rings of all
/// vCPUs, and reuse the entries. Returns how many it did: fewer than there were if the thread has
/// a signal pending (since Linux 6.16).
pub(super) fn reset_dirty_rings(vm: &VmFd) -> io::Result<u64> {
    let fd = vm.as_raw_fd();
    // SAFETY: the call takes no argument, and touches no memory but the rings.
    // (libc, not rustix: the number of entries is the return value.)
    let reset = unsafe { libc::ioctl(fd, libc::Ioctl::from(KVM_RESET_DIRTY_RINGS)) };
    u64::try_from(reset).map_err(|_| io::Error::last_os_error())
}

fn fd(vm: &VmFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `vm`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) }
}
