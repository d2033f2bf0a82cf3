//! `KvmDirtyRing` over a guest with two vCPUs.
#![expect(unsafe_code, reason = "KvmDirtyRing relies on the slots it is given")]

use std::sync::Arc;

use crate::guest::{Guest, Rings};
use crate::kvm::odd_guest_with_rings;
use crate::suite::{self, Bench, Writer};
use kvm_ioctls::Kvm;
use pageferry::dirty::{DirtyBitmap, DirtySource};
use pageferry::memory::PageRange;
use pageferry_rust_vmm::kvm::{KvmLogError, KvmRingError};
use pageferry_rust_vmm::{DirtyRings, KvmDirtyLog, KvmDirtyRing, LogProtocol};

/// The fewest that KVM takes where the processor has no buffer of its own; 64 of them are kept
/// back, so that a ring counts as full with 192.
const TINY: u32 = 256;
/// More than a vCPU writes here between two harvests.
const ROOMY: u32 = 65_536;

fn guest(entries: u32, pausing: bool) -> Option<Guest> {
    odd_guest_with_rings(Some(Rings { entries, pausing }))
}

fn rings(guest: &Guest) -> &DirtyRings {
    guest.rings.as_ref().unwrap()
}

fn ring(guest: &Guest) -> KvmDirtyRing {
    // SAFETY: these are the guest's slots, and stay so.
    unsafe { KvmDirtyRing::new(rings(guest), &guest.memory, &guest.slots) }.unwrap()
}

#[test]
fn roomy_ring() {
    let Some(guest) = guest(ROOMY, false) else { return };
    let (source, memory) = (ring(&guest), &guest.memory);
    suite::passes_all(&Bench { memory, source: &source, writer: &guest, granule_pages: 1 });
    let (full, run_over) = (rings(&guest).times_full(), rings(&guest).times_run_over());
    let has_bitmap = rings(&guest).has_bitmap();
    eprintln!("bitmap beside the rings: {has_bitmap}; {full} times full, {run_over} run over");
}

#[test]
fn tiny_ring() {
    let Some(guest) = guest(TINY, true) else { return };
    let (source, memory) = (ring(&guest), &guest.memory);
    suite::passes_all(&Bench { memory, source: &source, writer: &guest, granule_pages: 1 });
    let (full, run_over) = (rings(&guest).times_full(), rings(&guest).times_run_over());
    eprintln!("{full} times full, {run_over} times run over");
    assert!(full > 20 && run_over == 0, "{full} {run_over}");
}

/// Where KVM stops vCPUs late, which it must not, everything is reported rather than too little.
#[test]
fn rings_that_run_over_lose_nothing() {
    let Some(guest) = guest(TINY, false) else { return };
    let (source, memory) = (ring(&guest), &guest.memory);
    suite::loses_nothing(&Bench { memory, source: &source, writer: &guest, granule_pages: 1 });
    let (full, run_over) = (rings(&guest).times_full(), rings(&guest).times_run_over());
    eprintln!("{full} times full, {run_over} times run over");
    assert!(full > 20, "{full}");
}

fn harvested(guest: &Guest, source: &KvmDirtyRing) -> DirtyBitmap {
    let mut found = DirtyBitmap::new(guest.memory.layout());
    source.harvest(&mut found).unwrap();
    found
}

