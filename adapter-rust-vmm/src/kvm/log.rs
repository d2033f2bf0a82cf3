//! KVM's dirty log: a bitmap for each memory slot that has `KVM_MEM_LOG_DIRTY_PAGES`. The kernel's
//! Documentation/virt/kvm/api.rst describes it under `KVM_GET_DIRTY_LOG`, `KVM_CLEAR_DIRTY_LOG`
//! and `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
#![expect(unsafe_code, reason = "its constructors pass a promise about memory slots on")]

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use pageferry::dirty::{DirtyBitmap, WORD_PAGES};
use pageferry::memory::{GuestMemory, PAGE_BYTES};
use thiserror::Error;

use super::ioctl;
use super::logging::{LoggedSlots, SwitchError};
use super::slots::{KvmSlot, PlacedSlot, SlotError};
use crate::bits::{merge_at, word_at, words_for};
use crate::misuse::MisuseError;
use crate::tracked::{Tracked, Tracker};

/// How KVM's dirty log is read and re-armed. Later ones are better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum LogProtocol {
    /// Reading the log clears it and write-protects the pages: a harvest is the re-arming too.
    /// All a kernel before 5.1 has. Pages that the engine holds long before it reads them are
    /// written, faulted and reported needlessly.
    GetClears,
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: reading clears nothing, pages are re-armed just
    /// before the engine reads them.
    ManualClear,
    /// The same with `KVM_DIRTY_LOG_INITIALLY_SET` (Linux 5.7): `start` write-protects nothing,
    /// all pages begin dirty, and are protected as they are re-armed the first time. The first
    /// harvest reports every page that was not re-armed before it.
    ManualClearInitiallySet,
}

impl LogProtocol {
    fn options(self) -> u32 {
        match self {
            Self::GetClears => 0,
            Self::ManualClear => KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
            Self::ManualClearInitiallySet => {
                KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET
            }
        }
    }

    fn best_offered(offered: u32) -> Self {
        [Self::ManualClearInitiallySet, Self::ManualClear]
            .into_iter()
            .find(|protocol| protocol.options() & !offered == 0)
            .unwrap_or(Self::GetClears)
    }
}

/// Why KVM's dirty log failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KvmLogError {
    /// The slots do not fit the memory map.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The host's pages are not the engine's: KVM logs in host pages.
    #[error("host pages of {host_page_bytes} bytes are not supported, only {PAGE_BYTES}")]
    HostPageSize {
        /// Bytes in a page of the host.
        host_page_bytes: usize,
    },
    /// The kernel does not have the protocol that was asked for.
    #[error("this kernel does not offer the dirty log protocol {protocol:?}")]
    NotOffered {
        /// What was asked for.
        protocol: LogProtocol,
    },
    /// The protocol could not be set.
    #[error("failed to set the dirty log protocol {protocol:?}")]
    EnableProtocol {
        /// What was to be set.
        protocol: LogProtocol,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// Logging of a slot could not be switched.
    #[error(transparent)]
    Switch(#[from] SwitchError),
    /// The log of a slot could not be read.
    #[error("failed to read the dirty log of slot {slot:#x}{}", hint(.cause))]
    Get {
        /// Number of the slot.
        slot: u32,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// The log of a slot could not be cleared.
    #[error(
        "failed to clear {pages} pages from {first_page} on in the dirty log of slot \
         {slot:#x}{}", hint(.cause)
    )]
    Clear {
        /// Number of the slot.
        slot: u32,
        /// First page in the slot.
        first_page: u64,
        /// Number of pages.
        pages: u32,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// The source was called against its contract.
    #[error(transparent)]
    Misuse(#[from] MisuseError),
}

/// What the kernel means by an error that says something else.
pub(super) fn hint(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::ENOENT) => " (it was removed or replaced since tracking started)",
        Some(libc::ENXIO) => " (the VM uses the dirty ring without a bitmap)",
        _ => "",
    }
}

