//! `KvmDirtyLog`, `PagemapScan` and `UffdWp` over a guest that runs on KVM.
#![expect(unsafe_code, reason = "KvmDirtyLog relies on the slots it is given")]

use std::sync::Arc;

use crate::guest::{Guest, Rings};
use crate::suite::{self, Bench, Writer};
use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use pageferry::dirty::{DirtyBitmap, DirtySource};
use pageferry::memory::{PAGE_BYTES, PageRange};
use pageferry_rust_vmm::kvm::{KvmLogError, SlotError};
use pageferry_rust_vmm::{KvmDirtyLog, KvmSlot, LogProtocol, PagemapScan, UffdWp};

const MIB: usize = 1 << 20;

/// Two regions. The first has three slots: of an odd number of pages, then one that begins in
/// the middle of a word, then one that begins at a word; the second has one that begins and ends
/// inside the region.
pub(crate) fn odd_guest() -> Option<Guest> {
    odd_guest_with_rings(None)
}

pub(crate) fn odd_guest_with_rings(rings: Option<Rings>) -> Option<Guest> {
    let regions = [(0, 8 * MIB), (64 << 20, 4 * MIB)];
    let slots = [(0, 0, 101), (0, 101, 859), (0, 960, 1088), (1, 70, 777)];
    let ranges = vec![
        PageRange { region: 0, first_page: 0, pages: 2048 },
        PageRange { region: 1, first_page: 70, pages: 777 },
    ];
    Guest::with_rings(&regions, &slots, ranges, rings)
}

