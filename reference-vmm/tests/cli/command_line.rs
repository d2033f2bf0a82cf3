//! Command lines that make no sense, and the help.

use std::process::Command;

use crate::support::process::Process;

#[test]
fn nonsense_is_refused_with_help() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["run", "--channels", "0"], &["--channels", "1..=256"]),
        (&["demo", "--channels", "257"], &["--channels", "1..=256"]),
        (&["run", "--memory", "1Q"], &["--memory", "'1Q'", "512M"]),
        (&["run", "--memory", "0"], &["--memory", "512M"]),
        (&["demo", "--memory", "0"], &["--memory", "512M"]),
        (&["receive", "--memory", "0"], &["--memory", "512M"]),
        (&["run", "--working-set", "0"], &["--working-set", "512M"]),
        (&["run", "--memory=64M", "--working-set=65M"], &["--working-set", "--memory"]),
        (&["demo", "--memory=64M", "--working-set=65M"], &["--working-set", "--memory"]),
        // Fits the memory, but not beside the guest's code and page tables.
        (&["run", "--memory=64M", "--working-set=63M"], &["--working-set", "--memory"]),
        (&["run", "--working-set=8E"], &["--working-set", "--memory"]),
        (&["run", "--memory=1P"], &["--memory", "at most"]),
        (&["run", "--memory=100000001"], &["--memory", "4096"]),
        (&["run", "--memory=67M", "--backing=hugetlb"], &["--memory", "2097152"]),
        (&["run", "--working-set=4K", "--vcpus=2"], &["--working-set", "--vcpus"]),
        (&["run", "--vcpus", "0"], &["--vcpus", "1..=64"]),
        (&["run", "--max-rounds", "0"], &["--max-rounds"]),
        (&["run", "--stall-timeout", "0s"], &["--stall-timeout", "300ms"]),
        (&["receive", "--handshake-timeout", "soon"], &["--handshake-timeout", "300ms"]),
        (&["demo", "--keepalive", "10s,5s"], &["--keepalive", "10s,5s,4"]),
        (&["demo", "--keepalive", "10s,5s,0"], &["--keepalive", "probes"]),
        (&["run", "--send-buffer", "0"], &["--send-buffer", "512M"]),
        (&["run", "--downtime-limit", "5"], &["--downtime-limit", "300ms"]),
        (&["run", "--downtime-limit", "0s"], &["--downtime-limit", "stands still", "300ms"]),
        (&["run", "--bandwidth-limit", "1"], &["--bandwidth-limit", "4096", "100M"]),
        (&["demo", "--bandwidth-limit", "4095"], &["--bandwidth-limit", "4096"]),
        (&["run", "--switchover-bandwidth", "4095"], &["--switchover-bandwidth", "4096"]),
        (&["run", "--commit-timeout", "1ns"], &["--commit-timeout", "10ms", "uncertain"]),
        (&["receive", "--commit-timeout", "9ms"], &["--commit-timeout", "10ms"]),
        (&["run", "--tcp-user-timeout", "1ms"], &["--tcp-user-timeout", "10ms", "uncertain"]),
        (&["run", "--release-timeout", "0s"], &["--release-timeout", "300ms"]),
        (&["receive", "--release-timeout", "0"], &["--release-timeout", "300ms"]),
        (&["demo", "--release-timeout", "0ns"], &["--release-timeout", "300ms"]),
        (&["run", "--workload", "busy"], &["--workload", "sequential"]),
        (&["run", "--guest=process", "--workload=fpu"], &["--workload fpu", "virtual CPUs"]),
        (&["demo", "--guest=process", "--workload=fpu"], &["--workload fpu", "virtual CPUs"]),
        (&["run", "--transport", "pigeon"], &["--transport", "tcp"]),
        (&["run", "--zero-copy", "maybe"], &["--zero-copy", "auto", "off", "on"]),
        (&["run", "--dirty-rate", "-1"], &["-1"]),
        (&["run", "--dirty-source", "luck"], &["--dirty-source", "pagemap"]),
        (&["run", "--guest=kvm", "--dirty-source=bitmap"], &["--dirty-source bitmap", "kvm guest"]),
        (&["demo", "--guest=kvm", "--dirty-source=bitmap"], &["bitmap", "not what virtual CPUs"]),
        (&["run", "--guest=process", "--dirty-source=log"], &["--dirty-source log", "process"]),
        (&["demo", "--guest=process", "--dirty-source=ring"], &["ring", "KVM sees only"]),
        (&["demo", "--verify=perhaps"], &["--verify"]),
        (&["dance"], &["dance"]),
        (&[], &["demo", "run", "receive", "save", "restore", "schema", "inspect"]),
    ];
    for (args, parts) in cases {
        let mut process = Process::start("program", args);
        let (status, out) = process.finish_for_people();
        assert_eq!(status, Some(2), "{args:?}");
        assert_eq!(out, "", "{args:?}");
        let messages = process.messages();
        for part in *parts {
            assert!(messages.contains(part), "{args:?}: no {part:?} in {messages}");
        }
        assert!(!messages.contains("listening on"), "{args:?}: {messages}");
    }
}

