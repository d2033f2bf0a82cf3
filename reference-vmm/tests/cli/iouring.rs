//! io_uring, at both ends and at either.

use std::process::Command;

use pageferry_iouring::{IoUringOptions, Rings};

use crate::support::host::{process_guests_work, skipped};
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

/// Locked memory of an ordinary user on many systems.
const MEMLOCK: &str = "--memlock=65536:65536";

/// The program as a user who may lock that much, and to whom root's privileges mean nothing; `None`
/// where that can't be had, having said why.
fn as_ordinary_user(name: &'static str, args: &[&str]) -> Option<Process> {
    let program = env!("CARGO_BIN_EXE_pageferry-vmm");
    // A user may have been given the right to exceed the limit.
    let mut user = vec!["setpriv", "--inh-caps=-all"];
    if rustix::process::geteuid().is_root() {
        user.extend(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    }
    user.extend(["prlimit", MEMLOCK]);
    let mut may_run = Command::new(user[0]);
    match may_run.args(&user[1..]).args(["test", "-x", program]).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr).into_owned();
            skipped(&format!("{user:?} may not run {program}: {why}"));
            return None;
        }
        Err(error) => {
            skipped(&format!("{} can't be started: {error}", user[0]));
            return None;
        }
    }
    let args = [&user[1..], &[program], args].concat();
    Some(Process::start_program(name, user[0], &args))
}

/// Rings are locked memory, on kernels that count it. Who does not ask for io_uring gets tcp then, and
/// who does is told which limit it is.
#[test]
fn without_memory_to_lock() {
    if !process_guests_work() || !io_uring_works() {
        return;
    }
    let demo = ["demo", "--json", "--guest=process", "--memory=64M", "--working-set=8M"];
    let Some(mut any) = as_ordinary_user("demo", &demo) else { return };
    let report = any.finish().report(0);
    report.assert_departed();
    report.assert_arrived();
    if report.text("transport") == "iouring" {
        skipped("this kernel does not count rings as locked memory");
        return;
    }
    assert_eq!(report.text("transport"), "tcp");
    let said = any.messages();
    for part in ["this user's limit is 65536 bytes", "RLIMIT_MEMLOCK", "tcp instead"] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    let with_rings = [&demo[..], &["--transport=iouring"]].concat();
    let Some(mut refused) = as_ordinary_user("demo", &with_rings) else { return };
    let report = refused.finish().report(1);
    assert_eq!(report.text("outcome"), "failed");
    let said = format!("{} {}", report.text("error"), refused.messages());
    assert!(said.contains("RLIMIT_MEMLOCK"), "{said}");
}