/// KVM's dirty log of a VM's memory slots.
///
/// Sees what vCPUs write, and what KVM itself writes on their behalf. What the VMM's threads
/// write (device emulation, system calls of any kind) it does not see; give the engine a source for
/// those too. Memory of
/// the map that no slot shows to the guest is not tracked, for no vCPU can write it.
///
/// A slot may begin at any page of a region and have any number of pages. Where its first page
/// is a multiple of 64 in the region, the engine's words go to the kernel as they are; elsewhere
/// they are shifted first.
///
/// # Thread safety
///
/// As [`DirtySource`](pageferry::dirty::DirtySource) asks. KVM serialises calls for one VM with a lock,
/// so re-arming from
/// several threads is safe but no faster. Each call that clears something has all vCPUs flush their
/// TLBs: re-arm many pages at once.
///
/// # Resource cleanup
///
/// `stop`, or dropping the value while it tracks, switches logging off again, and KVM frees its
/// bitmaps (two bits a page while it logs). The protocol set with `KVM_ENABLE_CAP` is a property
/// of the VM and stays: a VMM that reads dirty logs of other slots itself (display) has to
/// expect it from construction on. `vm` is kept until the value is dropped.
pub type KvmDirtyLog = Tracked<LogTracker>;

/// How [`KvmDirtyLog`] sees writes.
#[derive(Debug)]
pub struct LogTracker {
    vm: Arc<VmFd>,
    protocol: LogProtocol,
    slots: LoggedSlots,
    /// What KVM reports for one slot; the largest one fits. KVM overwrites the words it is
    /// given, while the engine's may hold other sources' pages, so these lie between.
    scratch: Mutex<Vec<u64>>,
}

impl KvmDirtyLog {
    /// Tracks `slots`, with the best protocol the kernel offers.
    ///
    /// # Safety
    ///
    /// Until the value is dropped, `vm` has each of `slots` just as described here, except that
    /// this value switches `KVM_MEM_LOG_DIRTY_PAGES`; the VMM does not remove, move or resize
    /// them meanwhile. Else KVM is given a slot that the VMM does not know of, and the guest
    /// writes to its host address even when something else is mapped there; or KVM writes the
    /// log of a larger slot past the end of the buffer it is given.
    pub unsafe fn new(
        vm: Arc<VmFd>,
        memory: &GuestMemory,
        slots: &[KvmSlot],
    ) -> Result<Self, KvmLogError> {
        let protocol = LogProtocol::best_offered(offered(&vm));
        // SAFETY: the caller promises the same.
        unsafe { Self::with_protocol(vm, memory, slots, protocol) }
    }

    /// Tracks `slots` with a protocol of the caller's choice.
    ///
    /// # Safety
    ///
    /// As for [`new`](Self::new).
    pub unsafe fn with_protocol(
        vm: Arc<VmFd>,
        memory: &GuestMemory,
        slots: &[KvmSlot],
        protocol: LogProtocol,
    ) -> Result<Self, KvmLogError> {
        let host_page_bytes = rustix::param::page_size();
        if host_page_bytes as u64 != PAGE_BYTES {
            return Err(KvmLogError::HostPageSize { host_page_bytes });
        }
        // SAFETY: the caller promises the same.
        let slots = unsafe { LoggedSlots::new(memory, slots) }?;
        set_protocol(&vm, protocol)?;
        let most_pages = slots.all().iter().map(|slot| slot.pages).max().unwrap_or(0);
        let scratch = Mutex::new(vec![0; words_for(most_pages.into())]);
        Ok(Self::by(LogTracker { vm, protocol, slots, scratch }, memory.layout()))
    }

    /// The protocol in use.
    pub fn protocol(&self) -> LogProtocol {
        self.tracker.protocol
    }
}

