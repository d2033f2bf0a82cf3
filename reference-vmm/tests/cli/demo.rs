//! `demo`: every kind of guest gets through, and the report says so.

use clap::ValueEnum;
use pageferry_vmm::guest::{GuestKind, tracking_available, workload_available};
use pageferry_vmm::tracking::DirtyTracking;
use pageferry_vmm::workload::WorkloadKind;

use crate::support::host::{HugePages, guest_kind, process_guests_work, skipped};
use crate::support::process::Process;
use crate::support::report::Report;

/// Runs a demo that must succeed.
fn completes(more: &[&str]) -> Report {
    let own = ["demo", "--json", "--memory", "64M", "--working-set", "8M"];
    let report = Process::start("demo", &[&own, more].concat()).finish().report(0);
    report.assert_contract();
    report.assert_departed();
    report.assert_arrived();
    assert!(["iouring", "tcp"].contains(&report.text("transport")), "what this kernel offers");
    assert_eq!(report.count("memory_bytes"), 64 << 20);
    assert_eq!(report.count("working_set_bytes"), 8 << 20);
    assert_eq!(report.count("pages.encoded"), 0);
    // Most of the working set is not zero, and most of the rest is.
    assert!(report.count("pages.data") >= (8 << 20) / 4096 * 3 / 4, "{report:?}");
    assert!(report.count("pages.zero") > 0, "{report:?}");
    assert!(report.count("heartbeats") > 0, "{report:?}");
    report
}

fn assert_verified(report: &Report) {
    assert_eq!(report.flag("memory_match"), Some(true), "{report:?}");
}

#[test]
fn one_channel_and_a_sequential_guest() {
    let report = completes(&["--channels", "1", "--backing", "memfd"]);
    assert_verified(&report);
    assert_eq!(report.count("channels"), 1);
    assert_eq!((report.text("workload"), report.count("vcpus")), ("sequential", 1));
    assert_eq!((report.text("guest"), report.text("backing")), (guest_kind(), "memfd"));
    assert!((report.number("downtime_limit_ms") - 300.0).abs() < 0.001, "{report:?}");
}

#[test]
fn two_channels_two_vcpus_and_a_random_guest() {
    let report = completes(&[
        "--channels=2",
        "--vcpus=2",
        "--workload=random",
        "--backing=memfd",
        "--downtime-limit=250ms",
        "--verify",
    ]);
    assert_verified(&report);
    assert_eq!((report.count("channels"), report.count("vcpus")), (2, 2));
    assert_eq!(report.text("workload"), "random");
    assert!((report.number("downtime_limit_ms") - 250.0).abs() < 0.001, "{report:?}");
}

#[test]
fn four_channels_and_a_hot_cold_guest_in_anonymous_memory() {
    let report = completes(&["--channels=4", "--workload=hot-cold", "--backing=anonymous"]);
    assert_verified(&report);
    assert_eq!(report.count("channels"), 4);
    assert_eq!((report.text("workload"), report.text("backing")), ("hot-cold", "anonymous"));
}

#[test]
fn eight_channels_and_an_idle_guest() {
    let report = completes(&["--channels=8", "--workload=idle", "--backing=memfd"]);
    assert_verified(&report);
    assert_eq!((report.count("channels"), report.text("workload")), (8, "idle"));
}

#[test]
fn zero_copy_sends_are_counted() {
    let report = completes(&["--zero-copy=off", "--backing=memfd"]);
    assert_eq!((report.count("zero_copy.sent"), report.count("zero_copy.sent_bytes")), (0, 0));
    let report = completes(&["--zero-copy=on", "--backing=memfd"]);
    assert_verified(&report);
    assert!(report.count("zero_copy.sent") > 0, "{report:?}");
    // On loopback the kernel copies all of it.
    assert_eq!(report.count("zero_copy.copied_by_kernel"), report.count("zero_copy.sent"));
    assert_eq!(report.count("zero_copy.copied_bytes"), report.count("zero_copy.sent_bytes"));
}

#[test]
fn a_report_is_a_page_of_plots() {
    let directory = tempfile::tempdir().expect("a directory");
    let page = directory.path().join("page.html");
    let option = format!("--report={}", page.display());
    let report = completes(&[&option, "--backing=memfd"]);
    assert_verified(&report);
    let html = std::fs::read_to_string(&page).expect("a page");
    for plot in ["downtime", "throughput-0", "dirty-rate-0", "remaining-0", "heartbeat-0"] {
        assert!(html.contains(&format!("data-plot=\"{plot}\"")), "no {plot}");
    }
    assert!(!html.contains("<script") && !html.contains("://"), "it needs something else");
}

#[test]
fn memory_is_populated_ahead() {
    let report = completes(&["--populate=2", "--backing=memfd"]);
    assert_verified(&report);
    assert_eq!(report.count("populated.threads"), 2);
    assert!(report.count("populated.bytes") > 0, "{report:?}");
    assert!(report.number("populated.ms") > 0.0, "{report:?}");
}

