//! The rings of all vCPUs of a VM.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
    kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use pageferry::dirty::DirtyBitmap;

use super::KvmRingError;
use super::mapping::{DirtyGfn, Ring};
use crate::kvm::ioctl;
use crate::kvm::slots::{PlacedSlot, PlacedSlots};
use crate::misuse::MisuseError;

/// Fewest entries: a page of them. Processors that log writes in a buffer of their own (Intel's
/// PML) need more, and the kernel says so.
const MIN_ENTRIES: u32 = 256;

/// How often in a row KVM may reset nothing while entries wait for it. A signal is handled
/// between two calls, so the next one gets on.
const IDLE_RESETS: u32 = 100;

/// How often in a row a ring may turn out to be adrift once more.
const COLLECTIONS: u32 = 8;

/// The dirty rings of a VM: made before its memory and its vCPUs, and kept by the VMM as long as
/// vCPUs run. Clones are handles to the same rings.
///
/// A ring that fills up makes its vCPU leave `KVM_RUN` with `KVM_EXIT_DIRTY_RING_FULL`
/// (`VcpuExit::Unsupported(31)` of kvm-ioctls), again and again until it was emptied. The vCPU's
/// thread has to call [`VcpuRing::on_full`] then and enter the guest again; that does not wait
/// for the engine. A harvest by the engine empties the rings too.
///
/// ```no_run
/// use std::sync::Arc;
///
/// use kvm_ioctls::{Kvm, VcpuExit};
/// use pageferry_rust_vmm::kvm::{DirtyRings, KVM_EXIT_DIRTY_RING_FULL};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let vm = Arc::new(Kvm::new()?.create_vm()?);
/// let rings = DirtyRings::enable(Arc::clone(&vm), DirtyRings::DEFAULT_ENTRIES)?;
/// // Memory slots, then:
/// let mut vcpu = vm.create_vcpu(0)?;
/// let ring = rings.add_vcpu(&vcpu)?;
/// loop {
///     match vcpu.run()? {
///         VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => ring.on_full()?,
///         VcpuExit::Hlt => break,
///         _ => {}
///     }
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Thread safety
///
/// All methods may be called from any thread. Who collects excludes others, for as long as there
/// are entries: some ten nanoseconds for each, and what KVM takes to protect its page.
///
/// # Resource cleanup
///
/// Each ring is memory of the kernel's, 16 bytes an entry, from the vCPU's creation on; whether
/// a VM has rings cannot be changed. The rings stay mapped, and the VM and its vCPUs in the
/// kernel, until the last clone is dropped.
#[derive(Debug, Clone)]
pub struct DirtyRings(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    vm: Arc<VmFd>,
    entries: u32,
    has_bitmap: bool,
    times_full: AtomicU64,
    times_run_over: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By vCPU, in the order they were added.
    rings: Vec<Ring>,
    /// Entries taken out of each.
    taken: Vec<u64>,
    tracker: Option<Tracker>,
}

/// What the source that tracks now wants to know.
#[derive(Debug)]
struct Tracker {
    /// Sorted by number.
    slots: Vec<PlacedSlot>,
    /// Pages that vCPUs' threads collected.
    collected: DirtyBitmap,
    any_collected: bool,
    /// A ring ran over: any page may have been written, and no longer be protected.
    lost: bool,
}

/// The ring of one vCPU, for the thread that runs it. See [`DirtyRings`].
#[derive(Debug, Clone)]
pub struct VcpuRing {
    rings: DirtyRings,
    index: usize,
}

impl DirtyRings {
    /// What most VMMs use: pages of 16 MiB (with 4 KiB each) dirtied by a vCPU between harvests
    /// before it has to leave the guest, for 64 KiB of kernel memory a vCPU.
    pub const DEFAULT_ENTRIES: u32 = 4096;

    /// Most entries the kernel takes for a ring; 0 if it has none.
    pub fn max_entries(vm: &VmFd) -> u32 {
        ring_cap(vm).map_or(0, |(_, max_entries)| max_entries)
    }

    /// Gives each vCPU that `vm` will have a ring of `entries` entries, a power of two.
    ///
    /// It has to be done before the first vCPU is created, and before the first memory slot
    /// where KVM keeps a [bitmap](Self::has_bitmap) beside the rings.
    pub fn enable(vm: Arc<VmFd>, entries: u32) -> Result<Self, KvmRingError> {
        let (cap, max_entries) = ring_cap(&vm)?;
        if !entries.is_power_of_two() || !(MIN_ENTRIES..=max_entries).contains(&entries) {
            return Err(KvmRingError::Entries { entries, max_entries });
        }
        let bytes = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
        enable_cap(&vm, cap, bytes).map_err(|cause| KvmRingError::Enable { entries, cause })?;
        let has_bitmap = offered(&vm, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) > 0;
        if has_bitmap {
            enable_cap(&vm, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, 0)
                .map_err(KvmRingError::EnableBitmap)?;
        }
        Ok(Self(Arc::new(Inner {
            vm,
            entries,
            has_bitmap,
            times_full: AtomicU64::new(0),
            times_run_over: AtomicU64::new(0),
            state: Mutex::default(),
        })))
    }

