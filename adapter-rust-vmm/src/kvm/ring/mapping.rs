//! The ring of one vCPU, as KVM shares it.
#![expect(unsafe_code, reason = "memory that is shared with the kernel")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::VcpuFd;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

/// States of an entry (linux/kvm.h): from empty the kernel makes it dirty, then we make it
/// harvested, then KVM_RESET_DIRTY_RINGS makes it empty.
const EMPTY: u32 = 0;
const DIRTY: u32 = 1 << 0;
const HARVESTED: u32 = 1 << 1;

/// A page as a ring names it: number of the slot, and page in the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DirtyGfn {
    pub(super) slot: u32,
    pub(super) page: u64,
}

/// The ring of a vCPU, mapped. The mapping keeps the vCPU, and so the VM, in the kernel.
///
/// # When it runs over
///
/// KVM counts the entries it wrote and those it reset, and makes the vCPU leave the guest in
/// time. One that does not (it emulates many instructions before it looks) writes over entries
/// that nobody harvested, and its count runs ahead of ours: the ring is *adrift*. Neither count
/// can be read, but KVM's next entry shows where it is, and KVM passes over any entry that is
/// marked as harvested; what the entry says is then protected once more, which is harmless.
#[derive(Debug)]
pub(super) struct Ring {
    first: NonNull<kvm_dirty_gfn>,
    /// A power of two.
    entries: u32,
    /// Counts entries from the VM's start; entries must be harvested in order.
    next: u32,
    /// Harvested, and not known to be reset.
    unreset: u32,
    /// Whether `next` means nothing.
    adrift: bool,
    /// How often the vCPU left the guest for its ring is full since an entry was there.
    stuck: u32,
}

// SAFETY: the mapping belongs to the process, not to a thread, and nothing else here has its
// address.
unsafe impl Send for Ring {}

