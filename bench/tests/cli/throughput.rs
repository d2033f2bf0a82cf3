//! Memory between two processes.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::process::Stdio;

use pageferry_rust_vmm::PagemapScan;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::Value;

use crate::support::{number, program, report, run};

fn measured(more: &[&str]) -> Value {
    let own = ["throughput", "--json", "--memory=64M", "--pairs=1"];
    let report = report(&[&own, more].concat());
    for name in [
        "engine_gbps_median",
        "bare_gbps_median",
        "ratio_min",
        "ratio_median",
        "ratio_max",
        "cpu_s_per_gib.source",
        "cpu_s_per_gib.destination",
        "bare_cpu_s_per_gib.source",
        "bare_cpu_s_per_gib.destination",
        "syscalls_per_gib",
        "bare_syscalls_per_gib",
        "engine_peak_bytes",
    ] {
        assert!(number(&report, name) > 0.0, "{name} in {report}");
    }
    assert_eq!(report["user_copied_bytes"], 0);
    // On loopback the kernel copies all of it.
    let zero_copy = &report["zero_copy"];
    assert_eq!(zero_copy["copied_by_kernel"], zero_copy["sent"], "{report}");
    assert_eq!(zero_copy["copied_bytes"], zero_copy["sent_bytes"], "{report}");
    assert_eq!(report["memory_bytes"], 64 << 20);
    assert_eq!(report["transport"], "tcp");
    assert_eq!(report["memory_match"], true);
    // A thread, a batch and a bitmap or two; not guest memory.
    assert!(number(&report, "engine_peak_bytes") < 32e6, "{report}");
    let pairs = report["pairs"].as_array().expect("pairs");
    assert_eq!(pairs.len(), 1);
    assert!(number(&pairs[0], "engine_gbps") > 0.0);
    assert!(number(&pairs[0], "bare_gbps") > 0.0);
    report
}

#[test]
fn a_memfd_by_one_channel() {
    let report = measured(&["--backing=memfd", "--channels=1"]);
    assert_eq!((&report["backing"], &report["channels"]), (&"memfd".into(), &1.into()));
    assert_eq!(report["pairs"][0]["engine_payload_bytes"], 64 << 20);
}

#[test]
fn zero_copy_sends_are_counted() {
    let report = measured(&["--backing=memfd", "--zero-copy=off"]);
    assert_eq!(
        (number(&report, "zero_copy.sent"), number(&report, "zero_copy.sent_bytes")),
        (0.0, 0.0)
    );
    let report = measured(&["--backing=memfd", "--zero-copy=on"]);
    assert!(number(&report, "zero_copy.sent") > 0.0, "{report}");
    // The first batches of a channel are too small for that.
    let sent_bytes = number(&report, "zero_copy.sent_bytes");
    assert!(sent_bytes > f64::from(62 << 20) && sent_bytes <= f64::from(64 << 20), "{report}");
    // By itself it does not begin, since this is within a host.
    let report = measured(&["--backing=memfd", "--channels=1"]);
    assert_eq!(report["zero_copy"]["sent_bytes"], 0);
}

#[test]
fn batches_and_populating_are_options() {
    let report = measured(&["--backing=memfd", "--batch=64K", "--populate=2", "--zero-copy=off"]);
    assert_eq!((&report["batch_bytes"], &report["populate_threads"]), (&65536.into(), &2.into()));
    // At least one call a batch at the source.
    let a_gib = 1024.0 * 1024.0 * 1024.0 / 65536.0;
    assert!(number(&report, "syscalls_per_gib") > a_gib, "{report}");
}

#[test]
fn anonymous_memory_by_three_channels() {
    let report = measured(&["--channels=3"]);
    assert_eq!((&report["backing"], &report["channels"]), (&"anonymous".into(), &3.into()));
}

