//! Guests that are slowed down.

use std::time::Duration;

use crate::common::{assert_ok, booted, config, kinds};
use pageferry_vmm::guest::Guest;
use pageferry_vmm::workload::WorkloadKind;

/// Steps that a running guest takes in a while.
fn steps(guest: &mut Guest) -> u64 {
    let before = guest.check_oracle().writes;
    guest.resume().expect("resume");
    std::thread::sleep(Duration::from_millis(300));
    guest.pause().expect("pause");
    guest.check_oracle().writes - before
}

/// A busy machine may slow a guest down by half, but not by nine tenths, and the other way round.
#[test]
fn a_throttled_guest_takes_fewer_steps_and_goes_on_beating() {
    for kind in kinds() {
        for rate in [None, Some(20_000)] {
            let mut config = config(kind, WorkloadKind::Random, 2);
            config.workload.dirty_rate_pages_per_second = rate;
            let mut guest = booted(config);
            let free = steps(&mut guest);
            guest.throttle(95);
            assert_eq!(guest.throttle_percent(), 95);
            let beats = guest.heartbeat().beats;
            let slow = steps(&mut guest);
            assert!(slow > 0 && slow < free / 3, "{kind}, {rate:?}: {slow} after {free}");
            assert!(guest.heartbeat().beats > beats + 5, "{kind}, {rate:?}");
            guest.throttle(0);
            let again = steps(&mut guest);
            assert!(again > slow * 2, "{kind}, {rate:?}: {again} after {slow}");
            assert_ok(&guest);
        }
    }
}