impl Ring {
    pub(super) fn map(vcpu: &VcpuFd, entries: u32) -> io::Result<Self> {
        let len = len_bytes(entries);
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * rustix::param::page_size() as u64;
        // SAFETY: the descriptor is open as long as `vcpu`, which is borrowed meanwhile.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a mapping where the kernel finds room, so nothing else is there.
        let addr = unsafe { mmap(std::ptr::null_mut(), len, prot, flags, fd, offset) }?;
        let first = NonNull::new(addr.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        let ring = Self { first, entries, next: 0, unreset: 0, adrift: false, stuck: 0 };
        // KVM maps what is not there, too, and sends SIGBUS to who looks: better ask first.
        // SAFETY: advice to populate the mapping just made; it changes no byte.
        match unsafe { madvise(addr, len, Advice::LinuxPopulateRead) } {
            // Before Linux 5.14 one cannot ask.
            Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(ring),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the next dirty entry and marks it as harvested.
    pub(super) fn harvest(&mut self) -> Option<DirtyGfn> {
        // Pairs with the kernel's publishing of slot and offset. A harvested entry that was not
        // reset is no dirty one: the ring ends there.
        if self.adrift || self.flags(self.next).load(Ordering::Acquire) != DIRTY {
            return None;
        }
        // SAFETY: inside the mapping; volatile, for the kernel wrote it, and it writes no more
        // until the entry was reset.
        let gfn = unsafe { self.entry(self.next).read_volatile() };
        // Pairs with the kernel's acquire in the reset: it may reuse the entry once it sees this.
        self.flags(self.next).store(HARVESTED, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        self.unreset += 1;
        self.stuck = 0;
        Some(DirtyGfn { slot: gfn.slot, page: gfn.offset })
    }

    pub(super) fn entries(&self) -> usize {
        self.entries as usize
    }

    /// Whether more than half of the entries wait to be harvested.
    pub(super) fn is_half_full(&self) -> bool {
        self.adrift || self.is_dirty(self.next.wrapping_add(self.entries / 2))
    }

    /// Entries harvested and not known to be reset.
    pub(super) fn unreset(&self) -> u32 {
        self.unreset
    }

    /// All of those were reset.
    pub(super) fn were_reset(&mut self) {
        self.unreset = 0;
    }

    /// Whether every entry was written since a reset. KVM leaves some free, so that it ran over,
    /// or was about to.
    pub(super) fn ran_over(&self) -> bool {
        self.unreset >= self.entries
            || (self.adrift && self.all().all(|index| self.is_dirty(index)))
    }

    /// Whether it is known to be adrift.
    pub(super) fn is_adrift(&self) -> bool {
        self.adrift
    }

    /// Looks whether KVM wrote entries elsewhere than where the next one is awaited.
    pub(super) fn check(&mut self) -> bool {
        // In this order: an entry that is awaited and comes meanwhile is there before others.
        let any = self.all().any(|index| self.is_dirty(index));
        self.adrift |= any && !self.is_dirty(self.next);
        any && self.adrift
    }

    /// Gives up what the ring holds, and its count. KVM has to reset it then.
    pub(super) fn abandon(&mut self) {
        self.adrift = true;
        self.unreset = 0;
        self.stuck = 0;
        for index in self.all() {
            self.exchange(index, DIRTY, HARVESTED);
        }
    }

    /// Marks what is not dirty as harvested, if KVM's count shows: a reset takes KVM to its
    /// oldest dirty entry then, which is the next one of ours too. Tells whether it did.
    pub(super) fn aim(&mut self) -> bool {
        let begins = |index: &u32| self.is_dirty(*index) && !self.is_dirty(index.wrapping_sub(1));
        let Some(begin) = self.all().find(begins) else { return false };
        for index in self.all() {
            self.exchange(index, EMPTY, HARVESTED);
        }
        self.next = begin;
        self.adrift = false;
        self.stuck = 0;
        true
    }

    /// Ends the marks that a reset did not reach.
    pub(super) fn clear_marks(&self) {
        for index in self.all() {
            self.exchange(index, HARVESTED, EMPTY);
        }
    }

    /// To be called when the vCPU left the guest for its ring is full, and all was harvested:
    /// marks a part of the ring as harvested that KVM may pass over without passing its own
    /// count. The parts take turns, for it is not known which of them is next. Tells whether it
    /// did.
    pub(super) fn push_on(&mut self) -> bool {
        if self.all().any(|index| self.is_dirty(index)) {
            self.stuck = 0;
            return false;
        }
        self.stuck += 1;
        // The first time it was full when the vCPU left, and may be no more. If that happens
        // again and not one entry came meanwhile, KVM counts entries that are not there, and
        // more of them than the part has.
        let Some(turn) = self.stuck.checked_sub(2) else { return false };
        self.adrift = true;
        let part = self.entries / 4;
        for index in 0..part {
            self.exchange((turn % 4) * part + index, EMPTY, HARVESTED);
        }
        true
    }

    fn all(&self) -> std::ops::Range<u32> {
        0..self.entries
    }

    fn is_dirty(&self, index: u32) -> bool {
        self.flags(index).load(Ordering::Acquire) == DIRTY
    }

    /// Changes the state of an entry, if it is as told.
    fn exchange(&self, index: u32, from: u32, to: u32) {
        // Else the kernel was faster, and its state counts.
        let _ = self.flags(index).compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed);
    }

    fn flags(&self, index: u32) -> &AtomicU32 {
        // SAFETY: a field of an entry inside the mapping.
        let flags = unsafe { &raw mut (*self.entry(index)).flags };
        // SAFETY: aligned, for a mapping is and the struct's layout is the kernel's; mapped as
        // long as `self`; the kernel accesses it in one piece, and nothing else here does.
        unsafe { AtomicU32::from_ptr(flags) }
    }

    fn entry(&self, index: u32) -> *mut kvm_dirty_gfn {
        let index = index & (self.entries - 1);
        // SAFETY: inside the mapping, for the index is less than the number of entries.
        unsafe { self.first.add(index as usize) }.as_ptr()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let addr = self.first.as_ptr().cast();
        // SAFETY: the mapping made by `map`, of that length; nothing refers to it any more.
        if let Err(error) = unsafe { munmap(addr, len_bytes(self.entries)) } {
            tracing::warn!(%error, "left a dirty ring mapped");
        }
    }
}

fn len_bytes(entries: u32) -> usize {
    entries as usize * size_of::<kvm_dirty_gfn>()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel that keeps the rules but for leaving the guest in time.
    struct Kernel {
        dirty: u32,
        reset: u32,
    }

    impl Kernel {
        fn push(&mut self, ring: &Ring, page: u64) {
            let entry = ring.entry(self.dirty);
            // SAFETY: inside the mapping of the test's own.
            unsafe { entry.write_volatile(kvm_dirty_gfn { flags: DIRTY, slot: 0, offset: page }) };
            self.dirty = self.dirty.wrapping_add(1);
        }

        fn reset(&mut self, ring: &Ring) {
            while ring.flags(self.reset).load(Ordering::Relaxed) == HARVESTED {
                ring.flags(self.reset).store(EMPTY, Ordering::Relaxed);
                self.reset = self.reset.wrapping_add(1);
            }
        }

        fn used(&self) -> u32 {
            self.dirty.wrapping_sub(self.reset)
        }
    }

    const ENTRIES: u32 = 256;

    fn anonymous() -> Ring {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        let len = len_bytes(ENTRIES);
        // SAFETY: a mapping where the kernel finds room.
        let addr = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, flags) };
        let first = NonNull::new(addr.unwrap().cast()).unwrap();
        Ring { first, entries: ENTRIES, next: 0, unreset: 0, adrift: false, stuck: 0 }
    }

    /// What DirtyRings does, for this ring alone.
    fn collect(ring: &mut Ring, kernel: &mut Kernel, pages: &mut Vec<u64>) -> bool {
        if ring.is_adrift() && ring.aim() {
            kernel.reset(ring);
            ring.clear_marks();
        }
        while ring.unreset() < ENTRIES
            && let Some(gfn) = ring.harvest()
        {
            pages.push(gfn.page);
        }
        kernel.reset(ring);
        let lost = ring.ran_over();
        if lost {
            ring.abandon();
            kernel.reset(ring);
            ring.clear_marks();
        }
        ring.were_reset();
        lost
    }

    proptest::proptest! {
        /// However far it runs over, and however often: what was written since the last time it
        /// did is harvested, and the vCPU gets on.
        #[test]
        fn a_ring_that_ran_over_is_found_again(
            bursts in proptest::collection::vec((0..600_u64, 0..3_u8), 1..60),
        ) {
            let mut ring = anonymous();
            let mut kernel = Kernel { dirty: 0, reset: 0 };
            let (mut written, mut lost_before) = (0, 0);
            let mut pages = Vec::new();
            for (burst, harvests) in bursts {
                let mut exits = 0;
                while kernel.used() >= ENTRIES - 64 {
                    let lost = collect(&mut ring, &mut kernel, &mut pages);
                    if lost {
                        lost_before = written;
                    }
                    if ring.push_on() {
                        kernel.reset(&ring);
                        ring.clear_marks();
                    }
                    exits += 1;
                    proptest::prop_assert!(exits < 100, "{} in use", kernel.used());
                }
                for _ in 0..burst {
                    kernel.push(&ring, written);
                    written += 1;
                }
                for _ in 0..harvests {
                    if collect(&mut ring, &mut kernel, &mut pages) {
                        lost_before = written;
                    }
                }
                // KVM's count is never passed.
                proptest::prop_assert!(kernel.used() < 2000, "{} in use", kernel.used());
            }
            if collect(&mut ring, &mut kernel, &mut pages) {
                lost_before = written;
            }
            pages.sort_unstable();
            for page in lost_before..written {
                proptest::prop_assert!(pages.binary_search(&page).is_ok(), "page {page} was lost");
            }
        }
    }
}
