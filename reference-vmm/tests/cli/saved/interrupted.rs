//! Ctrl-C and SIGTERM while a file is written, or waited for.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::Signal;
use serde_json::Value;

use super::{names_in, saved};
use crate::support::PATIENCE;
use crate::support::host::can_trace;
use crate::support::process::Process;

/// Nobody has opened it yet, or who has says nothing, or not all.
#[test]
fn a_guest_that_does_not_come_out_of_a_pipe_can_be_waited_for_no_longer() {
    let (file, _) = saved("piped", &["--guest=process"]);
    let guest = fs::read(&file.0).expect("a guest");
    for (written, signal) in [
        (None, Signal::INT),
        (None, Signal::TERM),
        (Some(0), Signal::INT),
        (Some(20), Signal::TERM),
        (Some(guest.len() - 1), Signal::INT),
    ] {
        let directory = tempfile::tempdir().expect("a directory");
        let pipe = directory.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RWXU, 0).expect("make a pipe");
        let path = pipe.to_str().expect("letters");
        let mut process = Process::start("program", &["restore", path, "--json"]);
        process.await_hearing();
        let writer = written.map(|len| {
            // Once this is open, it is open there too; and what is more than a pipe holds is read.
            let mut writer = File::options().write(true).open(&pipe).expect("open");
            writer.write_all(&guest[..len]).expect("write");
            writer
        });
        process.signal(signal);
        let (status, out) = process.finish_for_people();
        assert_eq!(status, Some(3), "{written:?} {signal:?}");
        let report: Value = serde_json::from_str(&out).expect("one JSON object");
        assert_eq!((&report["schema"], &report["outcome"]), (&1.into(), &"cancelled".into()));
        let error = report["error"].as_str().expect("why");
        assert!(error.contains("interrupted before the guest ran"), "{report}");
        drop(writer);
    }
}

/// Saves to a disk that takes so long for each piece, presses Ctrl-C once it has been given the first, and
/// sees the guest run on. What the report says is wrong, and what is in the directory by then.
fn interrupted(microseconds: &str, directory: &Path) -> (String, Vec<String>) {
    let file = directory.join("guest.pf");
    fs::write(&file, b"before").expect("write");
    let slow = format!("inject=fdatasync:delay_enter={microseconds}");
    // The tracer is no parent, and signals are for the program itself.
    let strace = ["-D", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", &slow];
    let file_name = file.to_str().expect("a path of letters");
    let save = [env!("CARGO_BIN_EXE_pageferry-vmm"), "save", file_name, "--run-for=1ms", "--json"];
    let guest = ["--memory=256M", "--working-set=192M"];
    let args = [&strace[..], &save, &guest].concat();
    let mut process = Process::start_program("save", "strace", &args);
    let deadline = Instant::now() + PATIENCE;
    let is_begun = |name: &String| {
        let partial = name.ends_with(".partial").then(|| directory.join(name));
        partial.is_some_and(|path| fs::metadata(path).is_ok_and(|file| file.len() >= 16 << 20))
    };
    while !names_in(directory).iter().any(is_begun) {
        assert!(Instant::now() < deadline, "nothing is written");
        std::thread::yield_now();
    }
    process.signal(Signal::INT);
    let report: Value = serde_json::from_str(&process.await_line()).expect("one JSON object");
    let names = names_in(directory);
    assert_eq!((&report["outcome"], &report["oracle_ok"]), (&"cancelled".into(), &true.into()));
    process.await_message("the guest runs on here");
    assert!(process.lives());
    process.trace_no_more();
    process.signal(Signal::TERM);
    assert_eq!(process.finish_for_people().0, Some(3));
    assert_eq!(fs::read(&file).expect("read"), b"before");
    (report["error"].as_str().expect("why").to_owned(), names)
}

#[test]
fn a_save_that_is_interrupted_leaves_the_guest_running_and_no_file() {
    if !can_trace() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let (error, names) = interrupted("500000", directory.path());
    assert!(error.ends_with("failed to write the file: interrupted"), "{error}");
    assert_eq!(names, ["guest.pf"]);
}

/// Nothing can be removed then.
#[test]
fn a_save_to_a_disk_that_does_not_answer_can_be_interrupted() {
    if !can_trace() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let (error, _) = interrupted("3600000000", directory.path());
    assert!(error.contains("interrupted, and the file system has not answered yet"), "{error}");
}

/// There is no guest yet that could run on.
#[test]
fn a_directory_that_does_not_answer_can_be_interrupted() {
    if !can_trace() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name).to_str().expect("letters").to_owned();
    let (guest, program) = (path("guest.pf"), env!("CARGO_BIN_EXE_pageferry-vmm"));
    fs::write(&guest, b"").expect("write");
    let stuck = "inject=stat,newfstatat,statx,openat:delay_enter=3600000000";
    let strace = ["-D", "-f", "-qq", "-o", "/dev/null", "-P", &guest, "-e", stuck];
    for command in ["save", "restore"] {
        let args = [&strace[..], &[program, command, &guest, "--json"]].concat();
        let mut process = Process::start_program(command, "strace", &args);
        process.await_hearing();
        process.signal(Signal::INT);
        let report: Value = serde_json::from_str(&process.await_line()).expect("one JSON object");
        assert_eq!(report["outcome"], "cancelled", "{report}");
        process.trace_no_more();
        assert_eq!(process.finish_for_people().0, Some(3), "{command}");
    }
    assert_eq!(names_in(directory.path()), ["guest.pf"]);
}
