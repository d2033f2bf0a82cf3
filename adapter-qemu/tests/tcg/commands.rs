//! `pageferry-qemu` as its users start it, and guests that are heard meanwhile.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};
use pageferry_qemu::testing::{Console, Guests};
use pageferry_qemu::{Qmp, QmpError, Tracking};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// That of these tests, or the one that the variable PAGEFERRY_QEMU names: with RDMA, say.
fn program() -> Command {
    let other = std::env::var_os("PAGEFERRY_QEMU");
    Command::new(other.unwrap_or_else(|| env!("CARGO_BIN_EXE_pageferry-qemu").into()))
}

/// How long a message may take that comes soon.
const PATIENCE: Duration = Duration::from_secs(120);

/// One of its commands at work. Dropping it kills it.
pub(crate) struct Running {
    child: Child,
    /// What it says, which is read all the time. Its QEMU says it there too, and may outlive it.
    messages: Receiver<String>,
}

impl Running {
    fn start(command: &mut Command) -> Self {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (say, messages) = unbounded();
        std::thread::spawn(move || {
            for line in stderr.lines() {
                // Nobody may listen any more.
                let _ = say.send(line.unwrap());
            }
        });
        Self { child, messages }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// What follows the next message that begins so.
    pub(crate) fn hear(&mut self, beginning: &str) -> String {
        loop {
            let line = self.messages.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|why| panic!("it did not say: {beginning} ({why})"));
            eprintln!("{line}");
            if let Some(rest) = line.strip_prefix(beginning) {
                return rest.to_owned();
            }
        }
    }

