//! A `pageferry-vmm` process.

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

use super::PATIENCE;
use super::lines::Lines;
use super::report::Report;

/// How often who waits for one of two things looks for the other one.
const GLANCE: Duration = Duration::from_millis(20);

/// A process, killed when dropped. When a test fails, what it wrote is shown.
pub(crate) struct Process {
    name: &'static str,
    child: Child,
    pidfd: OwnedFd,
    stdin: Option<ChildStdin>,
    outputs: [UnixStream; 2],
    stdout: Lines,
    stderr: Lines,
    ended: Option<ExitStatus>,
}

/// How a process ended, and its reports.
pub(crate) struct Ended {
    name: &'static str,
    status: ExitStatus,
    pub(crate) reports: Vec<Report>,
}

impl Process {
    /// Starts the program. `name` is for messages.
    pub(crate) fn start(name: &'static str, args: &[&str]) -> Self {
        Self::start_program(name, env!("CARGO_BIN_EXE_pageferry-vmm"), args)
    }

    /// Starts another program, which may become this one.
    pub(crate) fn start_program(name: &'static str, program: &str, args: &[&str]) -> Self {
        let ((stdout, stdout_end), (stderr, stderr_end)) = (output(), output());
        let mut child = Command::new(program)
            .args(args)
            .env_remove("RUST_LOG")
            .stdin(Stdio::piped())
            .stdout(stdout_end)
            .stderr(stderr_end)
            .spawn()
            .expect("start the program");
        let pid = Pid::from_child(&child);
        Self {
            name,
            pidfd: pidfd_open(pid, PidfdFlags::empty()).expect("open a pidfd"),
            stdin: child.stdin.take(),
            outputs: [&stdout, &stderr].map(|stream| stream.try_clone().expect("clone")),
            stdout: Lines::of(stdout),
            stderr: Lines::of(stderr),
            child,
            ended: None,
        }
    }

    /// Waits for a message that contains `part`.
    pub(crate) fn await_message(&mut self, part: &str) -> String {
        self.stderr
            .wait_for(part, Instant::now() + PATIENCE)
            .unwrap_or_else(|| panic!("the {} did not say {part:?}", self.name))
    }

    /// All messages so far.
    pub(crate) fn messages(&self) -> String {
        self.stderr.so_far().join("\n")
    }

    /// Waits for a report of a process that goes on.
    pub(crate) fn await_report(&mut self) -> Report {
        Report::parse(&self.await_line())
    }

