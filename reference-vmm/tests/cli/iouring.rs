//! io_uring, at both ends and at either.

use pageferry_iouring::{IoUringOptions, Rings};

use crate::support::host::skipped;
use crate::support::process::Process;
use crate::support::report::Report;
use crate::support::sides::{destination, source};

/// Whether this kernel has io_uring for us, having said why not.
fn io_uring_works() -> bool {
    match Rings::new(IoUringOptions::default()) {
        Ok(_) => true,
        Err(unavailable) => {
            skipped(&unavailable.to_string());
            false
        }
    }
}

/// Runs a demo over io_uring that must succeed, if there is io_uring.
fn completes(more: &[&str]) -> Option<Report> {
    if !io_uring_works() {
        return None;
    }
    let own = ["demo", "--json", "--transport=iouring", "--memory=128M", "--working-set=8M"];
    let mut demo = Process::start("demo", &[&own, more, &["--backing=memfd"]].concat());
    let report = demo.finish().report(0);
    report.assert_contract();
    report.assert_departed();
    report.assert_arrived();
    assert_eq!(report.text("transport"), "iouring");
    assert_eq!(report.flag("memory_match"), Some(true), "{report:?}");
    Some(report)
}

#[test]
fn one_channel_and_a_sequential_guest() {
    let Some(report) = completes(&["--channels=1"]) else { return };
    assert_eq!((report.count("channels"), report.text("workload")), (1, "sequential"));
}

#[test]
fn eight_channels_and_a_sequential_guest() {
    let Some(report) = completes(&["--channels=8"]) else { return };
    assert_eq!((report.count("channels"), report.text("workload")), (8, "sequential"));
}

#[test]
fn one_channel_and_a_random_guest() {
    let Some(report) = completes(&["--channels=1", "--workload=random"]) else { return };
    assert_eq!((report.count("channels"), report.text("workload")), (1, "random"));
}

#[test]
fn eight_channels_and_a_random_guest() {
    let Some(report) = completes(&["--channels=8", "--workload=random"]) else { return };
    assert_eq!((report.count("channels"), report.text("workload")), (8, "random"));
}

#[test]
fn memory_is_registered_only_if_zero_copy_is_asked_for() {
    let Some(report) = completes(&["--zero-copy=auto"]) else { return };
    assert!(report.number("registration_ms") == 0.0, "{report:?}");
    let Some(report) = completes(&["--zero-copy=on"]) else { return };
    assert!(report.number("registration_ms") > 0.0, "{report:?}");
}

/// A migration by hand between two transports.
fn moves(from: &str, to: &str) {
    if !io_uring_works() {
        return;
    }
    let (mut destination, address) = destination(&["--transport", to]);
    let mut source = source(&["--transport", from, "--verify"]);
    source.say(format!("migrate {address}"));
    let departed = source.finish().report(0);
    departed.assert_departed();
    assert_eq!(departed.text("transport"), from);
    let arrived = destination.finish().report(0);
    arrived.assert_arrived();
    assert_eq!(arrived.text("transport"), to);
    for report in [departed, arrived] {
        assert_eq!(report.flag("memory_match"), Some(true), "{report:?}");
    }
}

#[test]
fn from_tcp_to_iouring() {
    moves("tcp", "iouring");
}

#[test]
fn from_iouring_to_tcp() {
    moves("iouring", "tcp");
}
