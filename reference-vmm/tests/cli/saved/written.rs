//! Where a file is written, when it has its name, and what happens if there is no room for it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::process::Signal;
use serde_json::Value;

use super::{SMALL, names_in, run};
use crate::support::host::{can_trace, skipped};
use crate::support::process::Process;

/// A file that is to have a name is written under another until it is whole.
#[test]
fn where_no_file_can_be_made_no_guest_runs() {
    let directory = tempfile::tempdir().expect("a directory");
    let none = directory.path().join("new/");
    for path in [Path::new("/proc/pageferry"), directory.path(), Path::new("/dev/null"), &none] {
        let path = path.to_str().expect("a path of letters");
        let (status, out, messages) = run(&["save", path, "--memory=16M", "--working-set=4M"]);
        assert_eq!((status, out.as_str()), (Some(1), ""), "{messages}");
        let why = format!("failed to save the guest to {path}: failed to create the file: ");
        assert!(messages.contains(&why), "{messages}");
        assert!(!messages.contains(".partial"), "{messages}");
    }
    assert!(names_in(directory.path()).is_empty());
    assert!(!fs::metadata("/dev/null").expect("a device").is_file());
}

/// In a directory as /tmp is each may remove and replace what is their own.
#[test]
fn where_a_file_may_not_be_replaced_no_guest_runs() {
    if !rustix::process::geteuid().is_root() {
        return skipped("this is not root, who alone may become somebody else");
    }
    let directory = tempfile::tempdir().expect("a directory");
    fs::set_permissions(directory.path(), Permissions::from_mode(0o1777)).expect("let all write");
    let file = directory.path().join("guest.pf");
    fs::write(&file, b"before").expect("write");
    fs::set_permissions(&file, Permissions::from_mode(0o666)).expect("let all write");
    let path = file.to_str().expect("a path of letters");
    let program = env!("CARGO_BIN_EXE_pageferry-vmm");
    let nobody = ["--reuid=65534", "--clear-groups", program];
    let started = std::process::Command::new("setpriv").args(nobody).arg("--version").output();
    if !started.is_ok_and(|output| output.status.success()) {
        return skipped("there is no setpriv, or nobody may not run the program where it lies");
    }
    let save = ["save", path, "--guest=process", "--memory=16M", "--working-set=4M"];
    let mut process = Process::start_program("save", "setpriv", &[&nobody[..], &save].concat());
    let (status, out) = process.finish_for_people();
    let messages = process.messages();
    assert_eq!((status, out.as_str()), (Some(1), ""), "{messages}");
    let why = format!("failed to save the guest to {path}: failed to create the file: ");
    for part in [&why, "sticky", "save under another name"] {
        assert!(messages.contains(part), "no {part:?} in {messages}");
    }
    assert_eq!(fs::read(&file).expect("read"), b"before");
    assert_eq!(names_in(directory.path()), ["guest.pf"]);
}

/// A file that has its name before it is on the disk is half a guest after a power cut; and a name that the
/// directory has not kept is none.
#[test]
fn a_file_is_on_the_disk_before_it_has_its_name() {
    if !can_trace() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let (trace, there) = (directory.path().join("trace"), directory.path().join("there"));
    fs::create_dir(&there).expect("a directory");
    let file = there.join("guest.pf");
    let letters = |path: &Path| path.to_str().expect("a path of letters").to_owned();
    // With the paths of file descriptors.
    let calls = "trace=fsync,fdatasync,rename,renameat,renameat2,write,pwrite64,writev";
    let (trace_name, file_name) = (letters(&trace), letters(&file));
    let strace = ["-f", "-y", "-qq", "--signal=none", "-s", "0", "-e", calls, "-o", &trace_name];
    let save = [env!("CARGO_BIN_EXE_pageferry-vmm"), "save", &file_name];
    let args = [&strace[..], &save, &SMALL].concat();
    assert_eq!(Process::start_program("save", "strace", &args).finish_for_people().0, Some(0));
    let trace = fs::read_to_string(&trace).expect("the trace");
    let lines: Vec<&str> = trace.lines().filter(|line| line.contains(&letters(&there))).collect();
    let at = |what: &str, is_it: &dyn Fn(&str) -> bool| {
        lines.iter().rposition(|line| is_it(line)).unwrap_or_else(|| panic!("no {what}:\n{trace}"))
    };
    let written = at("write", &|line| line.contains("write") && line.contains(".partial>"));
    let synced = at("fsync of the file", &|line| {
        line.contains("fsync(") && line.contains(".partial>") && line.ends_with("= 0")
    });
    let renamed = at("rename", &|line| line.contains("rename") && line.contains("guest.pf\""));
    let directory_synced = at("fsync of the directory", &|line| {
        line.contains("fsync(") && line.contains("/there>") && line.ends_with("= 0")
    });
    let order = [written, synced, renamed, directory_synced];
    assert!(order.is_sorted_by(|one, next| one < next), "{order:?}:\n{}", lines.join("\n"));
}

/// Saves under a command that leaves too little room, sees the guest run on, and ends it.
fn assert_no_room(wrapper: &[&str], directory: &Path, why: &str) {
    // What had the name before has it afterwards.
    let file = directory.join("guest.pf");
    fs::write(&file, b"before").expect("write");
    let program = env!("CARGO_BIN_EXE_pageferry-vmm");
    let file_name = file.to_str().expect("a path of letters");
    let save = ["save", file_name, "--memory=64M", "--working-set=32M", "--run-for=1s", "--json"];
    let args = [wrapper, &[program], &save].concat();
    let mut process = Process::start_program("save", args[0], &args[1..]);
    let line = process.await_line();
    let report: Value = serde_json::from_str(&line).expect("one JSON object");
    assert_eq!((&report["outcome"], &report["oracle_ok"]), (&"failed".into(), &true.into()));
    let error = report["error"].as_str().expect("why");
    assert!(error.contains("failed to write the file: ") && error.contains(why), "{report}");
    // The name that it has in vain tells nobody anything.
    assert!(error.contains(file_name) && !error.contains(".partial"), "{report}");
    assert!(report["heartbeats"].as_u64() >= Some(20), "{report}");
    process.await_message("the guest runs on here");
    assert!(process.lives());
    process.signal(Signal::INT);
    assert_eq!(process.finish_for_people().0, Some(1));
    assert_eq!(fs::read(&file).expect("read"), b"before");
    assert_eq!(names_in(directory), ["guest.pf"]);
}

#[test]
fn a_limit_on_the_length_of_files_leaves_the_guest_running() {
    let directory = tempfile::tempdir().expect("a directory");
    let limited = ["sh", "-c", "ulimit -f 64; exec \"$@\"", "sh"];
    assert_no_room(&limited, directory.path(), "File too large");
}

#[test]
fn a_full_disk_leaves_the_guest_running() {
    let directory = tempfile::tempdir().expect("a directory");
    let mount = |args: &[&str]| {
        let status =
            std::process::Command::new(args[0]).args(&args[1..]).arg(directory.path()).status();
        status.is_ok_and(|status| status.success())
    };
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=1M", "none"]) {
        return skipped("no file system can be mounted");
    }
    let shown = std::panic::catch_unwind(|| {
        assert_no_room(&["env"], directory.path(), "No space left on device");
    });
    assert!(mount(&["umount"]));
    if let Err(panic) = shown {
        std::panic::resume_unwind(panic);
    }
}