    /// Steers it.
    pub(crate) fn say(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Its report and its exit status, once it has ended.
    pub(crate) fn end(&mut self) -> (Value, Option<i32>) {
        let mut report = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut report).unwrap();
        let status = self.child.wait().unwrap().code();
        self.messages.try_iter().for_each(|line| eprintln!("{line}"));
        (serde_json::from_str(&report).unwrap(), status)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A `pageferry-qemu receive` that waits, or has a guest.
pub(crate) struct Receiving {
    pub(crate) program: Running,
    monitor: PathBuf,
    /// QEMU, once its guest runs.
    qemu: Option<Pid>,
}

impl Receiving {
    /// On this machine. Returns with the address that it waits at.
    pub(crate) fn start(guests: &Guests, host: &str, options: &[&str]) -> (Self, String) {
        Self::at("127.0.0.1", guests, host, options)
    }

    /// At an address.
    pub(crate) fn at(
        address: &str,
        guests: &Guests,
        host: &str,
        options: &[&str],
    ) -> (Self, String) {
        let monitor = guests.path(&format!("{host}.qmp"));
        let mut command = program();
        command
            .args(["receive", "--json", "--listen", &format!("{address}:0")])
            .args(guests.ram_files(host).iter().flat_map(|path| [Path::new("--ram"), path]))
            .arg("--qmp")
            .arg(&monitor)
            .args(options)
            .args(["--", "qemu-system-x86_64"])
            .args(guests.arguments(host));
        let mut program = Running::start(&mut command);
        let address = program.hear("listening on ");
        (Self { program, monitor, qemu: None }, address)
    }

    /// The process of its QEMU, as soon as that is there.
    pub(crate) fn qemu(&mut self) -> Pid {
        let mut qmp = None;
        until("QEMU comes", || {
            let ended = self.program.child.try_wait().unwrap();
            assert!(ended.is_none(), "it ended before QEMU came");
            match Qmp::connect(&self.monitor) {
                Err(QmpError::Connect { .. }) => {}
                connected => qmp = Some(connected.unwrap()),
            }
            qmp.is_some()
        });
        let qmp = qmp.unwrap();
        let pid = Pid::from_raw(qmp.peer_pid().unwrap().cast_signed());
        self.qemu = pid;
        pid.unwrap()
    }

    /// The guest has come: the program is told to end, and leaves it running. Its report.
    pub(crate) fn leave(&mut self) -> Value {
        let said = self.program.hear("the guest runs here, in process ");
        let pid = said.split(';').next().unwrap().parse().unwrap();
        self.qemu = Pid::from_raw(pid);
        self.program.signal(Signal::INT);
        let (report, status) = self.program.end();
        assert_eq!(status, Some(0), "{report}");
        report
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        let _ = self.program.child.kill();
        let _ = self.program.child.wait();
        // Of a test that failed nobody may have asked. One that has a guest would run for ever.
        let found =
            || Pid::from_raw(Qmp::connect(&self.monitor).ok()?.peer_pid().ok()?.cast_signed());
        if let Some(qemu) = self.qemu.or_else(found) {
            let _ = kill_process(qemu, Signal::KILL);
        }
    }
}

/// Why a `receive` with that monitor, that RAM and that QEMU does not wait for anybody.
pub(crate) fn refused(guests: &Guests, host: &str, ram: &str, qemu: &str) -> String {
    let ended = program()
        .args(["receive", "--json", "--listen", "127.0.0.1:0", "--ram"])
        .arg(guests.path(ram))
        .arg("--qmp")
        .arg(guests.path(&format!("{host}.qmp")))
        .args(["--", qemu])
        .output()
        .unwrap();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let report: Value = serde_json::from_slice(&ended.stdout).unwrap();
    report["error"].as_str().unwrap().to_owned()
}

/// A `pageferry-qemu migrate`.
pub(crate) fn migrating(guests: &Guests, host: &str, to: &str, options: &[&str]) -> Running {
    migrating_by(program(), guests, host, to, options)
}

/// The same, that may trace nobody.
pub(crate) fn migrating_without_ptrace(
    guests: &Guests,
    host: &str,
    to: &str,
    options: &[&str],
) -> Running {
    let mut command = Command::new("strace");
    command.args([
        "-f",
        "-o",
        "/dev/null",
        "-e",
        "trace=ptrace",
        "-e",
        "inject=ptrace:error=EPERM",
    ]);
    command.arg(program().get_program());
    migrating_by(command, guests, host, to, options)
}

fn migrating_by(
    mut command: Command,
    guests: &Guests,
    host: &str,
    to: &str,
    options: &[&str],
) -> Running {
    command.args(["migrate", "--json", "--to", to, "--qmp"]);
    command.arg(guests.path(&format!("{host}.qmp"))).args(options);
    Running::start(&mut command)
}

/// Moves a guest by the program, and compares memory; its report, and its exit status.
pub(crate) fn migrate(
    guests: &Guests,
    host: &str,
    to: &str,
    options: &[&str],
) -> (Value, Option<i32>) {
    let options = [&["--verify"], options].concat();
    migrating(guests, host, to, &options).end()
}

/// What `pageferry-qemu recover` knows of a side, if it did what it was asked.
pub(crate) fn recover(guests: &Guests, host: &str, options: &[&str]) -> Option<Value> {
    let ended = program()
        .args(["recover", "--json", "--qmp"])
        .arg(guests.path(&format!("{host}.qmp")))
        .args(options)
        .output()
        .unwrap();
    eprint!("{}", String::from_utf8_lossy(&ended.stderr));
    ended.status.success().then(|| serde_json::from_slice(&ended.stdout).unwrap())
}

/// Says so if there is none.
pub(crate) fn has_kvm() -> bool {
    let opened = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &opened {
        eprintln!("skipped, because there is no /dev/kvm: {error}");
    }
    opened.is_ok()
}

/// Says so if there is none.
pub(crate) fn has_strace() -> bool {
    let has = Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_ok();
    if !has {
        eprintln!("skipped, because there is no strace");
    }
    has
}

/// Waits until something holds that nobody says.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "it does not come to pass: {what}");
        // Who looks all the time takes a CPU from the guest.
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Says so if what a guest of this user's QEMU writes cannot be tracked here by another program.
pub(crate) fn may_track() -> bool {
    if let Err(error) = Tracking::of_this_kernel() {
        eprintln!("skipped, because pages cannot be tracked here: {error}");
        return false;
    }
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let may_trace = matches!(scope.trim(), "" | "0") || rustix::process::geteuid().is_root();
    if !may_trace {
        eprintln!(
            "skipped, because kernel.yama.ptrace_scope is {} and this is not root",
            scope.trim()
        );
    }
    may_trace
}

/// A guest that is heard all the time: one whose console is full stands still, and writes nothing.
pub(crate) struct Heard(Receiver<u64>);

impl Heard {
    pub(crate) fn of(mut console: Console) -> Self {
        let (say, passes) = unbounded();
        std::thread::spawn(move || while say.send(console.pass()).is_ok() {});
        Self(passes)
    }

    /// The number of its next whole pass, without an error.
    pub(crate) fn next(&self) -> u64 {
        self.0.recv_timeout(Duration::from_secs(300)).expect("the guest says more")
    }

    /// Waits for a whole pass from now on, and says which it is.
    pub(crate) fn await_pass(&self) -> u64 {
        self.0.try_iter().for_each(drop);
        self.next();
        self.next()
    }
}
