//! What only shows from inside: registers after a move, and dirty logging by the handles.

use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SMM,
    kvm_userspace_memory_region,
};
use pageferry_device_state::{RawSection, StreamWriter, Writer, sections};
use pageferry_rust_vmm::time::Meanwhile;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::state::{ClockState, VcpuState};
use crate::guest::{Guest, GuestConfig, GuestKind, kvm_available, workload_available};
use crate::layout::{Layout, PAGE_BYTES, WORKING_SET, slot};
use crate::ram::{Backing, Ram};
use crate::workload::{WorkloadConfig, WorkloadKind};

const TSC: u32 = 0x10;

fn guest() -> Option<Guest> {
    guest_with(WorkloadKind::HotCold)
}

fn guest_with(kind: WorkloadKind) -> Option<Guest> {
    guest_of(kind, 2)
}

fn guest_of(kind: WorkloadKind, vcpus: u8) -> Option<Guest> {
    let available = kvm_available()
        .and_then(|()| workload_available(GuestKind::Kvm, kind).map_err(|e| e.to_string()));
    if let Err(reason) = available {
        let thread = std::thread::current();
        eprintln!("{} skipped, because {reason}", thread.name().unwrap_or("a test"));
        return None;
    }
    let config = GuestConfig {
        kind: GuestKind::Kvm,
        regions: Ram::pc_regions(8 << 20),
        backing: Backing::Anonymous,
        vcpus,
        cpu: None,
        workload: WorkloadConfig {
            kind,
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
    let vcpus = sections(state).unwrap().into_iter().filter(|section| section.name == "vcpu");
    vcpus.map(|section| section.state().unwrap()).collect()
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

fn time(state: &[u8]) -> ClockState {
    let clock = sections(state).unwrap().into_iter().find(|section| section.name == "clock");
    clock.expect("a clock").state().unwrap()
}

/// All counters are in step, and KVM derives its clock from them.
fn assert_in_step(time: &ClockState, vcpus: usize) {
    assert_eq!(time.tsc, vec![time.tsc[0]; vcpus]);
    assert!(time.realtime_ns.is_some(), "no master clock: {time:?}");
}

/// What has passed between two states by KVM's clock, by the counters, and by the hosts' clock, in nanoseconds.
fn passed(then: &ClockState, now: &ClockState) -> [u64; 3] {
    let ticks = now.tsc[0].checked_sub(then.tsc[0]).expect("a counter went back");
    let khz = then.tsc_khz.unwrap();
    [
        now.nanoseconds.checked_sub(then.nanoseconds).expect("the clock went back"),
        u64::try_from(u128::from(ticks) * 1_000_000 / u128::from(khz)).unwrap(),
        now.realtime_ns.unwrap() - then.realtime_ns.unwrap(),
    ]
}

/// Offsets of 64 virtual CPUs: in step before, after a switchover that was called off, and at the destination,
/// where the guest's time has gone on by what was between, or stood still.
#[test]
fn the_time_of_all_virtual_cpus_moves_from_one_moment() {
    const VCPUS: u8 = 64;
    /// Reading two clocks one after the other, and what counters of 250 ppm may differ in some seconds.
    const CLOSE_NS: u64 = 5_000_000;
    let Some(mut source) = guest_of(WorkloadKind::Idle, VCPUS) else { return };
    source.boot().unwrap();
    run(&mut source);
    let called_off = time(&source.save().unwrap());
    if called_off.tsc.is_empty() {
        // Nor has one that is alone, which nothing could be out of step with.
        let mut alone = guest_of(WorkloadKind::Idle, 1).unwrap();
        alone.boot().unwrap();
        run(&mut alone);
        assert!(time(&alone.save().unwrap()).tsc.is_empty(), "{VCPUS} are out of step");
        return eprintln!("time skipped, because this KVM has no offsets of time stamp counters");
    }
    assert_in_step(&called_off, VCPUS.into());
    run(&mut source);
    let state = source.save().unwrap();
    let saved = time(&state);
    assert_in_step(&saved, VCPUS.into());
    let [clock, counters, hosts] = passed(&called_off, &saved);
    assert!(clock.abs_diff(counters) < CLOSE_NS && clock.abs_diff(hosts) < CLOSE_NS);

    // SAFETY: it reads a counter.
    let host = unsafe { std::arch::x86_64::_rdtsc() };
    if host.abs_diff(saved.tsc[0]) < u64::from(saved.tsc_khz.unwrap()) * 1000 {
        return eprintln!(
            "time skipped, because this KVM gives guests the host's counter as it is"
        );
    }
    for meanwhile in [Meanwhile::GoesOn, Meanwhile::StandsStill] {
        let mut destination = guest_of(WorkloadKind::Idle, VCPUS).unwrap();
        destination.set_meanwhile(meanwhile);
        let between = Instant::now();
        destination.load(&state).unwrap();
        let loaded = time(&destination.save().unwrap());
        let loading = u64::try_from(between.elapsed().as_nanos()).unwrap();
        assert_in_step(&loaded, VCPUS.into());
        let [clock, counters, hosts] = passed(&saved, &loaded);
        assert!(clock.abs_diff(counters) < CLOSE_NS, "{clock} {counters}");
        match meanwhile {
            Meanwhile::GoesOn => assert!(clock.abs_diff(hosts) < CLOSE_NS, "{clock} {hosts}"),
            // Since it was loaded, that is.
            Meanwhile::StandsStill => assert!(clock < loading + CLOSE_NS, "{clock} {loading}"),
        }
        // It runs, and its time goes on from there.
        copy_memory(&source, &destination);
        run(&mut destination);
        let later = time(&destination.save().unwrap());
        assert_in_step(&later, VCPUS.into());
        passed(&loaded, &later);
    }
}

/// What an older program saved has no counters: they are set as registers, which KVM may take for a second write
/// to one that it has set itself within the same second, and leave as it is.
#[test]
fn time_without_offsets_is_loaded_too() {
    let (Some(mut source), Some(mut destination)) = (guest(), guest()) else { return };
    source.boot().unwrap();
    run(&mut source);
    let state = source.save().unwrap();
    let mut before = time(&state);
    (before.tsc, before.realtime_ns) = (Vec::new(), None);
    let mut older = StreamWriter::new();
    for RawSection { name, instance, version, payload, .. } in sections(&state).unwrap() {
        let same = payload.clone().take(payload.left()).unwrap();
        if name == "clock" {
            older.state(instance, &mut before).unwrap();
        } else {
            let copied = |out: &mut Writer| {
                out.put(same);
                Ok(())
            };
            older.section(name, instance, version, copied).unwrap();
        }
    }
    destination.load(&older.finish()).unwrap();
    let loaded = time(&destination.save().unwrap());
    assert!(loaded.nanoseconds >= before.nanoseconds, "the clock went back");
    copy_memory(&source, &destination);
    run(&mut destination);
}

/// Something that a virtual CPU may be in the middle of.
type InTheMiddle = (&'static str, fn(&mut VcpuState), fn(&VcpuState) -> bool);

const IN_THE_MIDDLE: [InTheMiddle; 8] = [
    (
        "halted",
        |vcpu| vcpu.mp_state.mp_state = KVM_MP_STATE_HALTED,
        |vcpu| vcpu.mp_state.mp_state == KVM_MP_STATE_HALTED,
    ),
    (
        "waiting for a start-up interrupt",
        |vcpu| vcpu.mp_state.mp_state = KVM_MP_STATE_INIT_RECEIVED,
        |vcpu| vcpu.mp_state.mp_state == KVM_MP_STATE_INIT_RECEIVED,
    ),
    (
        "not started",
        |vcpu| vcpu.mp_state.mp_state = KVM_MP_STATE_UNINITIALIZED,
        |vcpu| vcpu.mp_state.mp_state == KVM_MP_STATE_UNINITIALIZED,
    ),
    (
        "with a non-maskable interrupt pending",
        |vcpu| {
            vcpu.events.nmi.pending = 1;
            vcpu.events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
        },
        |vcpu| vcpu.events.nmi.pending == 1,
    ),
    (
        "in a non-maskable interrupt",
        |vcpu| vcpu.events.nmi.masked = 1,
        |vcpu| vcpu.events.nmi.masked == 1,
    ),
    (
        "with a system management interrupt pending",
        |vcpu| {
            vcpu.events.smi.pending = 1;
            vcpu.events.flags |= KVM_VCPUEVENT_VALID_SMM;
        },
        |vcpu| vcpu.events.smi.pending == 1,
    ),
    ("stepping", |vcpu| vcpu.regs.rflags |= 1 << 8, |vcpu| vcpu.regs.rflags & 1 << 8 != 0),
    (
        "with a breakpoint",
        |vcpu| {
            vcpu.debug_regs.db[0] = 0x1234_5000;
            vcpu.debug_regs.dr7 |= 1;
        },
        |vcpu| vcpu.debug_regs.db[0] == 0x1234_5000 && vcpu.debug_regs.dr7 & 1 != 0,
    ),
];

#[test]
fn virtual_cpus_move_as_they_are() {
    let (Some(mut first), Some(mut source), Some(mut destination)) = (guest(), guest(), guest())
    else {
        return;
    };
    first.boot().unwrap();
    run(&mut first);
    let state = first.save().unwrap();
    let mut moved = 0;
    for (name, change, is_so) in IN_THE_MIDDLE {
        let taken = source.load(&changed(&state, &change)).and_then(|()| source.save());
        let Some(state) = taken.ok().filter(|state| is_so(&vcpus(state)[1])) else {
            eprintln!("a virtual CPU {name} skipped, because this KVM does not take it");
            continue;
        };
        destination.load(&state).unwrap();
        let arrived = destination.save().unwrap();
        assert!(is_so(&vcpus(&arrived)[1]), "{name}");
        for (saved, loaded) in vcpus(&state).iter().zip(&vcpus(&arrived)) {
            saved.assert_same(loaded);
        }
        moved += 1;
    }
    assert!(moved >= 3, "only {moved} were taken");
}

/// What KVM keeps of a guest's guests is not in the state: that is said when it is to be saved.
#[test]
fn a_guest_that_runs_guests_is_not_saved() {
    const SVME: u64 = 1 << 12;
    const VMXE: u64 = 1 << 13;
    let (Some(mut first), Some(mut nesting)) = (guest(), guest()) else { return };
    first.boot().unwrap();
    let state = first.save().unwrap();
    let turn_on: [&dyn Fn(&mut VcpuState); 2] =
        [&|vcpu| vcpu.sregs.efer |= SVME, &|vcpu| vcpu.sregs.cr4 |= VMXE];
    let refusals = turn_on.map(|on| {
        nesting.load(&changed(&state, on)).ok()?;
        Some(nesting.save())
    });
    if refusals.iter().all(Option::is_none) {
        return eprintln!("guests of guests skipped, because this KVM has none");
    }
    for refused in refusals.into_iter().flatten() {
        let why = pageferry::Chain::of(&refused.unwrap_err()).to_string();
        assert!(why.contains("the guest runs guests of its own"), "{why}");
    }
}

/// Vector registers that virtual CPUs cannot have are refused before anything is loaded.
#[test]
fn components_beside_xcr0_are_refused() {
    /// PKRU, or else the tiles of AMX.
    const BESIDE: [u32; 2] = [1 << 9, 1 << 18];
    let (Some(mut source), Some(mut destination)) = (guest(), guest()) else { return };
    source.boot().unwrap();
    let state = source.save().unwrap();
    let offered = source.config().cpu.as_ref().unwrap().xsave_components();
    let Some(beside) = BESIDE.into_iter().find(|bit| offered & u64::from(*bit) == 0) else {
        return eprintln!("components skipped, because this KVM has both PKRU and AMX");
    };
    let refused =
        destination.load(&changed(&state, &|vcpu| vcpu.xsave[128] |= beside)).unwrap_err();
    let why = pageferry::Chain::of(&refused).to_string();
    assert!(why.contains(&format!("bits {beside:#x} of XSTATE_BV")), "{why}");
    // As it was: the state as it is can be loaded.
    destination.load(&state).unwrap();
}

/// The same state, with the second virtual CPU changed.
fn changed(state: &[u8], change: &dyn Fn(&mut VcpuState)) -> Vec<u8> {
    let mut changed = StreamWriter::new();
    for RawSection { name, instance, version, payload, .. } in sections(state).unwrap() {
        let same = payload.clone().take(payload.left()).unwrap();
        if (name, instance) == ("vcpu", 1) {
            let mut vcpu = vcpus(state).remove(1);
            change(&mut vcpu);
            changed.state(instance, &mut vcpu).unwrap();
        } else {
            let copied = |out: &mut Writer| {
                out.put(same);
                Ok(())
            };
            changed.section(name, instance, version, copied).unwrap();
        }
    }
    changed.finish()
}

/// Words of the XSAVE area that hold ST0 to ST7, each XMM register, and each upper half of a YMM
/// register; in four of a register some bits of each of two lanes.
fn register_words() -> impl Iterator<Item = (String, usize)> {
    let stack = (0..8).flat_map(|n| [1, 2].map(|word| (format!("st{n}"), 8 + 4 * n + word)));
    let halves = |name: &'static str, first: usize| {
        (0..16).flat_map(move |n| [1, 3].map(|word| (format!("{name}{n}"), first + 4 * n + word)))
    };
    stack.chain(halves("xmm", 40)).chain(halves("upper half of ymm", 144))
}

/// Each register is lost alone, swapped with the next one, and computed on with.
#[test]
fn a_lost_register_shows() {
    let (Some(mut source), Some(mut destination)) =
        (guest_with(WorkloadKind::Fpu), guest_with(WorkloadKind::Fpu))
    else {
        return;
    };
    source.boot().unwrap();
    run(&mut source);
    run(&mut source);
    assert!(source.check_oracle().ok, "{:?}", source.check_oracle());
    copy_memory(&source, &destination);
    let state = source.save().unwrap();
    let load_changed = |guest: &mut Guest, change: &dyn Fn(&mut [u32])| {
        guest.load(&changed(&state, &|vcpu| change(&mut vcpu.xsave))).unwrap();
    };
    let mut noticed = 0;
    for (name, word) in register_words() {
        load_changed(&mut destination, &|xsave| xsave[word] ^= 1 << 9);
        let report = destination.check_oracle();
        assert!(!report.ok && !report.fpu_intact, "{name}, word {word}: {report:?}");
        noticed += 1;
    }
    for first in (8..36).step_by(4).chain((40..100).step_by(4)).chain((144..204).step_by(4)) {
        load_changed(&mut destination, &|xsave| {
            let (low, high) = xsave.split_at_mut(first + 4);
            low[first..].swap_with_slice(&mut high[..4]);
        });
        assert!(!destination.check_oracle().fpu_intact, "words from {first} swapped");
        noticed += 1;
    }
    // The x87 control word, the number of ST0, MXCSR.
    for (word, bit) in [(0, 9), (0, 28), (6, 13)] {
        load_changed(&mut destination, &|xsave| xsave[word] ^= 1 << bit);
        assert!(!destination.check_oracle().fpu_intact, "bit {bit} of word {word}");
        noticed += 1;
    }
    eprintln!("{noticed} damaged registers noticed");
    load_changed(&mut destination, &|_| ());
    assert_eq!(destination.check_oracle(), source.check_oracle());
    run(&mut destination);
    assert!(destination.check_oracle().ok, "{:?}", destination.check_oracle());
    // Once it was computed with, memory tells too. XMM3 is a chain.
    copy_memory(&source, &destination);
    load_changed(&mut destination, &|xsave| xsave[40 + 4 * 3 + 1] ^= 1 << 9);
    let mut report = destination.check_oracle();
    // Until that virtual CPU has stored a checkpoint, which on a busy machine takes a while.
    for _ in 0..100 {
        run(&mut destination);
        report = destination.check_oracle();
        assert!(!report.ok, "{report:?}");
        if report.detail.contains("of its registers after step") {
            return;
        }
    }
    panic!("not noticed in memory: {report:?}");
}

/// Wherever the guest is led astray, the VMM is told by which exception: it does not just end.
#[test]
fn an_exception_in_the_guest_is_a_sentence() {
    const UNMAPPED: u64 = 0x7f_0000_0000;
    const UNDEFINED: u64 = WORKING_SET - PAGE_BYTES;
    for (rip, expected) in [
        (UNMAPPED, "exception 14 (page fault), error code 0x0, at rip 0x7f00000000, rsp 0x"),
        (UNDEFINED, "exception 6 (invalid opcode), error code 0x0, at rip 0x1ff000, rsp 0x"),
    ] {
        let Some(mut guest) = guest() else { return };
        guest.boot().unwrap();
        run(&mut guest);
        guest.ram().memory().write_obj(0x0b0f_u16, GuestAddress(UNDEFINED)).unwrap();
        let state = guest.save().unwrap();
        let canary = vcpus(&state)[1].regs.rsp;
        guest.load(&changed(&state, &|vcpu| vcpu.regs.rip = rip)).unwrap();
        guest.resume().unwrap();
        let start = Instant::now();
        let failure = loop {
            if let Some(failure) = guest.failure() {
                break failure;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "the exception is not told");
            std::thread::yield_now();
        };
        let expected = format!("{expected}{canary:x},");
        assert!(failure.contains(&expected), "{failure}");
        if rip == UNMAPPED {
            assert!(failure.contains("cr2 0x7f00000000"), "{failure}");
        }
    }
}

fn copy_memory(from: &Guest, to: &Guest) {
    let mut page = vec![0; 4096];
    for region in from.ram().memory().iter() {
        for offset in (0..region.len()).step_by(page.len()) {
            let address = GuestAddress(region.start_addr().0 + offset);
            from.ram().memory().read_slice(&mut page, address).unwrap();
            to.ram().memory().write_slice(&page, address).unwrap();
        }
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
    for vcpu in 0..2 {
        // On a busy machine one of them may have done all the beats.
        let beats = Layout::slot(vcpu) + slot::BEATS_MEMORY;
        let beats: u64 = guest.ram().memory().read_obj(GuestAddress(beats)).unwrap();
        assert!(is_dirty(Layout::slot(vcpu)) || beats == 0, "the slot of vcpu {vcpu}: {beats}");
    }
    // Pages that were only read may be in it too: some KVMs map them writable on the occasion.
    assert!(!is_dirty(Layout::slot(2)), "the slot of a virtual CPU that the guest does not have");
    let written = (0..1024).filter(|page| is_dirty(WORKING_SET + page * PAGE_BYTES)).count();
    assert!(written > 10, "{written}");
    assert!(guest.check_oracle().ok);
}