impl LogTracker {
    /// Clears `pages` of the region, whose words begin at `first_page`, in a slot that does not
    /// begin at a word of the region.
    fn clear_shifted(
        &self,
        slot: &PlacedSlot,
        first_page: u64,
        pages: std::ops::Range<u64>,
        words: &[u64],
    ) -> Result<(), KvmLogError> {
        // In pages of the slot, extended to whole words of it. What is added is clear in the
        // buffer, for `word_at` gives clear bits outside `words`, and clear bits say nothing.
        let begin = (pages.start - slot.first_page) / WORD_PAGES * WORD_PAGES;
        let end = pages.end - slot.first_page;
        let first = (slot.first_page + begin).cast_signed() - first_page.cast_signed();
        let shifted: Vec<u64> = (first..)
            .step_by(u64::BITS as usize)
            .take(words_for(end - begin))
            .map(|first| word_at(words, first))
            .collect();
        self.clear(slot, begin, &shifted)
    }

    /// Clears pages of a slot; `first_page` is a multiple of 64.
    fn clear(&self, slot: &PlacedSlot, first_page: u64, words: &[u64]) -> Result<(), KvmLogError> {
        // Each call takes locks and flushes TLBs if it cleared something.
        if words.iter().all(|word| *word == 0) {
            return Ok(());
        }
        let left = u64::from(slot.pages) - first_page;
        let pages = (words.len() as u64 * WORD_PAGES).min(left);
        // A slot's pages fit 32 bits.
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        let slot = slot.kvm.slot;
        ioctl::clear_dirty_log(&self.vm, slot, first_page, pages, words)
            .map_err(|cause| KvmLogError::Clear { slot, first_page, pages, cause })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u64>> {
        // The words are overwritten before they are read; a panic leaves nothing half done.
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tracker for LogTracker {
    const NAME: &'static str = "kvm dirty log";
    const LEFT: &'static str = "dirty logging of a memory slot on";

    type Error = KvmLogError;

    fn start(&self) -> Result<(), KvmLogError> {
        Ok(self.slots.switch_on(&self.vm)?)
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), KvmLogError> {
        let mut scratch = self.lock();
        for slot in self.slots.all() {
            let words = &mut scratch[..words_for(slot.pages.into())];
            let kvm_slot = slot.kvm.slot;
            ioctl::get_dirty_log(&self.vm, kvm_slot, slot.pages, words)
                .map_err(|cause| KvmLogError::Get { slot: kvm_slot, cause })?;
            merge_at(into.region_words_mut(slot.region), slot.first_page, words, slot.pages.into());
        }
        Ok(())
    }

    fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), KvmLogError> {
        if self.protocol == LogProtocol::GetClears {
            return Ok(());
        }
        let end_page = first_page + words.len() as u64 * WORD_PAGES;
        for slot in self.slots.of_region(region) {
            let Some(pages) = slot.overlap(first_page, end_page) else { continue };
            if slot.first_page.is_multiple_of(WORD_PAGES) {
                // Both ends of `words` and the slot's start are at word boundaries, so the
                // overlap begins at one; where it does not end at one, the slot ends there, and
                // KVM ignores bits past a slot's end.
                let first_word = words_for(pages.start - first_page);
                let end_word = words_for(pages.end - first_page);
                self.clear(slot, pages.start - slot.first_page, &words[first_word..end_word])?;
            } else {
                self.clear_shifted(slot, first_page, pages, words)?;
            }
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), KvmLogError> {
        Ok(self.slots.switch_off(&self.vm)?)
    }
}

/// Options of manual protection that the kernel has for this VM, as bits.
fn offered(vm: &VmFd) -> u32 {
    // Errors are negative, and mean that it does not.
    u32::try_from(vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into())).unwrap_or(0)
}

fn set_protocol(vm: &VmFd, protocol: LogProtocol) -> Result<(), KvmLogError> {
    let offered = offered(vm);
    if protocol.options() & !offered != 0 {
        return Err(KvmLogError::NotOffered { protocol });
    }
    if offered == 0 {
        // Nothing to set: the kernel knows just the one.
        return Ok(());
    }
    let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    cap.args[0] = protocol.options().into();
    vm.enable_cap(&cap)
        .map_err(|errno| KvmLogError::EnableProtocol { protocol, cause: errno.into() })
}
