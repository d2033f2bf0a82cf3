//! Switching dirty logging of memory slots on and off.
#![expect(unsafe_code, reason = "changing the flags of a memory slot hands its address to KVM")]

use std::io;
use std::ops::Deref;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use pageferry::memory::GuestMemory;
use thiserror::Error;

use super::slots::{KvmSlot, PlacedSlot, PlacedSlots, SlotError};

/// Dirty logging of a memory slot could not be switched.
#[derive(Debug, Error)]
#[error("failed to switch dirty logging of slot {slot:#x} {}", if *.on { "on" } else { "off" })]
#[non_exhaustive]
pub struct SwitchError {
    /// Number of the slot.
    pub slot: u32,
    /// Whether it was to be switched on.
    pub on: bool,
    /// The kernel's answer.
    #[source]
    pub cause: io::Error,
}

/// Slots that the VM has just as they are described here, but for the logging.
#[derive(Debug)]
pub(super) struct LoggedSlots(PlacedSlots);

impl LoggedSlots {
    /// # Safety
    ///
    /// Until the value is dropped, the VM that it is used with has each of `slots` just as
    /// described, except that this value switches `KVM_MEM_LOG_DIRTY_PAGES`.
    pub(super) unsafe fn new(memory: &GuestMemory, slots: &[KvmSlot]) -> Result<Self, SlotError> {
        PlacedSlots::new(memory, slots).map(Self)
    }

    /// Write-protects all pages of slots that are logged.
    pub(super) fn protect_again(&self, vm: &VmFd) -> Result<(), SwitchError> {
        // Switching logging on does that, so it has to be off before.
        self.all().iter().try_for_each(|slot| {
            let flags = slot.kvm.flags & !KVM_MEM_LOG_DIRTY_PAGES;
            let other = PlacedSlot { kvm: KvmSlot { flags, ..slot.kvm }, ..*slot };
            switch(vm, &other, false)?;
            switch(vm, slot, true)
        })
    }

    /// Switches logging on for all slots, or for none.
    pub(super) fn switch_on(&self, vm: &VmFd) -> Result<(), SwitchError> {
        for (index, slot) in self.all().iter().enumerate() {
            if let Err(error) = switch(vm, slot, true) {
                for started in &self.all()[..index] {
                    if let Err(error) = switch(vm, started, false) {
                        tracing::warn!(%error, "left dirty logging of a memory slot on");
                    }
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Switches logging off for all slots; the first error is returned after all were tried.
    pub(super) fn switch_off(&self, vm: &VmFd) -> Result<(), SwitchError> {
        let mut result = Ok(());
        for slot in self.all() {
            let switched = switch(vm, slot, false);
            if result.is_ok() {
                result = switched;
            }
        }
        result
    }
}

impl Deref for LoggedSlots {
    type Target = PlacedSlots;

    fn deref(&self) -> &PlacedSlots {
        &self.0
    }
}

fn switch(vm: &VmFd, slot: &PlacedSlot, on: bool) -> Result<(), SwitchError> {
    let KvmSlot { slot, guest_addr, len_bytes, host_addr, flags } = slot.kvm;
    let region = kvm_userspace_memory_region {
        slot,
        flags: if on { flags | KVM_MEM_LOG_DIRTY_PAGES } else { flags },
        guest_phys_addr: guest_addr,
        memory_size: len_bytes,
        userspace_addr: host_addr,
    };
    // SAFETY: the caller of LoggedSlots' constructor promised that this slot exists with these
    // addresses, so KVM only changes its flags.
    unsafe { vm.set_user_memory_region(region) }.map_err(|errno| SwitchError {
        slot,
        on,
        cause: errno.into(),
    })
}