/// Whether the VM's kernel has the protocol; says so if not.
fn dirty_log(guest: &Guest, protocol: LogProtocol) -> Option<KvmDirtyLog> {
    // SAFETY: these are the guest's slots, and stay so.
    let log = unsafe {
        KvmDirtyLog::with_protocol(Arc::clone(&guest.vm), &guest.memory, &guest.slots, protocol)
    };
    match log {
        Ok(log) => Some(log),
        Err(error @ KvmLogError::NotOffered { .. }) => {
            eprintln!("skipped, because {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn passes_all(protocol: LogProtocol) {
    let Some(guest) = odd_guest() else { return };
    let Some(source) = dirty_log(&guest, protocol) else { return };
    assert_eq!(source.protocol(), protocol);
    let memory = &guest.memory;
    suite::passes_all(&Bench { memory, source: &source, writer: &guest, granule_pages: 1 });
}

#[test]
fn log_with_initially_set() {
    passes_all(LogProtocol::ManualClearInitiallySet);
}

#[test]
fn log_with_manual_clear() {
    passes_all(LogProtocol::ManualClear);
}

#[test]
fn log_that_get_clears() {
    passes_all(LogProtocol::GetClears);
}

/// KVM follows the process's page tables, so the same guest passes without KVM's log.
#[test]
fn pagemap_scan_sees_vcpus() {
    let Some(guest) = odd_guest() else { return };
    if let Err(error) = PagemapScan::supported() {
        eprintln!("skipped, because pages cannot be tracked here: {error}");
        return;
    }
    let memory = &guest.memory;
    let source = PagemapScan::new(Arc::clone(memory));
    suite::passes_all(&Bench { memory, source: &source, writer: &guest, granule_pages: 1 });
}

/// Likewise; these faults are raised in the kernel.
#[test]
fn uffd_wp_sees_vcpus() {
    let Some(guest) = odd_guest() else { return };
    if let Err(error) = UffdWp::supported() {
        eprintln!("skipped, because pages cannot be tracked here: {error}");
        return;
    }
    let memory = &guest.memory;
    let source = UffdWp::new(Arc::clone(memory));
    suite::passes_all(&Bench { memory, source: &source, writer: &guest, granule_pages: 1 });
}

/// Whether the kernel logs a slot: only then its log can be read.
fn is_logged(guest: &Guest, slot: &KvmSlot) -> bool {
    let bytes = usize::try_from(slot.len_bytes).unwrap();
    guest.vm.get_dirty_log(slot.slot, bytes).is_ok()
}

#[test]
fn logging_ends_with_stop_and_with_drop() {
    let Some(guest) = odd_guest() else { return };
    // SAFETY: these are the guest's slots, and stay so.
    let log = unsafe { KvmDirtyLog::new(Arc::clone(&guest.vm), &guest.memory, &guest.slots) };
    let log = log.unwrap();
    assert!(!guest.slots.iter().any(|slot| is_logged(&guest, slot)));
    log.start().unwrap();
    assert!(guest.slots.iter().all(|slot| is_logged(&guest, slot)));
    log.stop().unwrap();
    assert!(!guest.slots.iter().any(|slot| is_logged(&guest, slot)));
    log.start().unwrap();
    drop(log);
    assert!(!guest.slots.iter().any(|slot| is_logged(&guest, slot)));
}

/// A VMM that logs a slot for itself, for a display, goes on doing so.
#[test]
fn a_slot_that_is_always_logged_stays_so() {
    let Some(guest) = odd_guest() else { return };
    let mut slots = guest.slots.clone();
    slots[3].flags = KVM_MEM_LOG_DIRTY_PAGES;
    // SAFETY: the slots are the guest's but for the flag, which it takes over by `stop`.
    let log = unsafe { KvmDirtyLog::new(Arc::clone(&guest.vm), &guest.memory, &slots) }.unwrap();
    log.start().unwrap();
    log.stop().unwrap();
    assert!(!is_logged(&guest, &slots[0]) && is_logged(&guest, &slots[3]));
}

/// With pages that begin dirty, the first harvest reports what was not yet re-armed.
#[test]
fn initially_set_reports_all_pages_of_slots_once() {
    let Some(guest) = odd_guest() else { return };
    let Some(log) = dirty_log(&guest, LogProtocol::ManualClearInitiallySet) else { return };
    log.start().unwrap();
    let mut all = DirtyBitmap::new(guest.memory.layout());
    log.harvest(&mut all).unwrap();
    assert_eq!(all.count(), 2048 + 777);
    assert!(!all.get(1, 69) && all.get(1, 70) && all.get(1, 846) && !all.get(1, 847));
    for region in 0..2 {
        log.rearm(region, 0, all.region_words(region)).unwrap();
    }
    guest.touch(PageRange { region: 0, first_page: 100, pages: 2 });
    let mut found = DirtyBitmap::new(guest.memory.layout());
    log.harvest(&mut found).unwrap();
    assert_eq!(found.count(), 2);
}

#[test]
fn slots_that_do_not_fit_are_refused() {
    let Some(guest) = odd_guest() else { return };
    let slot = guest.slots[0];
    let refused = |slots: &[KvmSlot]| {
        // SAFETY: none of these is ever started.
        let log = unsafe { KvmDirtyLog::new(Arc::clone(&guest.vm), &guest.memory, slots) };
        match log {
            Err(KvmLogError::Slot(error)) => error,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused(&[]), SlotError::NoSlot);
    for bad in [
        KvmSlot { len_bytes: 0, ..slot },
        KvmSlot { len_bytes: 100, ..slot },
        KvmSlot { len_bytes: PAGE_BYTES << 31, ..slot },
        KvmSlot { len_bytes: !0xfff, ..slot },
        KvmSlot { guest_addr: 1, ..slot },
    ] {
        assert!(matches!(refused(&[bad]), SlotError::BadSlot { .. }), "{bad:?}");
    }
    for outside in [
        KvmSlot { guest_addr: 32 << 20, ..slot },
        KvmSlot { len_bytes: 9 << 20, ..slot },
        KvmSlot { guest_addr: !0xfff, ..slot },
    ] {
        assert!(matches!(refused(&[outside]), SlotError::OutsideLayout { .. }), "{outside:?}");
    }
    let elsewhere = KvmSlot { host_addr: slot.host_addr + PAGE_BYTES, ..slot };
    assert!(matches!(refused(&[elsewhere]), SlotError::OtherHostAddress { .. }));
    assert_eq!(refused(&[slot, slot]), SlotError::Duplicate { slot: slot.slot });
    let overlap = KvmSlot { slot: 40, ..slot };
    let expected = SlotError::Overlap { slot: slot.slot, other_slot: 40 };
    assert_eq!(refused(&[overlap, slot]), expected);
    // SMM's address space shows the same memory again.
    let smm = KvmSlot { slot: 1 << 16 | slot.slot, ..slot };
    // SAFETY: never started.
    unsafe { KvmDirtyLog::new(Arc::clone(&guest.vm), &guest.memory, &[slot, smm]) }.unwrap();
}

#[test]
fn a_slot_for_each_region_is_the_plain_case() {
    let regions = [(0, MIB), (16 << 20, MIB)];
    let ranges = vec![PageRange { region: 1, first_page: 0, pages: 256 }];
    let Some(guest) = Guest::new(&regions, &[(0, 0, 256), (1, 0, 256)], ranges) else { return };
    let slots = KvmSlot::of_regions(&guest.memory);
    assert_eq!(slots.iter().map(|slot| slot.slot).collect::<Vec<_>>(), [0, 1]);
    for (plain, given) in slots.iter().zip(&guest.slots) {
        assert_eq!(KvmSlot { slot: given.slot, ..*plain }, *given);
    }
}
