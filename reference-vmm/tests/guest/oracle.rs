//! The oracles tell right from wrong.

use crate::common::{
    assert_ok, booted, config, kinds, read_page, run_for_beats, workloads, write_page,
};
use pageferry_vmm::error::GuestError;
use pageferry_vmm::guest::Guest;
use pageferry_vmm::workload::WorkloadKind;

#[test]
fn the_oracle_notices_a_corrupted_page() {
    for kind in kinds() {
        for workload in workloads(kind) {
            let mut guest = booted(config(kind, workload, 2));
            run_for_beats(&mut guest, 20);
            for page in [0, 1, 300, 1023] {
                // The counter or pattern, and the tag or pattern.
                for byte in [1, 4095] {
                    let good = read_page(&guest, page);
                    let mut bad = good.clone();
                    bad[byte] ^= 0x40;
                    write_page(&guest, page, &bad);
                    let report = guest.check_oracle();
                    assert!(!report.ok, "{kind} {workload} page {page} byte {byte}: {report:?}");
                    write_page(&guest, page, &good);
                    assert_ok(&guest);
                }
            }
        }
    }
}

#[test]
fn the_oracle_notices_an_old_page() {
    for kind in kinds() {
        for workload in [WorkloadKind::Sequential, WorkloadKind::Random, WorkloadKind::HotCold] {
            let mut guest = booted(config(kind, workload, 2));
            run_for_beats(&mut guest, 10);
            let old: Vec<_> = (0..1024).map(|page| read_page(&guest, page)).collect();
            // Two rounds and more, so that no old page passes for the one after it.
            run_for_beats(&mut guest, 30);
            let mut changed = 0;
            for (page, old) in (0..).zip(&old) {
                let new = read_page(&guest, page);
                if *old == new {
                    continue;
                }
                changed += 1;
                if changed % 50 == 1 {
                    write_page(&guest, page, old);
                    assert!(!guest.check_oracle().ok, "{kind} {workload} page {page}");
                    write_page(&guest, page, &new);
                    assert_ok(&guest);
                }
            }
            assert!(changed > 0, "{kind} {workload}");
        }
    }
}

#[test]
fn the_oracle_notices_swapped_pages() {
    for kind in kinds() {
        for workload in workloads(kind) {
            let guest = booted(config(kind, workload, 1));
            let (a, b) = (read_page(&guest, 1), read_page(&guest, 2));
            write_page(&guest, 1, &b);
            write_page(&guest, 2, &a);
            assert!(!guest.check_oracle().ok, "{kind} {workload}");
        }
    }
}

#[test]
fn the_oracle_wants_a_paused_guest_of_this_configuration() {
    for kind in kinds() {
        let guest = Guest::create(config(kind, WorkloadKind::Idle, 1)).unwrap();
        assert!(!guest.check_oracle().ok);
        let mut guest = booted(config(kind, WorkloadKind::Idle, 1));
        guest.resume().unwrap();
        let report = guest.check_oracle();
        assert!(!report.ok && report.detail.contains("running"), "{report:?}");
        assert!(matches!(guest.save(), Err(GuestError::Running { .. })));
        assert!(matches!(guest.fpu_intact(), Err(GuestError::Running { .. })));
    }
}
