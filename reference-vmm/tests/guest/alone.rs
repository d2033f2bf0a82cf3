//! A guest by itself: it runs and stops.

use std::time::{Duration, Instant};

use crate::common::{
    HugePages, MIB, assert_ok, booted, config, kinds, run_for_beats, wait_for_beats, workloads,
};
use pageferry_vmm::error::GuestError;
use pageferry_vmm::guest::{Guest, GuestKind};
use pageferry_vmm::layout::LayoutError;
use pageferry_vmm::ram::{Backing, Ram, RamError};
use pageferry_vmm::workload::{WorkloadError, WorkloadKind};
use vm_memory::{Bytes, GuestAddress};

#[test]
fn every_workload_satisfies_its_oracle() {
    for kind in kinds() {
        for workload in workloads(kind) {
            for vcpus in [1, 2] {
                let mut guest = booted(config(kind, workload, vcpus));
                assert_ok(&guest);
                for _ in 0..3 {
                    run_for_beats(&mut guest, 20);
                    assert_ok(&guest);
                }
                let report = guest.check_oracle();
                assert_eq!(report.writes > 0, workload != WorkloadKind::Idle, "{report:?}");
                // A pause may fall between a beat's count in memory and its device.
                let beats = guest.heartbeat().beats;
                assert!(report.beats.abs_diff(beats) <= vcpus.into(), "{report:?} {beats}");
            }
        }
    }
}

#[test]
fn a_guest_that_computes_is_refused_where_it_would_not_run() {
    let config = |kind| config(kind, WorkloadKind::Fpu, 1);
    let error = Guest::create(config(GuestKind::Process)).unwrap_err();
    assert!(
        matches!(error, GuestError::Workload(WorkloadError::NeedsVirtualCpus(WorkloadKind::Fpu))),
        "{error}"
    );
    if kinds().contains(&GuestKind::Kvm) && !workloads(GuestKind::Kvm).contains(&WorkloadKind::Fpu)
    {
        let error = Guest::create(config(GuestKind::Kvm)).unwrap_err();
        assert!(
            matches!(error, GuestError::Workload(WorkloadError::NotRunByKvm { .. })),
            "{error}"
        );
    }
}

#[test]
fn the_guest_prints_a_line() {
    for kind in kinds() {
        let mut guest = booted(config(kind, WorkloadKind::HotCold, 2));
        run_for_beats(&mut guest, 10);
        let output = String::from_utf8(guest.serial_output()).unwrap();
        assert!(output.starts_with("pageferry guest: hot-cold"), "{output}");
        assert!(output.ends_with("2 vcpus\n"), "{output}");
    }
}

#[test]
fn every_backing_works() {
    let _pages = HugePages::reserve(8);
    for kind in kinds() {
        for backing in [Backing::Anonymous, Backing::Memfd, Backing::Hugetlb] {
            let mut config = config(kind, WorkloadKind::Random, 1);
            config.backing = backing;
            let mut guest = match Guest::create(config) {
                Ok(guest) => guest,
                Err(GuestError::Ram(error @ RamError::NotEnoughHugePages { .. })) => {
                    eprintln!("{kind} guest on hugetlb skipped, because {error}");
                    continue;
                }
                Err(error) => panic!("{error}"),
            };
            assert_eq!(guest.ram().backing(), backing);
            assert_eq!(guest.ram().len_bytes(), 16 * MIB);
            guest.boot().unwrap();
            run_for_beats(&mut guest, 20);
            assert_ok(&guest);
        }
    }
}

#[test]
fn memory_above_4_gib_belongs_to_the_working_set() {
    for kind in kinds() {
        let mut config = config(kind, WorkloadKind::Random, 2);
        config.regions = vec![(0, 4 * MIB), (4 << 30, 8 * MIB)];
        config.workload.working_set_bytes = 8 * MIB;
        let mut guest = booted(config);
        run_for_beats(&mut guest, 50);
        assert_ok(&guest);
    }
}

