//! A guest that goes on from a file, and what people see of its state.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::Signal;
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_128;

use crate::support::PATIENCE;
use crate::support::host::{can_trace, skipped};
use crate::support::process::Process;

/// A file that is removed in the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let name = format!("{name}-{}", std::process::id());
        Self(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name))
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("a path of letters")
    }

    fn with(name: &str, contents: &[u8]) -> Self {
        let scratch = Self::new(name);
        fs::write(&scratch.0, contents).expect("write");
        scratch
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Runs the program to its end: exit status, stdout, messages.
fn run(args: &[&str]) -> (Option<i32>, String, String) {
    let mut process = Process::start("program", args);
    let (status, out) = process.finish_for_people();
    let messages = process.messages();
    (status, out, messages)
}

fn report(args: &[&str]) -> Value {
    let (status, out, messages) = run(args);
    assert_eq!(status, Some(0), "{args:?}: {messages}");
    let report: Value = serde_json::from_str(&out).expect("one JSON object");
    assert_eq!((&report["schema"], &report["oracle_ok"]), (&1.into(), &true.into()), "{report}");
    report
}

const SMALL: [&str; 4] = ["--memory=16M", "--working-set=4M", "--run-for=200ms", "--json"];

fn saved(name: &str, options: &[&str]) -> (Scratch, Value) {
    let file = Scratch::new(name);
    let args = [&["save", file.path()], &SMALL[..], options].concat();
    let report = report(&args);
    (file, report)
}

#[test]
fn a_guest_goes_on_from_a_file() {
    // KVM where there is KVM, and threads in any case.
    for kind in ["--guest=auto", "--guest=process"] {
        for workload in ["sequential", "random", "hot-cold", "idle"] {
            let workload = format!("--workload={workload}");
            let (file, saved) = saved("goes-on", &[kind, &workload, "--vcpus=2"]);
            assert!(saved["state_bytes"].as_u64().unwrap() > 100, "{saved}");
            let backing = ["--backing=anonymous", "--backing=memfd"];
            // As often as one likes: restoring takes nothing from the file.
            for backing in backing {
                let args = ["restore", file.path(), "--run-for=200ms", "--json", backing];
                let restored = report(&args);
                for same in ["guest", "workload", "vcpus", "state_bytes", "memory_bytes"] {
                    assert_eq!(restored[same], saved[same], "{same}");
                }
                let beats = |report: &Value| report["heartbeats"].as_u64().expect("a number");
                assert!(beats(&restored) >= beats(&saved) + 10, "{saved}\n{restored}");
            }
        }
    }
}

#[test]
fn a_file_that_is_no_guest_is_refused() {
    let (file, _) = saved("damaged", &["--guest=process"]);
    let good = fs::read(&file.0).unwrap();
    let refused = |contents: &[u8], why: &str| {
        let bad = Scratch::with("bad", contents);
        let (status, out, messages) = run(&["restore", bad.path()]);
        assert_eq!((status, out.as_str()), (Some(1), ""), "{messages}");
        assert!(messages.contains(why), "no {why:?} in {messages}");
    };
    refused(b"", "ends too early");
    refused(&good[..good.len() - 1], "ends too early");
    refused(&good[..40], "ends too early");
    refused(&[&good[..], b"x"].concat(), "goes on after its end");
    refused(&[b"X", &good[1..]].concat(), "holds no guest");
    let changed = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    refused(&changed(8, 9), "it has format 9, this program reads format 2");
    refused(&changed(15, 0xff), "its description has");
    refused(&changed(27, 0xff), "its device state has");
    refused(&changed(40, good[40] ^ 1), "its description or device state is damaged");
    let last_page = good.len() - 16 - 16 - 1;
    refused(&changed(last_page, good[last_page] ^ 1), "its memory is damaged");
    // What is printed of a file is what was written to it.
    let damaged = Scratch::with("damaged-state", &changed(40, good[40] ^ 1));
    let (status, out, messages) = run(&["inspect", damaged.path()]);
    assert_eq!((status, out.as_str()), (Some(1), ""), "{messages}");
    assert!(messages.contains("is damaged"), "{messages}");
    let (status, _, messages) = run(&["restore", "/nowhere"]);
    assert_eq!(status, Some(1));
    assert!(messages.contains("failed to open /nowhere"), "{messages}");
}

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

/// Makes both digests of a file right: the one after the device state, and the last.
fn sum_up(file: &mut [u8]) {
    let number = |at: usize, bytes: usize| {
        let mut number = [0; 8];
        number[..bytes].copy_from_slice(&file[at..at + bytes]);
        usize::try_from(u64::from_le_bytes(number)).expect("64 bits")
    };
    let head = 28 + number(12, 4) + number(16, 4) + number(20, 8);
    for at in [head, file.len() - 16] {
        let digest = xxh3_128(&file[..at]).to_le_bytes();
        file[at..at + 16].copy_from_slice(&digest);
    }
}

/// What is in a directory of its own, which goes with it.
fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("read a directory").flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

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

#[test]
fn a_file_of_another_program_is_refused_by_its_schema() {
    let (file, _) = saved("foreign", &["--guest=process"]);
    let good = fs::read(&file.0).unwrap();
    // The name of a field of the same length, so that nothing moves; and a type.
    let replaced = |from: &str, to: &str| {
        let at = good.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        let mut file = good.clone();
        file[at..at + from.len()].copy_from_slice(to.as_bytes());
        sum_up(&mut file);
        file
    };
    let from = r#""name":"granted","type":"u32""#;
    let renamed = Scratch::with("renamed", &replaced(from, r#""name":"permits","type":"u32""#));
    assert_eq!(run(&["restore", renamed.path(), "--run-for=10ms"]).0, Some(0));
    let retyped = Scratch::with("retyped", &replaced(from, r#""name":"granted","type":"i32""#));
    let (status, _, messages) = run(&["restore", retyped.path()]);
    assert_eq!(status, Some(1));
    assert!(messages.contains("thread.granted: the writer has i32, the reader u32"), "{messages}");
}

#[test]
fn state_is_printed_and_compared() {
    let (old, _) = saved("old", &["--guest=auto", "--workload=idle"]);
    let (new, _) = saved("new", &["--guest=auto", "--workload=idle"]);
    let (status, text, _) = run(&["inspect", old.path()]);
    assert_eq!(status, Some(0));
    for part in ["heartbeat 0: version 1", "  beats: ", "serial 0: version 1", "  line_control: "] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert!(!text.contains('#'), "{text}");
    let (status, same, messages) = run(&["inspect", old.path(), old.path()]);
    assert_eq!((status, same.as_str(), messages.as_str()), (Some(0), "", "0 differences"));
    let (status, changes, messages) = run(&["inspect", old.path(), new.path()]);
    assert_eq!(status, Some(0));
    assert!(changes.contains("heartbeat 0: last_beat_realtime_ns: 0x"), "{changes}");
    assert!(messages.ends_with(" differences"), "{messages}");
    let kept = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/1-kvm.state");
    let (status, text, _) = run(&["inspect", kept]);
    assert_eq!(status, Some(0));
    for part in ["vcpu 1: version 1", "  regs:\n    rax: ", "    rip: 0x", "clock 0: version 1"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let none = Scratch::with("none", b"something else");
    let (status, _, messages) = run(&["inspect", none.path()]);
    assert_eq!(status, Some(1));
    assert!(messages.contains("no device state"), "{messages}");
}

#[test]
fn state_is_read_from_stdin() {
    let kept = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/1-process.state");
    let program = std::process::Command::new(env!("CARGO_BIN_EXE_pageferry-vmm"))
        .args(["inspect", "-"])
        .stdin(File::open(kept).unwrap())
        .output()
        .expect("start the program");
    let text = String::from_utf8(program.stdout).unwrap();
    assert!(text.contains("\nthread 1: version 1"), "{text}");
    assert_eq!(text.trim_end(), run(&["inspect", kept]).1);
}

#[test]
fn schemas_are_dumped_and_checked() {
    let (status, dumped, _) = run(&["schema", "dump"]);
    assert_eq!(status, Some(0));
    let old = Scratch::with("old.json", dumped.as_bytes());
    let check = |new: &str| {
        let new = Scratch::with("new.json", new.as_bytes());
        run(&["schema", "check", old.path(), new.path()])
    };
    let (status, out, _) = check(&dumped);
    assert_eq!((status, out.as_str()), (Some(0), "old to new: works\nnew to old: works"));
    let schema: Value = serde_json::from_str(&dumped).unwrap();
    let changed = |change: fn(&mut Value)| {
        let mut schema = schema.clone();
        let sections = schema["sections"].as_array_mut().unwrap();
        let serial = sections.iter_mut().find(|section| section["name"] == "serial").unwrap();
        change(&mut serial["state"]);
        schema.to_string()
    };
    // The right way.
    let (status, out, _) = check(&changed(|state| {
        state["version"] = 2.into();
        let field = r#"{"tag":9,"name":"speed","since":2,"has_default":true,"type":"u32"}"#;
        state["fields"].as_array_mut().unwrap().push(serde_json::from_str(field).unwrap());
    }));
    assert_eq!(status, Some(0));
    let declared = "old to new: works\nnew to old: fails\n  \
                    fails: serial: the writer has version 2, the reader reads up to 1";
    assert_eq!(out, declared);
    // And the wrong one.
    let (status, out, messages) = check(&changed(|state| {
        state["fields"].as_array_mut().unwrap().pop();
    }));
    assert_eq!(status, Some(1));
    assert!(out.contains("fails: serial.scratch: the writer does not send the field"), "{out}");
    assert!(messages.contains("2 of these were not declared"), "{messages}");
    let (status, _, messages) = check("{}");
    assert_eq!(status, Some(1));
    assert!(messages.contains("failed to read a schema: missing field `format`"), "{messages}");
}
