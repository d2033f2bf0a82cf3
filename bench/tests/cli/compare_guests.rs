//! Guests of QEMU, moved by pageferry and by QEMU itself.

use std::process::Stdio;
use std::time::{Duration, Instant};

use pageferry_qemu::testing::Guests;
use rustix::process::{Pid, Signal, kill_process};

use crate::support::{number, program, report};

#[test]
fn a_guest_is_moved_by_each() {
    if Guests::build(1).is_none() {
        return;
    }
    let args = ["compare-guests", "--json", "--rounds=1", "--memory=256M", "--working-set=16M"];
    let report = report(&args);
    let names = |list: &str| -> Vec<String> {
        let list = report[list].as_array().expect("a list");
        list.iter().map(|each| each["name"].as_str().expect("a name").to_owned()).collect()
    };
    for missing in report["missing"].as_array().expect("a list") {
        eprintln!("{} skipped, because {}", missing["name"], missing["why"]);
    }
    let all = [names("contestants"), names("missing")].concat();
    for name in ["pageferry, tcp", "pageferry, iouring", "QEMU", "QEMU, multifd"] {
        assert!(all.iter().any(|each| each == name), "no {name} among {all:?}");
    }
    for contestant in report["contestants"].as_array().expect("a list") {
        let moved = &contestant["moves"][0];
        let working_set = number(&report, "working_set_bytes");
        assert!(number(moved, "wire_bytes") >= working_set, "{contestant}");
        assert!(number(moved, "total_ms") >= number(moved, "downtime_ms"), "{contestant}");
        for figure in ["downtime_ms", "cpu_ms"] {
            assert!(number(moved, figure) > 0.0, "{contestant}");
        }
        // A guest that QEMU 7.2 has moved under TCG may be wrong, and show no life. On a busy machine its last sign
        // of life here may be heard as late as its first there.
        if moved["oracle_ok"] == true {
            number(moved, "standstill_ms");
        }
    }
}

/// Its own time limit is two minutes.
#[test]
fn a_signal_ends_a_migration_that_does_not_end() {
    if Guests::build(1).is_none() {
        return;
    }
    // In less than that no QEMU saves its state.
    let args = ["compare-guests", "--rounds=1", "--downtime-limit=1ms", "--transport=tcp"];
    let mut child = program(&args).stdout(Stdio::null()).spawn().expect("start the program");
    let began = Instant::now();
    let until = |what: &str, holds: &mut dyn FnMut() -> bool| {
        while !holds() {
            assert!(began.elapsed() < Duration::from_secs(100), "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let pid = Pid::from_child(&child);
    let qemus = || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("its threads").flatten();
        let children =
            tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
        children.map(|children| children.split_whitespace().count()).sum::<usize>()
    };
    until("both QEMUs are there", &mut || qemus() == 2);
    kill_process(pid, Signal::TERM).expect("it is there");
    let mut ended = None;
    until("it ends", &mut || {
        ended = child.try_wait().expect("it is a child");
        ended.is_some()
    });
    assert_eq!(ended.expect("it has ended").code(), Some(3));
}
