//! KVM's dirty rings: each vCPU writes the pages it dirties into a ring of its own. The kernel's
//! Documentation/virt/kvm/api.rst describes it under `KVM_CAP_DIRTY_LOG_RING`.
#![expect(unsafe_code, reason = "its constructor passes a promise about memory slots on")]

mod mapping;
mod rings;

use std::io;

use kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
use pageferry::dirty::DirtyBitmap;
use pageferry::memory::{GuestMemory, Layout, PAGE_BYTES};
use thiserror::Error;

use super::ioctl;
use super::log::hint;
use super::logging::{LoggedSlots, SwitchError};
use super::slots::{KvmSlot, SlotError};
use crate::bits::{merge_at, set_range, words_for};
use crate::misuse::MisuseError;
use crate::tracked::{Tracked, Tracker};

pub use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
pub use rings::{DirtyRings, VcpuRing};

/// Why KVM's dirty ring failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KvmRingError {
    /// The kernel has no dirty ring.
    #[error("this kernel's KVM offers no dirty ring; Linux 5.11 or later has it on x86")]
    NotOffered,
    /// The number of entries is not one that KVM takes.
    #[error(
        "a dirty ring of {entries} entries is not possible: it takes a power of two from 256 to \
         {max_entries}"
    )]
    Entries {
        /// What was asked for.
        entries: u32,
        /// The most the kernel takes.
        max_entries: u32,
    },
    /// The rings could not be enabled.
    #[error("failed to enable dirty rings of {entries} entries{}", enable_hint(.cause))]
    Enable {
        /// What was asked for.
        entries: u32,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// The bitmap beside the rings could not be enabled.
    #[error("failed to enable the bitmap beside the dirty rings (memory slots come after it)")]
    EnableBitmap(#[source] io::Error),
    /// A vCPU's ring could not be mapped.
    #[error("failed to map the dirty ring of a virtual CPU (is it one of this VM?)")]
    Map(#[source] io::Error),
    /// The slots do not fit the memory map.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The host's pages are not the engine's.
    #[error("host pages of {host_page_bytes} bytes are not supported, only {PAGE_BYTES}")]
    HostPageSize {
        /// Bytes in a page of the host.
        host_page_bytes: usize,
    },
    /// Manual protection, which the ring does not work with, could not be switched off.
    #[error("failed to switch manual protection of the dirty log off")]
    ManualProtection(#[source] io::Error),
    /// Logging of a slot could not be switched.
    #[error(transparent)]
    Switch(#[from] SwitchError),
    /// KVM did not take harvested entries back.
    #[error("failed to reset the dirty rings")]
    Reset(#[source] io::Error),
    /// The bitmap beside the rings could not be read.
    #[error("failed to read the bitmap beside the dirty rings of slot {slot:#x}{}", hint(.cause))]
    Bitmap {
        /// Number of the slot.
        slot: u32,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// The source was called against its contract.
    #[error(transparent)]
    Misuse(#[from] MisuseError),
}

/// What the kernel means by an error that says something else.
fn enable_hint(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EINVAL) => {
            " (the VM has virtual CPUs or rings already, or this processor's own buffer of \
             written pages needs larger rings: 1024 entries or more)"
        }
        _ => "",
    }
}

/// KVM's dirty rings as a dirty source: the cost of a harvest goes with the pages written, not
/// with the size of the guest's memory, and a vCPU that writes faster than anyone harvests is
/// slowed down by itself.
///
/// A harvest takes all entries out of the rings and has KVM protect their pages again, and only
/// then returns: it is the re-arming too. (Entries have to be given back in the order of the
/// ring, so protecting pages one by one, just before each is read, is not possible.)
///
/// # What it sees
///
/// What vCPUs write, and what KVM writes while a vCPU's thread is in the kernel for it: that goes
/// to this vCPU's ring. What KVM writes in no vCPU's context goes to a bitmap beside the rings
/// where KVM [has one](DirtyRings::has_bitmap) (arm64, for the tables of the interrupt
/// controller), and is harvested from there. On x86 KVM offers no such bitmap, for nothing it
/// emulates writes that way: a write without a vCPU would be dropped with a warning in the kernel
/// log. What the VMM's own threads write takes a source of its own, as with
/// [`KvmDirtyLog`](super::KvmDirtyLog).
///
/// A processor that collects written pages in a buffer of its own (Intel's PML) hands them over
/// when its vCPU leaves the guest. So a write may show not in the harvest that follows it but in
/// the first one after the vCPU's next exit, with the page armed again only then. It is never
/// lost, and paused vCPUs have left the guest: what a migration needs.
///
/// # Rings that run over
///
/// KVM keeps some entries of each ring free, and stops a vCPU before those are needed. A KVM that
/// interprets many instructions before it looks whether to stop (paravirtual ones do) can fill
/// them and go on, over entries that nobody has harvested. That is noticed: the next harvest
/// protects all pages anew and reports all of them, and the ring works again. Nothing is lost,
/// but a migration gets no further by such a round, so there rings should be as large as they
/// can be, and vCPUs' threads call [`VcpuRing::relieve`] on other exits; or take the log.
/// [`DirtyRings::times_run_over`] counts.
///
/// # Thread safety
///
/// As [`DirtySource`](pageferry::dirty::DirtySource) asks. Re-arming takes no lock and no system call.
/// Threads of vCPUs may
/// call [`VcpuRing::on_full`] and [`VcpuRing::relieve`] at any time.
///
/// # Resource cleanup
///
/// `stop`, or dropping the value while it tracks, switches logging of the slots off again and
/// empties the rings. The [`DirtyRings`] live on: they are the VM's, and one source after the
/// other may track by them, one at a time.
pub type KvmDirtyRing = Tracked<RingTracker>;

/// How [`KvmDirtyRing`] sees writes.
#[derive(Debug)]
pub struct RingTracker {
    rings: DirtyRings,
    slots: LoggedSlots,
    layout: Layout,
}

impl KvmDirtyRing {
    /// Tracks `slots` of the VM that `rings` belong to.
    ///
    /// # Safety
    ///
    /// As for [`KvmDirtyLog::new`](super::KvmDirtyLog::new): until the value is dropped, the VM
    /// has each of `slots` just as described here, except that this value switches
    /// `KVM_MEM_LOG_DIRTY_PAGES`; the VMM does not remove, move or resize them meanwhile.
    pub unsafe fn new(
        rings: &DirtyRings,
        memory: &GuestMemory,
        slots: &[KvmSlot],
    ) -> Result<Self, KvmRingError> {
        let host_page_bytes = rustix::param::page_size();
        if host_page_bytes as u64 != PAGE_BYTES {
            return Err(KvmRingError::HostPageSize { host_page_bytes });
        }
        // SAFETY: the caller promises the same.
        let slots = unsafe { LoggedSlots::new(memory, slots) }?;
        let layout = memory.layout();
        let tracker = RingTracker { rings: rings.clone(), slots, layout: layout.clone() };
        Ok(Self::by(tracker, layout))
    }
}

impl RingTracker {
    fn switch_on(&self) -> Result<(), KvmRingError> {
        let vm = self.rings.vm();
        // Were it on with KVM_DIRTY_LOG_INITIALLY_SET, no page would be protected by switching
        // logging on: KVM takes all for dirty then, and no ring would say so.
        let manual = u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
        if vm.check_extension_raw(manual) > 0 {
            rings::enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0)
                .map_err(KvmRingError::ManualProtection)?;
        }
        Ok(self.slots.switch_on(vm)?)
    }

    /// Adds what KVM wrote in no vCPU's context. Reading clears, and protects the pages.
    fn harvest_bitmap(&self, into: &mut DirtyBitmap) -> Result<(), KvmRingError> {
        let most_pages = self.slots.all().iter().map(|slot| slot.pages).max().unwrap_or(0);
        let mut words = vec![0; words_for(most_pages.into())];
        for slot in self.slots.all() {
            let words = &mut words[..words_for(slot.pages.into())];
            ioctl::get_dirty_log(self.rings.vm(), slot.kvm.slot, slot.pages, words)
                .map_err(|cause| KvmRingError::Bitmap { slot: slot.kvm.slot, cause })?;
            merge_at(into.region_words_mut(slot.region), slot.first_page, words, slot.pages.into());
        }
        Ok(())
    }
}

impl Tracker for RingTracker {
    const NAME: &'static str = "kvm dirty ring";
    const LEFT: &'static str = "dirty logging of a memory slot on";

    type Error = KvmRingError;

    fn start(&self) -> Result<(), KvmRingError> {
        self.rings.attach(&self.slots, DirtyBitmap::new(&self.layout))?;
        if let Err(error) = self.switch_on() {
            if let Err(error) = self.rings.detach() {
                tracing::warn!(%error, "left pages in the dirty rings");
            }
            return Err(error);
        }
        Ok(())
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), KvmRingError> {
        if self.rings.has_bitmap() {
            self.harvest_bitmap(into)?;
        }
        if self.rings.harvest(into)? {
            self.slots.protect_again(self.rings.vm())?;
            for slot in self.slots.all() {
                let end_page = slot.first_page + u64::from(slot.pages);
                set_range(into.region_words_mut(slot.region), slot.first_page, end_page);
            }
        }
        Ok(())
    }

    /// KVM protected the pages again when their entries were taken.
    fn rearm(&self, _: u16, _: u64, _: &[u64]) -> Result<(), KvmRingError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), KvmRingError> {
        let switched = self.slots.switch_off(self.rings.vm());
        // Also then, so that the next source can track.
        let detached = self.rings.detach();
        switched.map_err(KvmRingError::from).and(detached)
    }
}
