//! The guest as the engine sees it: a [`pageferry::Machine`], its memory and its dirty trackers.
#![expect(unsafe_code, reason = "promises the engine what the VM's memory slots are")]

use std::sync::Arc;
use std::time::Instant;

use pageferry::dirty::{DirtySource, DirtySources};
use pageferry::memory::GuestMemory;
use pageferry::{GuestAlarm, Machine, MachineError, Rehearsal};
use pageferry_device_state::Schema;
use pageferry_device_state::schema::Verdict;
use pageferry_rust_vmm::{
    AtomicBitmapSource, KvmDirtyLog, KvmDirtyRing, KvmSlot, PagemapScan, UffdWp, guest_memory,
};
use vm_memory::GuestRegionMmap;
use vm_memory::bitmap::AtomicBitmap;

use crate::guest::{Guest, KvmHandles};
use crate::tracking::DirtyTracking;

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

    /// Both, as the engine takes them.
    pub fn described(&self) -> Result<(Arc<GuestMemory>, DirtySources), MachineError> {
        let memory = self.memory()?;
        let dirty = self.dirty_sources(&memory)?;
        Ok((memory, dirty))
    }

    /// What tracks the guest's writes. One source is enough: the devices of this VMM write no guest
    /// memory.
    pub fn dirty_sources(&self, memory: &Arc<GuestMemory>) -> Result<DirtySources, MachineError> {
        let guest = &self.guest;
        let source: Box<dyn DirtySource> = match guest.tracking().decide(guest.config().kind)? {
            DirtyTracking::Pagemap => Box::new(PagemapScan::new(Arc::clone(memory))),
            DirtyTracking::UffdWp => Box::new(UffdWp::new(Arc::clone(memory))),
            DirtyTracking::Bitmap => {
                let ram = Arc::clone(guest.ram().memory());
                Box::new(AtomicBitmapSource::with_bitmaps(ram, memory, bitmap)?)
            }
            DirtyTracking::Auto | DirtyTracking::Log | DirtyTracking::Ring { .. } => {
                by_kvm(guest.kvm().ok_or("the guest is no virtual machine")?, memory)?
            }
        };
        Ok(DirtySources::new(vec![source]))
    }
}

fn bitmap(region: &GuestRegionMmap<Option<AtomicBitmap>>) -> Option<&AtomicBitmap> {
    (**region).bitmap().as_ref()
}

/// By the dirty rings of a VM that was made with them, else by its dirty log.
fn by_kvm(handles: KvmHandles, memory: &GuestMemory) -> Result<Box<dyn DirtySource>, MachineError> {
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
    Ok(match handles.rings {
        // SAFETY: these are all slots of the VM as it was made, and this VMM never changes one.
        Some(rings) => Box::new(unsafe { KvmDirtyRing::new(&rings, memory, &slots) }?),
        // SAFETY: likewise.
        None => Box::new(unsafe { KvmDirtyLog::new(handles.vm, memory, &slots) }?),
    })
}

impl Machine for GuestMachine {
    fn pause(&mut self) -> Result<(), MachineError> {
        Ok(self.guest.pause()?)
    }

    fn is_paused(&self) -> bool {
        self.guest.is_paused()
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(self.guest.resume()?)
    }

    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), MachineError> {
        Ok(self.guest.save_to(state)?)
    }

    fn state_schema(&self) -> Result<Vec<u8>, MachineError> {
        Ok(self.guest.schema()?.to_json().into_bytes())
    }

    fn check_state_schema(&self, source: &[u8]) -> Result<(), MachineError> {
        let compatibility = self.guest.schema()?.reads(&Schema::from_json(source)?);
        match compatibility.verdict() {
            // What depends on the state is tried: loading it is all or nothing.
            Verdict::Works | Verdict::Depends => Ok(()),
            _ => Err(compatibility.to_string().into()),
        }
    }

    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        Ok(self.guest.load(state)?)
    }

    fn set_alarm(&mut self, alarm: GuestAlarm) {
        self.guest.on_failure(move |reason| alarm.raise(reason.into()));
    }

    /// Stops the guest for as long as saving takes, well below a millisecond.
    fn rehearse(&mut self) -> Result<Option<Rehearsal>, MachineError> {
        let began = Instant::now();
        if let Err(error) = self.guest.pause() {
            self.guest.resume()?;
            return Err(error.into());
        }
        let paused = Instant::now();
        let state = self.guest.save();
        let saved = Instant::now();
        // Whatever came of it, the guest goes on.
        self.guest.resume()?;
        let state = state?;
        let resume = saved.elapsed();
        // From here on it counts which virtual CPU dirties how much.
        self.guest.throttle(self.guest.throttle_percent());
        Ok(Some(Rehearsal {
            state_bytes: state.len() as u64,
            save: saved.duration_since(paused),
            pause: Some(paused.duration_since(began)),
            resume: Some(resume),
        }))
    }

    fn throttle(&mut self, percent: u8) -> bool {
        self.guest.throttle(percent);
        true
    }
}