#[test]
fn pausing_is_quick_and_loses_nothing() {
    for kind in kinds() {
        for (workload, rate) in [
            (WorkloadKind::Sequential, None),
            (WorkloadKind::Random, Some(100)),
            (WorkloadKind::Idle, None),
        ] {
            let mut config = config(kind, workload, 2);
            config.workload.dirty_rate_pages_per_second = rate;
            let mut guest = booted(config);
            let mut latencies = Vec::new();
            for _ in 0..200 {
                guest.resume().unwrap();
                wait_for_beats(&guest, 1);
                let start = Instant::now();
                guest.pause().unwrap();
                latencies.push(start.elapsed());
                let beats = guest.heartbeat().beats;
                std::thread::yield_now();
                assert_eq!(guest.heartbeat().beats, beats);
            }
            assert_ok(&guest);
            latencies.sort();
            let (median, longest) = (latencies[100], latencies[199]);
            eprintln!("{kind} {workload}: pause takes {median:?}, at most {longest:?}");
            assert!(median < Duration::from_millis(20), "{kind} {workload}: {median:?}");
        }
    }
}

#[test]
fn pause_and_resume_may_be_repeated() {
    for kind in kinds() {
        let mut guest = booted(config(kind, WorkloadKind::Sequential, 2));
        guest.pause().unwrap();
        guest.resume().unwrap();
        guest.resume().unwrap();
        wait_for_beats(&guest, 5);
        guest.pause().unwrap();
        guest.pause().unwrap();
        assert_ok(&guest);
        // Dropped while running.
        guest.resume().unwrap();
    }
}

#[test]
fn a_paced_guest_keeps_its_rate_and_beats() {
    for kind in kinds() {
        for rate in [0, 50, 2_000] {
            let mut config = config(kind, WorkloadKind::Random, 2);
            config.workload.dirty_rate_pages_per_second = Some(rate);
            let mut guest = booted(config);
            guest.resume().unwrap();
            wait_for_beats(&guest, 10);
            guest.pause().unwrap();
            let before = guest.check_oracle().writes;
            let start = Instant::now();
            guest.resume().unwrap();
            wait_for_beats(&guest, 200);
            guest.pause().unwrap();
            let seconds = start.elapsed().as_secs_f64();
            let writes = guest.check_oracle().writes - before;
            assert_ok(&guest);
            // Never above the rate; how far below is up to how busy the machine is.
            let most = rate as f64 * (seconds + 0.1) + 2.0;
            assert!(writes as f64 <= most, "{kind} {rate}: {writes} in {seconds} s");
            assert_eq!(writes > 0, rate > 0, "{kind} {rate}: {writes} in {seconds} s");
        }
    }
}

#[test]
fn a_guest_that_does_not_fit_is_refused() {
    let mut config = config(GuestKind::Process, WorkloadKind::Idle, 1);
    config.workload.working_set_bytes = 15 * MIB;
    let error = Guest::create(config.clone()).unwrap_err();
    assert!(matches!(
        error,
        GuestError::Layout(LayoutError::WorkingSetDoesNotFit { needed_bytes, .. })
            if needed_bytes == 17 * MIB
    ));
    config.workload.working_set_bytes = 14 * MIB;
    config.regions = Ram::pc_regions(16 * MIB);
    booted(config);
}

#[test]
fn a_virtual_cpu_that_ends_is_a_failure() {
    if !kinds().contains(&GuestKind::Kvm) {
        return;
    }
    let mut guest = booted(config(GuestKind::Kvm, WorkloadKind::Sequential, 2));
    run_for_beats(&mut guest, 10);
    // Undefined instructions all over the code, and no handler: a triple fault.
    guest.ram().memory().write_slice(&[0x0f, 0x0b].repeat(512), GuestAddress(0x1000)).unwrap();
    guest.resume().unwrap();
    let start = Instant::now();
    while guest.failure().is_none() {
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::yield_now();
    }
    let failure = guest.failure().unwrap();
    eprintln!("{failure}");
    assert!(failure.contains("rip 0x"), "{failure}");
    guest.pause().unwrap();
    assert!(matches!(guest.resume(), Err(GuestError::Failed { .. })));
    assert!(matches!(guest.save(), Err(GuestError::Failed { .. })));
    assert!(!guest.check_oracle().ok);
}