/// What vCPUs' threads collected while nobody harvested is not lost, and no later source's.
#[test]
fn full_rings_are_collected_until_the_next_harvest() {
    let Some(guest) = guest(TINY, true) else { return };
    let all = guest.ranges()[0];
    // Nobody tracks, nothing is logged.
    guest.touch(all);
    assert_eq!(rings(&guest).times_full(), 0);
    let source = ring(&guest);
    source.start().unwrap();
    guest.touch(all);
    assert!(rings(&guest).times_full() >= 8, "{}", rings(&guest).times_full());
    assert_eq!(harvested(&guest, &source).count(), 2048);
    // Each counted for its vCPU.
    assert_eq!(rings(&guest).dirtied(), [2048, 0]);
    guest.touch(all);
    drop(source);
    // Two sources at once would share what each needs whole.
    let (first, second) = (ring(&guest), ring(&guest));
    first.start().unwrap();
    let refused = second.start().unwrap_err();
    let cause = std::error::Error::source(&refused).unwrap().to_string();
    assert_eq!(cause, "tracking was already started");
    assert!(harvested(&guest, &first).is_empty());
    guest.touch(PageRange { pages: 3, ..all });
    guest.first_ring_is_full();
    guest.touch(PageRange { first_page: 7, pages: 1, ..all });
    assert_eq!(harvested(&guest, &first).count(), 4);
    first.stop().unwrap();
    second.start().unwrap();
    assert!(harvested(&guest, &second).is_empty());
}

/// With `KVM_DIRTY_LOG_INITIALLY_SET`, a property of the VM, no page would be protected at first.
#[test]
fn manual_protection_does_not_hide_first_writes() {
    let Some(guest) = guest(ROOMY, false) else { return };
    let best = LogProtocol::ManualClearInitiallySet;
    // SAFETY: these are the guest's slots, and stay so.
    let log = unsafe {
        KvmDirtyLog::with_protocol(Arc::clone(&guest.vm), &guest.memory, &guest.slots, best)
    };
    if let Err(error @ KvmLogError::NotOffered { .. }) = &log {
        eprintln!("skipped, because {error}");
        return;
    }
    let range = guest.ranges()[0];
    guest.touch(range);
    let source = ring(&guest);
    source.start().unwrap();
    guest.touch(range);
    assert_eq!(harvested(&guest, &source).count(), 2048);
}

/// The log of a VM with rings cannot be read, and that is said.
#[test]
fn the_log_is_refused_beside_the_ring() {
    let Some(guest) = guest(ROOMY, false) else { return };
    if rings(&guest).has_bitmap() {
        eprintln!("skipped, because this KVM has a bitmap beside the rings");
        return;
    }
    // SAFETY: these are the guest's slots, and stay so.
    let log = unsafe { KvmDirtyLog::new(Arc::clone(&guest.vm), &guest.memory, &guest.slots) };
    let log = log.unwrap();
    log.start().unwrap();
    let error = log.harvest(&mut DirtyBitmap::new(guest.memory.layout())).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("the VM uses the dirty ring"), "{cause}");
}

#[test]
fn rings_that_cannot_be_are_refused() {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            eprintln!("skipped, because /dev/kvm cannot be used here: {error}");
            return;
        }
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    let most = DirtyRings::max_entries(&vm);
    if most == 0 {
        let error = DirtyRings::enable(vm, TINY).unwrap_err();
        assert!(matches!(error, KvmRingError::NotOffered));
        eprintln!("skipped, because {error}");
        return;
    }
    eprintln!("at most {most} entries");
    for entries in [0, 1, 128, 1000, most * 2] {
        let error = DirtyRings::enable(Arc::clone(&vm), entries).unwrap_err();
        assert!(matches!(error, KvmRingError::Entries { .. }), "{entries}: {error}");
    }
    let rings = DirtyRings::enable(Arc::clone(&vm), most).unwrap();
    assert_eq!(rings.entries(), most);
    let error = DirtyRings::enable(Arc::clone(&vm), most).unwrap_err();
    assert!(matches!(error, KvmRingError::Enable { .. }), "{error}");

    // A vCPU of another VM, with smaller rings or none, would be SIGBUS to look at.
    let other = Arc::new(kvm.create_vm().unwrap());
    let vcpu = other.create_vcpu(0).unwrap();
    let error = rings.add_vcpu(&vcpu).unwrap_err();
    assert!(matches!(error, KvmRingError::Map(_)), "{error}");
    let error = DirtyRings::enable(other, TINY).unwrap_err();
    assert!(error.to_string().contains("has virtual CPUs"), "{error}");
    let ring = rings.add_vcpu(&vm.create_vcpu(0).unwrap()).unwrap();
    ring.relieve().unwrap();
    ring.on_full().unwrap();
}