#[test]
fn a_guest_in_huge_pages() {
    // Both sides' memory.
    let Some(_reserved) = HugePages::reserve(2 * 32) else { return };
    let report = completes(&["--backing", "hugetlb"]);
    assert_verified(&report);
    assert_eq!(report.text("backing"), "hugetlb");
}

#[test]
fn a_guest_of_threads_that_writes_at_a_rate() {
    if !process_guests_work() {
        return;
    }
    let report =
        completes(&["--guest=process", "--dirty-rate=20000", "--backing=memfd", "--vcpus=2"]);
    assert_verified(&report);
    assert_eq!((report.text("guest"), report.count("vcpus")), ("process", 2));
}

#[test]
fn a_kvm_guest_that_writes_at_a_rate_and_is_not_compared() {
    if guest_kind() != "kvm" {
        skipped("there is no KVM here");
        return;
    }
    let report = completes(&[
        "--guest=kvm",
        "--dirty-rate=5000",
        "--workload=random",
        "--backing=memfd",
        "--verify=false",
    ]);
    assert_eq!(report.text("guest"), "kvm");
    assert!(report.is_null("memory_match") && report.number("verify_ms") == 0.0, "{report:?}");
    // The guest has noticed at least what lies between pause and commit; the source learns of the
    // resumed guest a little late.
    let parts = ["final_harvest", "final_pages", "device_state"];
    let still: f64 = parts.iter().map(|part| report.number(&format!("downtime.{part}"))).sum();
    assert!(report.number("heartbeat_gap_ms") >= still - 1.0, "{report:?}");
}

#[test]
fn a_kvm_guest_that_computes() {
    if guest_kind() != "kvm" {
        skipped("there is no KVM here");
        return;
    }
    let args = ["--guest=kvm", "--workload=fpu", "--backing=memfd", "--vcpus=2"];
    let Err(lacking) = workload_available(GuestKind::Kvm, WorkloadKind::Fpu) else {
        let report = completes(&args);
        assert_verified(&report);
        assert_eq!((report.text("guest"), report.text("workload")), ("kvm", "fpu"));
        return;
    };
    let mut demo = Process::start("demo", &[&["demo", "--json"], &args[..]].concat());
    assert_eq!(demo.finish().report(1).text("guest_at"), "nowhere");
    let (messages, lacking) = (demo.messages(), lacking.to_string());
    assert!(messages.contains(&lacking) && !messages.contains("listening on"), "{messages}");
    skipped(&lacking);
}

/// A demo whose guest is tracked like this; where this host can't, it is refused, and nothing
/// starts.
fn tracked(guest: &str, source: &str) {
    if guest == "kvm" && guest_kind() != "kvm" {
        skipped("there is no KVM here");
        return;
    }
    let guest = format!("--guest={guest}");
    let args = [&guest, "--dirty-source", source, "--backing=memfd", "--workload=random"];
    let tracking = DirtyTracking::from_str(source, false).expect("a source");
    let Err(lacking) = tracking_available(tracking) else {
        let report = completes(&args);
        assert_verified(&report);
        assert_eq!(report.text("dirty_source"), source);
        return;
    };
    let mut demo = Process::start("demo", &[&["demo", "--json"], &args[..]].concat());
    assert_eq!(demo.finish().report(1).text("guest_at"), "nowhere");
    let (messages, lacking) = (demo.messages(), lacking.to_string());
    assert!(messages.contains(&lacking) && !messages.contains("listening on"), "{messages}");
    skipped(&lacking);
}

#[test]
fn a_kvm_guest_tracked_by_the_dirty_log() {
    tracked("kvm", "log");
}

#[test]
fn a_kvm_guest_tracked_by_dirty_rings() {
    tracked("kvm", "ring");
}

#[test]
fn a_kvm_guest_tracked_by_write_faults() {
    tracked("kvm", "uffd-wp");
}

#[test]
fn a_kvm_guest_tracked_by_pagemap_scans() {
    tracked("kvm", "pagemap");
}

#[test]
fn a_process_guest_tracked_by_write_faults() {
    tracked("process", "uffd-wp");
}

#[test]
fn a_process_guest_tracked_by_pagemap_scans() {
    tracked("process", "pagemap");
}

#[test]
fn a_process_guest_tracked_by_a_bitmap() {
    tracked("process", "bitmap");
}

#[test]
fn without_json_there_is_a_table() {
    let args = ["demo", "--memory=64M", "--working-set=8M", "--backing=memfd", "--verify=false"];
    let mut demo = Process::start("demo", &args);
    let (status, table) = demo.finish_for_people();
    assert_eq!(status, Some(0));
    for part in ["completed: the guest runs at the destination", "dirty source", "final harvest"] {
        assert!(table.contains(part), "no {part:?} in\n{table}");
    }
}
