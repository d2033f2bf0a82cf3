//! A guest moved within the process: memory copied, state saved and loaded.

use std::time::Duration;

use crate::common::{
    MIB, assert_ok, booted, config, copy_memory, kinds, run_for_beats, wait_for_beats, workloads,
};
use pageferry_device_state::{LoadError, Problem, sections};
use pageferry_vmm::error::{GuestError, StateError};
use pageferry_vmm::guest::{Guest, GuestConfig, GuestKind};
use pageferry_vmm::workload::WorkloadKind;

/// Moves a paused guest; the source stays as it was.
fn moved(source: &mut Guest, config: GuestConfig) -> Guest {
    let mut destination = Guest::create(config).expect("create");
    copy_memory(source, &destination);
    let state = source.save().expect("save");
    destination.load(&state).expect("load");
    destination
}

#[test]
fn a_moved_guest_goes_on() {
    for kind in kinds() {
        for workload in workloads(kind) {
            for vcpus in [1, 2] {
                let config = config(kind, workload, vcpus);
                let mut guest = booted(config.clone());
                run_for_beats(&mut guest, 20);
                for _ in 0..3 {
                    let before = guest.heartbeat();
                    let mut next = moved(&mut guest, config.clone());
                    assert_ok(&next);
                    assert_eq!(next.check_oracle(), guest.check_oracle());
                    assert_eq!(next.heartbeat(), before);
                    run_for_beats(&mut next, 20);
                    assert_ok(&next);
                    assert!(next.check_oracle().beats >= before.beats + 19);
                    guest = next;
                }
                assert!(guest.serial_output().is_empty(), "it printed again");
            }
        }
    }
}

#[test]
fn memory_above_4_gib_moves_too() {
    for kind in kinds() {
        let mut config = config(kind, WorkloadKind::Sequential, 2);
        config.regions = vec![(0, 4 * MIB), (4 << 30, 8 * MIB)];
        config.workload.working_set_bytes = 9 * MIB;
        let mut source = booted(config.clone());
        run_for_beats(&mut source, 30);
        let mut destination = moved(&mut source, config);
        run_for_beats(&mut destination, 30);
        assert_ok(&destination);
    }
}

#[test]
fn the_source_can_go_on_after_a_save() {
    for kind in kinds() {
        let config = config(kind, WorkloadKind::Random, 2);
        let mut source = booted(config.clone());
        run_for_beats(&mut source, 10);
        let destination = moved(&mut source, config);
        drop(destination);
        run_for_beats(&mut source, 10);
        assert_ok(&source);
    }
}

#[test]
fn the_heartbeat_gap_spans_the_move() {
    for kind in kinds() {
        let config = config(kind, WorkloadKind::Idle, 1);
        let mut source = booted(config.clone());
        run_for_beats(&mut source, 10);
        source.reset_heartbeat_gap();
        let mut destination = moved(&mut source, config);
        assert_eq!(destination.heartbeat().longest_gap_ns, 0);
        let still = Duration::from_millis(30);
        std::thread::sleep(still);
        destination.resume().unwrap();
        wait_for_beats(&destination, 3);
        let gap = Duration::from_nanos(destination.heartbeat().longest_gap_ns);
        assert!(gap >= still, "{gap:?}");
    }
}

#[test]
fn pages_left_behind_are_noticed() {
    for kind in kinds() {
        let config = config(kind, WorkloadKind::Sequential, 1);
        let mut source = booted(config.clone());
        run_for_beats(&mut source, 10);
        let mut destination = Guest::create(config).unwrap();
        copy_memory(&source, &destination);
        run_for_beats(&mut source, 10);
        destination.load(&source.save().unwrap()).unwrap();
        // Memory of then with the registers of now: the slot, at least, is of another time.
        run_for_beats(&mut destination, 3);
        assert!(!destination.check_oracle().ok, "{kind}");
    }
}

