//! A guest in a file: damage of any sort is noticed before anything of it is believed.

use std::fs::OpenOptions;
use std::io;

use pageferry_rust_vmm::time::Meanwhile;
use pageferry_vmm::guest::{Guest, GuestKind};
use pageferry_vmm::ram::{Backing, Ram};
use pageferry_vmm::snapshot::{self, Fate, Snapshot, SnapshotError};
use pageferry_vmm::workload::WorkloadKind;

use crate::common::{MIB, assert_ok, booted, config, kinds, run_for_beats};

/// A guest of little memory that has run for a while, and its file.
fn saved(kind: GuestKind) -> (Guest, Vec<u8>) {
    let mut config = config(kind, WorkloadKind::Random, 2);
    config.regions = Ram::pc_regions(4 * MIB);
    config.workload.working_set_bytes = 64 << 10;
    let mut guest = booted(config);
    run_for_beats(&mut guest, 20);
    let mut file = Vec::new();
    let snapshot = Snapshot::of(&mut guest).expect("a paused guest");
    snapshot.write(&mut file, &Fate::default()).expect("save");
    (guest, file)
}

fn restored(file: &[u8]) -> Result<Guest, SnapshotError> {
    snapshot::restore(&mut &*file, Backing::Anonymous, Meanwhile::StandsStill)
        .map(|(guest, _)| guest)
}

/// Numbers below `end`, all of them if there are no more than `most`.
fn sampled(end: usize, most: usize, seed: &mut u64) -> Vec<usize> {
    if end <= most {
        return (0..end).collect();
    }
    let mut next = || {
        *seed =
            seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(*seed >> 16).expect("64 bits") % end
    };
    (0..most).map(|_| next()).collect()
}

fn seed() -> u64 {
    let seed = std::env::var("PAGEFERRY_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("PAGEFERRY_SEED={seed}");
    seed
}

#[test]
fn what_was_saved_is_restored() {
    for kind in kinds() {
        let (guest, file) = saved(kind);
        let mut restored = restored(&file).expect("restore");
        assert_eq!(restored.heartbeat().beats, guest.heartbeat().beats);
        assert_ok(&restored);
        run_for_beats(&mut restored, 20);
        assert_ok(&restored);
    }
}

#[test]
fn a_flipped_bit_is_noticed_wherever_it_is() {
    let mut seed = seed();
    let (_, file) = saved(GuestKind::Process);
    let mut memory = &*file;
    snapshot::read_header(&mut memory).expect("a header");
    let memory_at = file.len() - memory.len();
    // What is before the memory is little, and each of its bytes means something.
    let head = sampled(memory_at * 8, 2000, &mut seed);
    let memory = sampled((file.len() - memory_at) * 8, 600, &mut seed);
    let memory = memory.into_iter().map(|bit| memory_at * 8 + bit);
    let fixed = 0..64 * 8;
    for bit in fixed.chain(head).chain(memory) {
        let mut file = file.clone();
        file[bit / 8] ^= 1 << (bit % 8);
        let result = restored(&file);
        assert!(result.is_err(), "bit {} of byte {}: restored", bit % 8, bit / 8);
    }
}

#[test]
fn a_file_that_was_cut_is_noticed_wherever_it_was() {
    let mut seed = seed();
    let (_, file) = saved(GuestKind::Process);
    let ends = sampled(file.len(), 500, &mut seed);
    for end in ends.into_iter().chain(0..100).chain(file.len() - 100..file.len()) {
        let error = restored(&file[..end]).map(|_| ()).expect_err("restored");
        assert!(matches!(error, SnapshotError::Malformed(_)), "cut at {end}: {error}");
    }
    let error = restored(&[&*file, b"x"].concat()).map(|_| ()).expect_err("restored");
    assert!(matches!(error, SnapshotError::Malformed(_)), "{error}");
}

#[test]
fn a_full_disk_is_said_and_the_guest_goes_on() {
    for kind in kinds() {
        let (mut guest, _) = saved(kind);
        let mut full = OpenOptions::new().write(true).open("/dev/full").expect("open");
        let snapshot = Snapshot::of(&mut guest).expect("a paused guest");
        let error = snapshot.write(&mut full, &Fate::default()).expect_err("saved");
        let SnapshotError::Io { operation: "write", source } = &error else { panic!("{error}") };
        assert_eq!(source.kind(), io::ErrorKind::StorageFull);
        run_for_beats(&mut guest, 20);
        assert_ok(&guest);
    }
}

/// Also where nothing of it has to be written: most of a guest may be zero.
#[test]
fn a_guest_whose_saving_is_called_off_goes_on() {
    for kind in kinds() {
        let (mut guest, _) = saved(kind);
        let fate = Fate::default();
        let snapshot = Snapshot::of(&mut guest).expect("a paused guest");
        assert!(fate.decide());
        let mut file = Vec::new();
        let error = snapshot.write(&mut file, &fate).expect_err("saved");
        assert!(matches!(error, SnapshotError::CalledOff), "{error}");
        assert!(file.len() < 1 << 20, "{} bytes", file.len());
        run_for_beats(&mut guest, 20);
        assert_ok(&guest);
    }
}