#[test]
fn zero_pages_are_not_sent() {
    let report = measured(&["--zero-share=0.25", "--backing=memfd"]);
    assert_eq!(report["pairs"][0]["engine_payload_bytes"], 48 << 20);
}

#[test]
fn memory_that_is_all_zero_has_no_ratio_of_costs() {
    let report = report(&["throughput", "--json", "--memory=8M", "--pairs=1", "--zero-share=1"]);
    assert_eq!(report["pairs"][0]["engine_payload_bytes"], 0);
    assert!(report["syscalls_per_gib"].is_null());
}

#[test]
fn memory_that_is_written_to() {
    if let Err(reason) = PagemapScan::supported() {
        eprintln!("skipped, because {reason}");
        return;
    }
    let report = measured(&["--dirty-rate=20000", "--backing=memfd"]);
    assert_eq!(report["dirty_rate"], 20000);
    assert!(number(&report["pairs"][0], "engine_payload_bytes") >= f64::from(64 << 20));
}

#[test]
fn without_json_there_is_a_table_and_progress() {
    let ran = run(&["throughput", "--memory=8M", "--pairs=2", "--backing=memfd"]);
    assert_eq!(ran.status, Some(0), "{}", ran.stderr);
    for part in ["engine / bare", "pair 2", "CPU s/GiB, source", "peak memory, destination"] {
        assert!(ran.stdout.contains(part), "no {part:?} in\n{}", ran.stdout);
    }
    for part in ["filling", "by the bare loop: the", "by the engine: the", "pair 2 of 2: engine"] {
        assert!(ran.stderr.contains(part), "no {part:?} in\n{}", ran.stderr);
    }
}

#[test]
fn too_few_huge_pages_name_the_knob() {
    let ran = run(&["throughput", "--memory=32T", "--backing=hugetlb"]);
    assert_eq!((ran.status, ran.stdout.as_str()), (Some(1), ""));
    for part in ["/proc/sys/vm/nr_hugepages", "at least"] {
        assert!(ran.stderr.contains(part), "no {part:?} in {}", ran.stderr);
    }
}

#[test]
fn more_memory_than_there_is() {
    let ran = run(&["throughput", "--memory=32T"]);
    assert_eq!((ran.status, ran.stdout.as_str()), (Some(1), ""));
    assert!(ran.stderr.contains("failed to find room for both sides"), "{}", ran.stderr);
}

#[test]
fn an_interrupt_ends_all_processes() {
    let mut child = program(&["throughput", "--memory=64M", "--pairs=1000", "--backing=memfd"])
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start the program");
    let mut stderr = BufReader::new(child.stderr.take().expect("stderr")).lines();
    let first = stderr.find(|line| line.as_ref().is_ok_and(|line| line.contains("pair 1 of")));
    assert!(first.is_some(), "it measured nothing");
    let pid = Pid::from_child(&child);
    let sides = children(pid);
    assert_eq!(sides.len(), 2, "{sides:?}");
    kill_process(pid, Signal::INT).expect("interrupt it");
    let rest: Vec<_> = stderr.map_while(Result::ok).collect();
    assert_eq!(child.wait().expect("wait").code(), Some(3), "{rest:?}");
    assert_eq!(rest.last().map(String::as_str), Some("cancelled"));
    for side in &sides {
        let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
        let ended = poll(&mut [PollFd::new(side, PollFlags::IN)], Some(&patience));
        assert_eq!(ended, Ok(1), "a side was left behind");
    }
}

/// The processes a process has started; each can be polled for its end.
fn children(pid: Pid) -> Vec<OwnedFd> {
    let pid = pid.as_raw_nonzero();
    let path = format!("/proc/{pid}/task/{pid}/children");
    let list = fs::read_to_string(path).expect("its children");
    let child = |text: &str| {
        let pid = text.parse().ok().and_then(Pid::from_raw).expect("a process id");
        pidfd_open(pid, PidfdFlags::empty()).expect("open a pidfd")
    };
    list.split_whitespace().map(child).collect()
}
