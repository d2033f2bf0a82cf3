//! What only shows from inside: registers after a move, and dirty logging by the handles.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use pageferry::dirty::{DirtyBitmap, DirtySources};
use pageferry::memory::{GuestMemory, PageRange};

use super::state::VcpuState;
use crate::embed::GuestMachine;
use crate::error::GuestError;
use crate::guest::{DirtyTracking, Guest, GuestConfig, GuestKind, kvm_available};
use crate::layout::{PAGE_BYTES, WORKING_SET};
use crate::ram::{Backing, Ram};
use crate::state::{GuestState, MachineState};
use crate::workload::{WorkloadConfig, WorkloadKind};

const TSC: u32 = 0x10;

fn guest() -> Option<Guest> {
    guest_tracked_by(DirtyTracking::Log)
}

fn guest_tracked_by(tracking: DirtyTracking) -> Option<Guest> {
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
    match Guest::create_tracked(config, tracking) {
        Ok(guest) => Some(guest),
        Err(GuestError::DirtyRing(error)) => {
            eprintln!("skipped, because {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
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

/// Copies what the rings tell, while the guest runs and once more when it stands.
#[test]
fn what_dirty_rings_tell_is_enough_to_move() {
    // The fewest entries, which a guest fills at once, and what a VMM would take.
    for entries in [256, 4096, 65_536] {
        let tracking = DirtyTracking::Ring { entries };
        let Some(mut guest) = guest_tracked_by(tracking) else { return };
        guest.boot().unwrap();
        run(&mut guest);
        let mut machine = GuestMachine { guest };
        let memory = machine.memory().unwrap();
        let sources = machine.dirty_sources(&memory).unwrap();
        assert_eq!(sources.names(), ["kvm dirty ring"]);
        let Some(destination) = guest_tracked_by(tracking) else { return };
        let mut destination = GuestMachine { guest: destination };
        let into = destination.memory().unwrap();

        sources.start().unwrap();
        machine.guest.resume().unwrap();
        let mut copied = 0;
        for round in 0..20 {
            if round == 19 {
                machine.guest.pause().unwrap();
            }
            let mut pages = DirtyBitmap::new(memory.layout());
            sources.harvest(&mut pages).unwrap();
            if round == 0 {
                pages.fill();
            }
            copied += copy(&memory, &into, &sources, &pages);
            // The guest has written between two harvests: a beat is granted with every chunk.
            let beats = machine.guest.heartbeat().beats;
            let deadline = Instant::now() + Duration::from_secs(20);
            while round < 19 && machine.guest.heartbeat().beats == beats {
                assert_eq!(machine.guest.failure(), None);
                assert!(Instant::now() < deadline, "the guest does not beat");
                std::thread::yield_now();
            }
        }
        let state = machine.guest.save().unwrap();
        let mut pages = DirtyBitmap::new(memory.layout());
        sources.harvest(&mut pages).unwrap();
        copied += copy(&memory, &into, &sources, &pages);
        sources.stop().unwrap();
        destination.guest.load(&state).unwrap();
        let (there, here) = (destination.guest.check_oracle(), machine.guest.check_oracle());
        assert!(there.ok && there == here, "{entries}: {there:?} {here:?}");
        run(&mut destination.guest);
        assert!(destination.guest.check_oracle().ok);
        // The source goes on too, its rings emptied.
        run(&mut machine.guest);
        assert!(machine.guest.check_oracle().ok);
        let rings = machine.guest.kvm().unwrap().rings.unwrap();
        let (full, over) = (rings.times_full(), rings.times_run_over());
        eprintln!("{entries} entries: {copied} pages, {full} times full, {over} run over");
    }
}

fn copy(
    from: &GuestMemory,
    to: &GuestMemory,
    sources: &DirtySources,
    pages: &DirtyBitmap,
) -> usize {
    let (mut bytes, mut copied) = (Vec::new(), 0);
    for region in 0..u16::try_from(pages.regions()).unwrap() {
        sources.rearm(region, 0, pages.region_words(region)).unwrap();
        for page in (0..pages.region_pages(region)).filter(|page| pages.get(region, *page)) {
            let range = PageRange { region, first_page: page, pages: 1 };
            from.copy_out(range, &mut bytes).unwrap();
            to.copy_in(range, &bytes).unwrap();
            copied += 1;
        }
    }
    copied
}