    /// Maps the ring of a vCPU. To be called once for each vCPU of the VM, before it runs.
    pub fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<VcpuRing, KvmRingError> {
        let ring = Ring::map(vcpu, self.0.entries).map_err(KvmRingError::Map)?;
        let mut state = self.lock();
        state.rings.push(ring);
        state.taken.push(0);
        Ok(VcpuRing { rings: self.clone(), index: state.rings.len() - 1 })
    }

    /// Entries of each ring.
    pub fn entries(&self) -> u32 {
        self.0.entries
    }

    /// Whether KVM keeps a bitmap as well, for what it writes outside any vCPU's context.
    pub fn has_bitmap(&self) -> bool {
        self.0.has_bitmap
    }

    /// How often a vCPU left the guest because its ring was full. If that is often, larger rings
    /// save the guest exits.
    pub fn times_full(&self) -> u64 {
        self.0.times_full.load(Ordering::Relaxed)
    }

    /// How often a ring ran over, which KVM should prevent: see
    /// [`KvmDirtyRing`](super::KvmDirtyRing#rings-that-run-over).
    pub fn times_run_over(&self) -> u64 {
        self.0.times_run_over.load(Ordering::Relaxed)
    }

    /// Entries taken out of the ring of each vCPU so far: pages it dirtied, each counted once
    /// between two times that it is re-armed. In the order in which vCPUs were added.
    pub fn dirtied(&self) -> Vec<u64> {
        self.lock().taken.clone()
    }

    pub(super) fn vm(&self) -> &Arc<VmFd> {
        &self.0.vm
    }

    /// Begins to collect pages of `slots`, into bitmaps such as `clean`.
    pub(super) fn attach(
        &self,
        slots: &PlacedSlots,
        clean: DirtyBitmap,
    ) -> Result<(), KvmRingError> {
        let mut state = self.lock();
        if state.tracker.is_some() {
            return Err(MisuseError::AlreadyStarted.into());
        }
        // What is left of earlier tracking.
        self.collect(&mut state, None)?;
        let mut slots = slots.all().to_vec();
        slots.sort_by_key(|slot| slot.kvm.slot);
        state.tracker =
            Some(Tracker { slots, collected: clean, any_collected: false, lost: false });
        Ok(())
    }

    /// Adds the pages collected since the last call, and all that are in the rings. Tells whether
    /// a ring ran over since: then all pages have to be protected anew, and all are dirty.
    pub(super) fn harvest(&self, into: &mut DirtyBitmap) -> Result<bool, KvmRingError> {
        let mut state = self.lock();
        state.tracker.as_mut().ok_or(MisuseError::NotStarted)?.hand_over(into);
        self.collect(&mut state, Some(into))?;
        Ok(state.tracker.as_mut().is_some_and(|tracker| std::mem::take(&mut tracker.lost)))
    }

    /// Ends collecting; forgets what the rings hold.
    pub(super) fn detach(&self) -> Result<(), KvmRingError> {
        let mut state = self.lock();
        state.tracker = None;
        self.collect(&mut state, None)
    }

    /// Takes all entries out of the rings, into a bitmap or else to the tracker's own, and has
    /// KVM re-arm their pages. Whoever reads them does so afterwards.
    fn collect(
        &self,
        state: &mut State,
        mut into: Option<&mut DirtyBitmap>,
    ) -> Result<(), KvmRingError> {
        for _ in 0..COLLECTIONS {
            let searched = self.find_adrift(state)?;
            state.take(into.as_deref_mut());
            self.reset(state)?;
            // Where KVM wrote on meanwhile, what was found may not have been all.
            if !searched || !state.rings.iter_mut().any(Ring::check) {
                return Ok(());
            }
        }
        state.all_lost();
        Ok(())
    }

    /// Looks for KVM's count where a ring is adrift. Tells whether there was such a ring.
    fn find_adrift(&self, state: &mut State) -> Result<bool, KvmRingError> {
        let mut searched = false;
        for ring in state.rings.iter_mut().filter(|ring| ring.is_adrift()) {
            searched = true;
            if ring.aim() {
                self.reset_marked(ring)?;
            }
        }
        Ok(searched)
    }

    /// Has KVM pass over what is marked as harvested, as far as it comes.
    fn reset_marked(&self, ring: &Ring) -> Result<(), KvmRingError> {
        let mut idle = 0;
        // Twice, for a signal ends the call; it is handled before the next.
        while idle < 2 {
            let reset = ioctl::reset_dirty_rings(&self.0.vm).map_err(KvmRingError::Reset)?;
            idle = if reset == 0 { idle + 1 } else { 0 };
        }
        ring.clear_marks();
        Ok(())
    }

