//! What only shows from inside: registers after a move, and dirty logging by the handles.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};

use super::state::VcpuState;
use crate::guest::{Guest, GuestConfig, GuestKind, kvm_available};
use crate::layout::{PAGE_BYTES, WORKING_SET};
use crate::ram::{Backing, Ram};
use crate::state::{GuestState, MachineState};
use crate::workload::{WorkloadConfig, WorkloadKind};

const TSC: u32 = 0x10;

fn guest() -> Option<Guest> {
    if let Err(reason) = kvm_available() {
        eprintln!("skipped, because {reason}");
        return None;
    }
    let config = GuestConfig {
        kind: GuestKind::Kvm,
        regions: Ram::pc_regions(8 << 20),
        backing: Backing::Anonymous,
        vcpus: 2,
        workload: WorkloadConfig {
            kind: WorkloadKind::HotCold,
            working_set_bytes: 4 << 20,
            dirty_rate_pages_per_second: None,
            seed: 11,
        },
    };
    Some(Guest::create(config).unwrap())
}

fn run(guest: &mut Guest) {
    let beats = guest.heartbeat().beats + 20;
    let start = Instant::now();
    guest.resume().unwrap();
    while guest.heartbeat().beats < beats {
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", guest.failure());
        std::thread::yield_now();
    }
    guest.pause().unwrap();
}

fn vcpus(state: &[u8]) -> Vec<VcpuState> {
    match GuestState::decode(state).unwrap().machine {
        MachineState::Kvm(state) => state.vcpus,
        MachineState::Process(_) => panic!("a KVM guest"),
    }
}

#[test]
fn registers_are_equal_after_a_move() {
    let (Some(mut source), Some(mut destination)) = (guest(), guest()) else { return };
    source.boot().unwrap();
    run(&mut source);
    let state = source.save().unwrap();
    destination.load(&state).unwrap();
    let saved = vcpus(&state);
    let loaded = vcpus(&destination.save().unwrap());
    assert_eq!(saved.len(), 2);
    for (saved, loaded) in saved.iter().zip(&loaded) {
        saved.assert_same(loaded);
        let tsc = |state: &VcpuState| state.msr(TSC).unwrap();
        let ticks = tsc(loaded).checked_sub(tsc(saved)).expect("time went backwards");
        assert!(ticks < 100_000_000_000, "{ticks}");
    }
}

#[test]
fn memory_slots_can_be_set_to_log_writes() {
    let Some(mut guest) = guest() else { return };
    guest.boot().unwrap();
    let handles = guest.kvm().unwrap();
    for slot in &handles.slots {
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: slot.guest_address,
            memory_size: slot.len_bytes,
            userspace_addr: slot.host_address,
        };
        // SAFETY: the slot is the one the machine made, only with another flag.
        unsafe { handles.vm.set_user_memory_region(region) }.unwrap();
    }
    run(&mut guest);
    let slot = handles.slots[0];
    let log =
        handles.vm.get_dirty_log(slot.slot, usize::try_from(slot.len_bytes).unwrap()).unwrap();
    let is_dirty = |address: u64| {
        let page = address / PAGE_BYTES;
        log[usize::try_from(page / 64).unwrap()] & (1 << (page % 64)) != 0
    };
    assert!(is_dirty(0x4000) && is_dirty(0x5000), "the slots");
    assert!(!is_dirty(0x1000), "the code");
    let written = (0..1024).filter(|page| is_dirty(WORKING_SET + page * PAGE_BYTES)).count();
    assert!(written > 10, "{written}");
    assert!(guest.check_oracle().ok);
}
