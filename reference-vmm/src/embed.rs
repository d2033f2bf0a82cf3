//! The guest as the engine sees it: a [`pageferry::Machine`], its memory and its dirty trackers.
#![expect(unsafe_code, reason = "promises the engine what the VM's memory slots are")]

use std::sync::Arc;

use pageferry::dirty::{DirtySource, DirtySources};
use pageferry::memory::GuestMemory;
use pageferry::{Machine, MachineError};
use pageferry_rust_vmm::{KvmDirtyLog, KvmDirtyRing, KvmSlot, guest_memory, process_memory_source};

use crate::guest::Guest;

/// A guest that the engine drives.
#[derive(Debug)]
pub struct GuestMachine {
    /// The guest.
    pub guest: Guest,
}

impl GuestMachine {
    /// The guest's memory for the engine.
    pub fn memory(&self) -> Result<Arc<GuestMemory>, MachineError> {
        Ok(Arc::new(guest_memory(Arc::clone(self.guest.ram().memory()))?))
    }

    /// What tracks the guest's writes: KVM's dirty log for a KVM guest, or its dirty rings if it
    /// was made with them; the page tables of this process for a process guest. The devices of
    /// this VMM write no guest memory.
    pub fn dirty_sources(&self, memory: &Arc<GuestMemory>) -> Result<DirtySources, MachineError> {
        let Some(handles) = self.guest.kvm() else {
            return Ok(DirtySources::new(vec![process_memory_source(memory)?]));
        };
        let slots: Vec<KvmSlot> = handles
            .slots
            .iter()
            .map(|slot| KvmSlot {
                slot: slot.slot,
                guest_addr: slot.guest_address,
                len_bytes: slot.len_bytes,
                host_addr: slot.host_address,
                flags: 0,
            })
            .collect();
        let source: Box<dyn DirtySource> = match handles.rings {
            // SAFETY: these are all slots of the VM as it was made, and this VMM never changes one.
            Some(rings) => Box::new(unsafe { KvmDirtyRing::new(&rings, memory, &slots) }?),
            // SAFETY: likewise.
            None => Box::new(unsafe { KvmDirtyLog::new(handles.vm, memory, &slots) }?),
        };
        Ok(DirtySources::new(vec![source]))
    }
}

impl Machine for GuestMachine {
    fn pause(&mut self) -> Result<(), MachineError> {
        Ok(self.guest.pause()?)
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(self.guest.resume()?)
    }

    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), MachineError> {
        state.extend(self.guest.save()?);
        Ok(())
    }

    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        Ok(self.guest.load(state)?)
    }
}