#[test]
fn with_json_there_is_an_object_however_a_command_ends() {
    // More memory than any host has, and files that are not there.
    let huge = ["--memory=200G", "--backing=hugetlb"];
    let cases: [&[&str]; 5] = [
        &[&["run", "--json"], &huge[..]].concat(),
        &["receive", "--json", "--listen=nonsense"],
        &[&["save", "/tmp/pageferry-not-saved", "--json"], &huge[..]].concat(),
        &["restore", "--json", "/nowhere"],
        &["demo", "--json", "--listen=nonsense"],
    ];
    for args in cases {
        let report = Process::start("program", args).finish().report(1);
        assert_eq!((report.count("schema"), report.text("outcome")), (1, "failed"), "{args:?}");
        let error: Vec<_> = report.text("error").split(": ").collect();
        assert!(!error.is_empty(), "{args:?}: {report:?}");
        // A cause is said once.
        assert!(error.windows(2).all(|parts| parts[0] != parts[1]), "{args:?}: {error:?}");
    }
}

#[test]
fn a_page_that_cannot_be_written_is_in_the_report() {
    let args =
        ["demo", "--json", "--memory=64M", "--working-set=8M", "--report=/nowhere/page.html"];
    let report = Process::start("demo", &args).finish().report(1);
    assert_eq!((report.text("outcome"), report.text("guest_at")), ("failed", "destination"));
    assert!(report.text("error").contains("/nowhere/page.html"), "{report:?}");
}

#[test]
fn help_has_examples_and_exit_codes() {
    for args in [&["--help"][..], &["demo", "--help"], &["run", "--help"], &["receive", "--help"]] {
        let (status, help) = Process::start("program", args).finish_for_people();
        assert_eq!(status, Some(0), "{args:?}");
        for part in ["Examples:", "pageferry-vmm demo", "Exit status:", "3  cancelled"] {
            assert!(help.contains(part), "{args:?}: no {part:?} in\n{help}");
        }
    }
}

#[test]
fn help_says_what_can_track_a_guest() {
    for command in ["demo", "run"] {
        let (_, help) = Process::start("program", &[command, "--help"]).finish_for_people();
        for part in ["--dirty-source", "- log:", "- ring:", "- uffd-wp:", "- pagemap:", "- bitmap:"]
        {
            assert!(help.contains(part), "{command}: no {part:?} in\n{help}");
        }
    }
}

#[test]
fn a_log_level_that_is_none_is_said() {
    for (level, complaint) in
        [("pageferry=loud", true), ("pageferry=debug", false), ("error", false)]
    {
        let ended = Command::new(env!("CARGO_BIN_EXE_pageferry-vmm"))
            .args(["schema", "dump"])
            .env("RUST_LOG", level)
            .output()
            .unwrap();
        assert!(ended.status.success(), "{level}: {ended:?}");
        let messages = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(messages.contains("RUST_LOG is neither"), complaint, "{level}: {messages}");
    }
}
