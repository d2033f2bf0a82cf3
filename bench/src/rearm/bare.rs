//! `KVM_CLEAR_DIRTY_LOG` and nothing around it.
#![expect(unsafe_code, reason = "an ioctl with a pointer to a bitmap")]

use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1};
use pageferry::dirty::WORD_PAGES;
use pageferry_cli::outcome::Failure;
use pageferry_vmm::guest::KvmHandles;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

const KVM_CLEAR_DIRTY_LOG: Opcode = opcode::read_write::<kvm_clear_dirty_log>(0xae, 0xc0);

/// Clears pages of the VM's only slot, from `first_page` on, and write-protects them.
pub(super) fn clear(kvm: &KvmHandles, first_page: u64, words: &[u64]) -> Result<(), Failure> {
    let [slot] = kvm.slots.as_slice() else { return Err("the VM has several slots".into()) };
    let mut log = kvm_clear_dirty_log {
        slot: slot.slot,
        num_pages: u32::try_from(words.len() as u64 * WORD_PAGES)?,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: open as long as `kvm` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(kvm.vm.as_raw_fd()) };
    // SAFETY: the opcode takes a kvm_clear_dirty_log by pointer.
    let call = unsafe { Updater::<KVM_CLEAR_DIRTY_LOG, _>::new(&mut log) };
    // SAFETY: the kernel reads `num_pages` bits of the bitmap, and that many are there.
    unsafe { ioctl(fd, call) }.map_err(|error| {
        format!("failed to clear the dirty log from page {first_page} on: {error}")
    })?;
    Ok(())
}