#[test]
fn bad_states_are_typed_errors() {
    for kind in kinds() {
        let config = config(kind, WorkloadKind::Random, 2);
        let mut source = booted(config.clone());
        run_for_beats(&mut source, 5);
        let good = source.save().unwrap();
        let mut guest = Guest::create(config.clone()).unwrap();

        let load = |guest: &mut Guest, bytes: &[u8]| match guest.load(bytes) {
            Err(GuestError::State(error)) => error,
            other => panic!("{} bytes: {other:?}", bytes.len()),
        };
        let problem = |guest: &mut Guest, bytes: &[u8]| match load(guest, bytes) {
            StateError::Load(LoadError::Decode(error)) => format!("{:?}", error.problem()),
            other => panic!("{} bytes: {other:?}", bytes.len()),
        };
        assert!(problem(&mut guest, &[]).starts_with("Magic"));
        assert!(problem(&mut guest, &[0xff; 5000]).starts_with("Magic"));
        let mut format = good.clone();
        format[8] ^= 0x7f;
        assert!(problem(&mut guest, &format).starts_with("Format"));
        let mut damaged = good.clone();
        damaged[good.len() / 2] ^= 1;
        assert!(problem(&mut guest, &damaged).starts_with("Checksum"));
        // A step through all lengths, all of them near the end.
        for len in (0..good.len()).step_by(97).chain(good.len() - 20..good.len()) {
            load(&mut guest, &good[..len]);
        }
        let mut long = good.clone();
        long.push(0);
        assert!(problem(&mut guest, &long).starts_with("Trailing"));

        let mut other = config.clone();
        other.vcpus = 1;
        let mut other = Guest::create(other).unwrap();
        let unknown = load(&mut other, &good);
        assert!(
            matches!(unknown, StateError::Load(LoadError::Unknown { instance: 1, .. })),
            "{unknown}"
        );
        // None of these touched the guest.
        assert!(matches!(guest.resume(), Err(GuestError::Empty { .. })));
        copy_memory(&source, &guest);
        guest.load(&good).unwrap();
        run_for_beats(&mut guest, 5);
        assert_ok(&guest);
    }
}

/// The stream with the checksums that its bytes have.
fn repaired(mut stream: Vec<u8>) -> Vec<u8> {
    while let Err(error) = sections(&stream) {
        let Problem::Checksum { computed, .. } = error.problem() else { break };
        let at = usize::try_from(error.place().offset_bytes).unwrap() + 20;
        stream[at..at + 4].copy_from_slice(&computed.to_le_bytes());
    }
    stream
}

#[test]
fn damaged_states_never_panic() {
    for kind in kinds() {
        let config = config(kind, WorkloadKind::HotCold, 1);
        let mut source = booted(config.clone());
        run_for_beats(&mut source, 5);
        let good = source.save().unwrap();
        let mut guest = Guest::create(config).unwrap();
        copy_memory(&source, &guest);
        let (mut loaded, mut refused) = (0, 0);
        for byte in (10..good.len()).step_by(13) {
            let mut bad = good.clone();
            bad[byte] ^= 1 << (byte % 8);
            // With checksums that fit, so that it gets as far as it can.
            match guest.load(&repaired(bad)) {
                Ok(()) => loaded += 1,
                Err(error) => {
                    refused += 1;
                    assert!(error.to_string().starts_with("failed to"), "{error}");
                }
            }
        }
        eprintln!("{kind}: of the damaged states {loaded} loaded and {refused} were refused");
        // A load after a failed one is whole again.
        guest.load(&good).unwrap();
        run_for_beats(&mut guest, 5);
        assert_ok(&guest);
    }
}

#[test]
fn a_state_of_the_other_kind_is_refused() {
    if !kinds().contains(&GuestKind::Kvm) {
        return;
    }
    let mut kvm = booted(config(GuestKind::Kvm, WorkloadKind::Idle, 1));
    let mut process = booted(config(GuestKind::Process, WorkloadKind::Idle, 1));
    let state = kvm.save().unwrap();
    let error = process.load(&state).unwrap_err();
    assert!(
        matches!(error, GuestError::State(StateError::Load(LoadError::Missing { .. }))),
        "{error}"
    );
    assert!(kvm.load(&process.save().unwrap()).is_err());
    run_for_beats(&mut kvm, 3);
    run_for_beats(&mut process, 3);
}
