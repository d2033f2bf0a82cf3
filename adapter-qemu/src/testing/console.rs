//! What a guest says.

use std::io::{self, BufRead, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

use super::guests::Guests;
use crate::qmp::{Qmp, QmpError};

/// How long the guest may take to come up, or to say its next line.
const PATIENCE: Duration = Duration::from_secs(300);

/// A line of a guest's.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Word {
    /// It lives: every millisecond of its own clock, if [`Guests::beats`].
    Beat,
    /// One of its processes has gone through all that is its own, and has found no error.
    Pass {
        /// "memory", "second" or "disk".
        process: String,
        /// How many that makes.
        pass: u64,
    },
    /// Anything else that it says: it has found an error.
    Wrong(String),
}

/// The console of a guest on one host.
#[derive(Debug)]
pub struct Console {
    listener: UnixListener,
    /// Of the same QEMU.
    monitor: PathBuf,
    lines: Option<BufReader<UnixStream>>,
}

impl Console {
    /// Of the guest on a host of that name, which has not been started.
    ///
    /// # Panics
    ///
    /// If there can be none at that place.
    pub fn of(guests: &Guests, host: &str) -> Self {
        let [at, monitor] = ["console", "qmp"].map(|what| guests.path(&format!("{host}.{what}")));
        let listener = UnixListener::bind(at).expect("a socket for the console");
        Self { listener, monitor, lines: None }
    }

    /// What it says next; `None` when its QEMU is gone. Then the next call waits for another QEMU. An error of the
    /// kind `WouldBlock` or `TimedOut` is a guest that says nothing for five minutes.
    pub fn hear(&mut self) -> io::Result<Option<Word>> {
        loop {
            let lines = match &mut self.lines {
                Some(lines) => lines,
                none => none.insert(accept(&self.listener)?),
            };
            let mut line = Vec::new();
            lines.read_until(b'\n', &mut line)?;
            if line.is_empty() {
                self.lines = None;
                return Ok(None);
            }
            if let Some(word) = word(String::from_utf8_lossy(&line).trim_end()) {
                return Ok(Some(word));
            }
        }
    }

    /// The number of its next whole pass over its memory, which has found no error.
    ///
    /// # Panics
    ///
    /// If it has found one, or says nothing.
    pub fn pass(&mut self) -> u64 {
        self.pass_of("memory")
    }

    /// The number of the next whole pass by that of its processes, which, as all others, has found no error. Where its
    /// QEMU is gone, another one has the guest.
    ///
    /// # Panics
    ///
    /// If it has found one, or says nothing.
    pub fn pass_of(&mut self, of: &str) -> u64 {
        loop {
            let word = self.hear().unwrap_or_else(|error| {
                panic!("the guest says nothing: {error}; {}", self.state())
            });
            match word {
                Some(Word::Pass { process, pass }) if process == of => return pass,
                Some(Word::Wrong(said)) => panic!("the guest says: {said}"),
                Some(Word::Beat | Word::Pass { .. }) | None => {}
            }
        }
    }
}

impl Console {
    /// What its QEMU says of a guest that is silent: whether it runs, and where its virtual CPU is.
    fn state(&self) -> String {
        let ask = || {
            let monitor = Qmp::connect(&self.monitor)?;
            let status = monitor.execute("query-status", Value::Null)?;
            let ask = |line: &str| {
                monitor.execute("human-monitor-command", json!({ "command-line": line }))
            };
            // Twice: does it move?
            let [then, now] = [ask("info registers")?, ask("info registers")?];
            Ok::<_, QmpError>(format!("its QEMU says: {status}, {then}, and then {now}"))
        };
        ask().unwrap_or_else(|error| format!("its QEMU says nothing: {error}"))
    }
}

/// What a line says; the kernel's own say nothing.
fn word(line: &str) -> Option<Word> {
    if line == "beat" {
        return Some(Word::Beat);
    }
    let said = line.strip_prefix("guest: ")?;
    let words: Vec<_> = said.split(' ').collect();
    if let [process, "pass", pass, "errors", "0"] = *words
        && let Ok(pass) = pass.parse()
    {
        return Some(Word::Pass { process: process.to_owned(), pass });
    }
    Some(Word::Wrong(said.to_owned()))
}

/// The console of the next QEMU.
fn accept(listener: &UnixListener) -> io::Result<BufReader<UnixStream>> {
    let patience = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
    if poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&patience))? == 0 {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "no QEMU has the guest"));
    }
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(BufReader::new(stream))
}