    /// Has KVM reset what was harvested.
    fn reset(&self, state: &mut State) -> Result<(), KvmRingError> {
        let mut left: u64 = state.rings.iter().map(|ring| u64::from(ring.unreset())).sum();
        let mut idle = 0;
        while left > 0 && idle < IDLE_RESETS {
            let reset = ioctl::reset_dirty_rings(&self.0.vm).map_err(KvmRingError::Reset)?;
            idle = if reset == 0 { idle + 1 } else { 0 };
            left = left.saturating_sub(reset);
        }
        // Where it got stuck, a harvested entry was written over.
        let mut lost = false;
        for ring in &mut state.rings {
            if ring.ran_over() || (left > 0 && ring.unreset() > 0) {
                lost = true;
                ring.abandon();
                self.reset_marked(ring)?;
                self.0.times_run_over.fetch_add(1, Ordering::Relaxed);
            }
            ring.were_reset();
        }
        if lost {
            tracing::debug!("a dirty ring ran over, all pages count as written");
            state.all_lost();
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics between two changes of what it holds.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VcpuRing {
    /// Empties the rings of all vCPUs, so that this one, which left the guest with
    /// `KVM_EXIT_DIRTY_RING_FULL`, can enter it again. The pages are kept for the next harvest.
    ///
    /// To be called by the vCPU's thread, after that exit alone.
    pub fn on_full(&self) -> Result<(), KvmRingError> {
        self.rings.0.times_full.fetch_add(1, Ordering::Relaxed);
        let mut state = self.rings.lock();
        self.rings.collect(&mut state, None)?;
        let ring = &mut state.rings[self.index];
        if ring.push_on() { self.rings.reset_marked(ring) } else { Ok(()) }
    }

    /// Does the same if this vCPU's ring is more than half full; else it costs a lock.
    ///
    /// A vCPU's thread may call it whenever it left the guest for another reason. There is no
    /// need to where KVM stops vCPUs in time; where it lets rings
    /// [run over](super::KvmDirtyRing#rings-that-run-over), it prevents many of those.
    pub fn relieve(&self) -> Result<(), KvmRingError> {
        let mut state = self.rings.lock();
        if state.rings[self.index].is_half_full() {
            self.rings.collect(&mut state, None)?;
        }
        Ok(())
    }
}

impl State {
    /// Any page may have been written, and no longer be protected.
    fn all_lost(&mut self) {
        if let Some(tracker) = &mut self.tracker {
            tracker.lost = true;
        }
    }

    /// Takes all entries out of the rings.
    fn take(&mut self, into: Option<&mut DirtyBitmap>) {
        let entries = self.rings.iter_mut().zip(&mut self.taken).flat_map(|(ring, taken)| {
            // No more than there are: KVM might be writing over what was harvested.
            let most = ring.entries();
            std::iter::from_fn(|| ring.harvest()).take(most).inspect(|_| *taken += 1)
        });
        match (&mut self.tracker, into) {
            (Some(tracker), Some(into)) => mark(&tracker.slots, entries, into),
            (Some(tracker), None) => {
                mark(&tracker.slots, entries, &mut tracker.collected);
                tracker.any_collected = true;
            }
            // Nobody tracks, so nobody wants to know.
            (None, _) => entries.for_each(drop),
        }
    }
}

impl Tracker {
    fn hand_over(&mut self, into: &mut DirtyBitmap) {
        // Spares the common harvest two walks over all guest memory's bits.
        if self.any_collected {
            into.merge(&self.collected);
            self.collected.clear();
            self.any_collected = false;
        }
    }
}

/// Sets the pages that entries name. Entries of slots that are not tracked (the VMM logs them for
/// itself) are passed over.
fn mark(slots: &[PlacedSlot], entries: impl Iterator<Item = DirtyGfn>, into: &mut DirtyBitmap) {
    let mut last: Option<&PlacedSlot> = None;
    for DirtyGfn { slot: number, page } in entries {
        if last.is_none_or(|slot| slot.kvm.slot != number) {
            let found = slots.binary_search_by_key(&number, |slot| slot.kvm.slot);
            last = found.ok().map(|index| &slots[index]);
        }
        if let Some(slot) = last
            && page < u64::from(slot.pages)
        {
            into.set(slot.region, slot.first_page + page);
        }
    }
}

/// The capability to use, and the most entries it takes.
fn ring_cap(vm: &VmFd) -> Result<(u32, u32), KvmRingError> {
    // The older one promises no order between the kernel's writes to a ring and ours, and exists
    // on x86 alone, whose processors keep that order.
    [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
        .into_iter()
        .map(|cap| (cap, offered(vm, cap) / size_of::<kvm_dirty_gfn>().try_into().unwrap_or(1)))
        .find(|(_, max_entries)| *max_entries > 0)
        .ok_or(KvmRingError::NotOffered)
}

fn offered(vm: &VmFd, cap: u32) -> u32 {
    // Errors are negative, and mean that it does not.
    u32::try_from(vm.check_extension_raw(cap.into())).unwrap_or(0)
}

pub(super) fn enable_cap(vm: &VmFd, cap: u32, arg: u64) -> io::Result<()> {
    let mut cap = kvm_enable_cap { cap, ..Default::default() };
    cap.args[0] = arg;
    vm.enable_cap(&cap).map_err(io::Error::from)
}