    /// The same, unless it says something that has `part` in it, and nothing follows it then.
    pub(crate) fn await_report_unless(&mut self, part: &str) -> Option<Report> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(line) = self.stdout.wait_for("", Instant::now() + GLANCE) {
                return Some(Report::parse(&line));
            }
            if self.messages().contains(part) {
                return None;
            }
            assert!(Instant::now() < deadline, "the {} did not report", self.name);
        }
    }

    /// Waits for a line on stdout.
    pub(crate) fn await_line(&mut self) -> String {
        let line = self.stdout.wait_for("", Instant::now() + PATIENCE);
        line.unwrap_or_else(|| panic!("the {} did not report", self.name))
    }

    /// A line on stdin.
    pub(crate) fn say(&mut self, line: impl AsRef<[u8]>) {
        let stdin = self.stdin.as_mut().expect("its stdin is open");
        let line = [line.as_ref(), b"\n"].concat();
        stdin.write_all(&line).unwrap_or_else(|error| panic!("the {}: {error}", self.name));
    }

    /// Asks a source for the heartbeats of its guest.
    pub(crate) fn beats(&mut self) -> u64 {
        self.say("status");
        let line = self.await_message("the guest runs here, ");
        let beats = line.split(' ').find_map(|word| word.parse().ok());
        beats.unwrap_or_else(|| panic!("no number in {line:?}"))
    }

    /// Waits until the guest at this source has beaten more often than that.
    pub(crate) fn await_beats_beyond(&mut self, beats: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.beats() <= beats {
            assert!(Instant::now() < deadline, "the guest at the {} does not beat", self.name);
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        pidfd_send_signal(&self.pidfd, signal)
            .unwrap_or_else(|error| panic!("failed to signal the {}: {error}", self.name));
    }

    /// Waits until it hears signals, which would kill it before.
    pub(crate) fn await_hearing(&self) {
        let status = format!("/proc/{}/status", self.child.id());
        let heard = [Signal::INT, Signal::TERM].map(|signal| 1 << (signal.as_raw() - 1));
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = std::fs::read_to_string(&status).expect("its status");
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
            // Of a program that is another yet, say, and of one that has ended there is none.
            let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
            if caught.is_some_and(|caught| heard.iter().all(|bit| caught & bit != 0)) {
                return;
            }
            assert!(Instant::now() < deadline, "the {} does not hear signals", self.name);
            std::thread::yield_now();
        }
    }

    /// Ends the strace that holds up one of its calls: it would hold up the end of the process as well. Waits
    /// for its end: a signal that a dying tracer has taken reaches nobody (269 of 300 in a try of that alone,
    /// none of 4000 after the tracer's end).
    pub(crate) fn trace_no_more(&self) {
        let deadline = Instant::now() + PATIENCE;
        // In a panic too, where it must not panic. What waits for ever is told by what comes next.
        while let Some(tracer) = self.tracer()
            && Instant::now() < deadline
        {
            // It may just have ended by itself, with the last of what it traces.
            let _ = kill_process(tracer, Signal::KILL);
            std::thread::yield_now();
        }
    }

    /// Who traces one of its threads.
    fn tracer(&self) -> Option<Pid> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id()));
        tasks.into_iter().flatten().flatten().find_map(|task| {
            let status = std::fs::read_to_string(task.path().join("status")).ok()?;
            let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?;
            Pid::from_raw(tracer.trim().parse().ok()?)
        })
    }

    /// Stops it, and waits until each of its threads has stopped: that comes after the signal.
    pub(crate) fn stop(&self) {
        self.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.child.id());
        let deadline = Instant::now() + PATIENCE;
        while !std::fs::read_dir(&tasks).expect("its threads").flatten().all(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            // After the name, which is in brackets and may hold anything.
            stat.rsplit_once(") ").is_some_and(|(_, fields)| fields.starts_with('T'))
        }) {
            assert!(Instant::now() < deadline, "the {} does not stop", self.name);
            std::thread::yield_now();
        }
    }

    /// The most memory it has had so far, in bytes. It has to be alive: who has ended has none.
    pub(crate) fn peak_memory_bytes(&mut self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("its status");
        let Some(peak) = status.lines().find_map(|line| line.strip_prefix("VmHWM:")) else {
            let (ended, _) = self.end();
            panic!("the {} has ended: {ended}", self.name);
        };
        let kib: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
        kib << 10
    }

    /// Whether it has not ended.
    pub(crate) fn lives(&self) -> bool {
        self.wait_until(Instant::now()).is_none()
    }

    /// From now on nobody reads what it writes, and its writes fail.
    pub(crate) fn close_outputs(&mut self) {
        for output in &self.outputs {
            output.shutdown(Shutdown::Both).expect("shut an output down");
        }
    }

    /// Waits for its end.
    pub(crate) fn finish(&mut self) -> Ended {
        let (status, lines) = self.end();
        let reports = lines.iter().map(|line| Report::parse(line)).collect();
        Ended { name: self.name, status, reports }
    }

    /// Waits for its end, for one whose stdout is for people.
    pub(crate) fn finish_for_people(&mut self) -> (Option<i32>, String) {
        let (status, lines) = self.end();
        (status.code(), lines.join("\n"))
    }

    fn end(&mut self) -> (ExitStatus, Vec<String>) {
        self.wait_until(Instant::now() + PATIENCE)
            .unwrap_or_else(|| panic!("the {} does not end", self.name));
        let status = self.child.wait().expect("wait");
        self.ended = Some(status);
        self.stderr.all();
        (status, self.stdout.all())
    }

    fn wait_until(&self, deadline: Instant) -> Option<()> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).expect("a time that poll knows");
            let mut polled = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match poll(&mut polled, Some(&left)) {
                Ok(0) => return None,
                Ok(_) => return Some(()),
                Err(Errno::INTR) => {}
                Err(error) => panic!("failed to wait for the {}: {error}", self.name),
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended.is_none() {
            // Fails only if it has just ended.
            let _ = self.child.kill();
            self.trace_no_more();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            let (out, err) = (self.stdout.so_far(), self.stderr.so_far());
            // A source that goes round and round has a lot to say.
            let skipped = err.len().saturating_sub(60);
            let (name, ended) = (self.name, self.ended);
            eprintln!("--- the {name}, ended: {ended:?}\nstdout:\n{}", out.join("\n"));
            eprintln!("stderr, but the first {skipped} lines:\n{}", err[skipped..].join("\n"));
        }
    }
}

/// An output to read, and the end for the process. A socket, for it can be shut down while a
/// thread reads.
fn output() -> (UnixStream, OwnedFd) {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    (ours, theirs.into())
}

impl Ended {
    /// Its one report, after it ended with that exit status.
    pub(crate) fn report(mut self, exit_status: i32) -> Report {
        self.assert_status(exit_status);
        let report = self.reports.pop();
        assert!(self.reports.is_empty(), "the {} reported twice", self.name);
        report.unwrap_or_else(|| panic!("the {} did not report", self.name))
    }

    /// It ended with that exit status.
    pub(crate) fn assert_status(&self, exit_status: i32) {
        let (name, status) = (self.name, self.status);
        assert_eq!(status.signal(), None, "the {name} was killed");
        assert_eq!(status.code(), Some(exit_status), "exit status of the {name}");
    }
}
