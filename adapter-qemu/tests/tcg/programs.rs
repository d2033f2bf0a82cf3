//! Guests of a real QEMU, moved by `pageferry-qemu`.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStderr, Command, Stdio};

use crate::guest::{Console, Guests, Running};
use pageferry_rust_vmm::PagemapScan;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pageferry-qemu");
const PAGES: u32 = 4096;

/// A `pageferry-qemu receive` that waits, or has a guest.
struct Receiving {
    child: Child,
    messages: BufReader<ChildStderr>,
    /// QEMU, once its guest runs.
    qemu: Option<Pid>,
}

impl Receiving {
    /// Returns with the address that it waits at.
    fn start(guests: &Guests, host: &str, options: &[&str]) -> (Self, String) {
        let mut child = Command::new(PROGRAM)
            .args(["receive", "--json", "--listen", "127.0.0.1:0", "--ram"])
            .arg(guests.path(&format!("{host}.ram")))
            .args(options)
            .args(["--", "qemu-system-x86_64"])
            .args(guests.arguments(host, PAGES))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let messages = BufReader::new(child.stderr.take().unwrap());
        let mut receiving = Self { child, messages, qemu: None };
        let address = receiving.hear("listening on ");
        (receiving, address)
    }

    /// What follows the next message that begins so.
    fn hear(&mut self, beginning: &str) -> String {
        loop {
            let mut line = String::new();
            let read = self.messages.read_line(&mut line).unwrap();
            assert!(read > 0, "it ended before it said: {beginning}");
            eprint!("{line}");
            if let Some(rest) = line.trim_end().strip_prefix(beginning) {
                return rest.to_owned();
            }
        }
    }

    /// The guest has come: the program is told to end, and leaves it running. Its report.
    fn leave(&mut self) -> Value {
        let said = self.hear("the guest runs here, in process ");
        let pid = said.split(';').next().unwrap().parse().unwrap();
        self.qemu = Pid::from_raw(pid);
        let program = Pid::from_child(&self.child);
        kill_process(program, Signal::INT).unwrap();
        let mut report = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut report).unwrap();
        assert!(self.child.wait().unwrap().success());
        serde_json::from_str(&report).unwrap()
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(qemu) = self.qemu {
            let _ = kill_process(qemu, Signal::KILL);
        }
    }
}

/// Moves a guest by the program; its report, and its exit status.
fn migrate(guests: &Guests, host: &str, to: &str, options: &[&str]) -> (Value, Option<i32>) {
    let mut monitor = OsString::from("--qmp=");
    monitor.push(guests.path(&format!("{host}.qmp")));
    let ended = Command::new(PROGRAM)
        .args(["migrate", "--json", "--verify", "--to", to])
        .arg(monitor)
        .args(options)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (said, report) = (ended.stderr, ended.stdout);
    eprint!("{}", String::from_utf8_lossy(&said));
    (serde_json::from_slice(&report).unwrap(), ended.status.code())
}

/// Says so if a program of this user's may not trace another one's child.
fn may_trace() -> bool {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let may = matches!(scope.trim(), "" | "0") || rustix::process::geteuid().is_root();
    if !may {
        eprintln!(
            "skipped, because kernel.yama.ptrace_scope is {} and this is not root",
            scope.trim()
        );
    }
    may
}

/// From one host to the next, by each transport; QEMU here quits, and the program there may end.
#[test]
fn a_guest_moves_from_host_to_host() {
    if let Err(error) = PagemapScan::supported() {
        return eprintln!("skipped, because pages cannot be tracked here: {error}");
    }
    if !may_trace() {
        return;
    }
    let Some(guests) = Guests::build() else { return };
    let mut console = Console::of(&guests, "a");
    let mut source = Running::start(&guests, "a", PAGES);
    let mut pass = console.pass();
    let mut hosts = Vec::new();
    for (from, host, transport) in [("a", "b", "tcp"), ("b", "c", "auto")] {
        let mut console = Console::of(&guests, host);
        let (mut receiving, address) = Receiving::start(&guests, host, &["--transport", transport]);
        let options = ["--transport", transport, "--downtime-limit", "2s"];
        let (report, status) = migrate(&guests, from, &address, &options);
        assert_eq!(status, Some(0), "{report}");
        assert_eq!(report["outcome"], "completed", "{report}");
        assert_eq!(report["guest_at"], "destination", "{report}");
        assert_eq!(report["memory_match"], true, "{report}");
        eprintln!("{} ms of {} ms", report["downtime"]["total_ms"], report["total_ms"]);
        let report = receiving.leave();
        assert_eq!(report["outcome"], "completed", "{report}");
        assert_eq!(report["memory_match"], true, "{report}");
        // On a guest that is written all the time a pass is soon over that was begun there.
        let (began, ended) = (console.pass(), console.pass());
        assert!(began > pass && ended > began, "pass {pass} there, then {began} and {ended}");
        pass = ended;
        hosts.push(receiving);
        if from == "a" {
            assert!(source.child.wait().unwrap().success(), "QEMU at the source did not quit");
        }
    }
}

/// What writes RAM unseen is found before anything moves, all of it at once, and the guest runs on.
#[test]
fn what_is_not_seen_is_refused() {
    let Some(guests) = Guests::build() else { return };
    let disk = guests.path("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let mut node = OsString::from("driver=file,node-name=disk0,cache.direct=on,filename=");
    node.push(disk.canonicalize().unwrap());
    let mut console = Console::of(&guests, "a");
    let mut arguments = guests.arguments("a", PAGES);
    // /dev/shm has no O_DIRECT; that the disk is to be read so is what counts.
    arguments.extend(["-device".into(), "virtio-balloon-pci,id=balloon0".into()]);
    let o_direct = supports_o_direct(&disk);
    if o_direct {
        arguments.extend(["-blockdev".into(), node]);
    }
    let source = Running::with(&guests, "a", &arguments);
    console.pass();
    // This test has the RAM mapped as a vhost-user backend would.
    let ram = std::fs::File::options().read(true).write(true).open(guests.path("a.ram")).unwrap();
    let other = vm_memory::MmapRegion::<()>::from_file(vm_memory::FileOffset::new(ram, 0), 1 << 20);
    let (report, status) = migrate(&guests, "a", "127.0.0.1:1", &[]);
    drop(other);
    assert_eq!(status, Some(1), "{report}");
    let error = report["error"].as_str().unwrap();
    assert!(error.contains("balloon0 (virtio-balloon-pci): it gives RAM back"), "{error}");
    assert!(error.contains("has mapped the RAM too"), "{error}");
    assert_eq!(error.contains("disk disk0 has cache.direct=on"), o_direct, "{error}");
    console.pass();
    drop(source);
}

fn supports_o_direct(file: &std::path::Path) -> bool {
    use rustix::fs::{Mode, OFlags, open};
    open(file, OFlags::RDWR | OFlags::DIRECT, Mode::empty()).is_ok()
}
