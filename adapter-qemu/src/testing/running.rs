//! A QEMU that runs.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use super::guests::{Guests, QEMU};
use crate::{Qmp, QmpError};

/// How long it may take to listen.
const PATIENCE: Duration = Duration::from_secs(300);

/// A QEMU that somebody started, before this program came. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    /// Its process.
    pub child: Child,
    /// The socket of its monitor.
    pub monitor: PathBuf,
}

impl Running {
    /// With a guest, on a host of that name; its monitor is NAME.qmp.
    pub fn start(guests: &Guests, host: &str) -> io::Result<Self> {
        Self::with(guests, host, &guests.arguments(host))
    }

    /// With arguments of its own.
    pub fn with(guests: &Guests, host: &str, arguments: &[OsString]) -> io::Result<Self> {
        Self::at(guests.path(&format!("{host}.qmp")), arguments)
    }

    /// With a monitor at that path.
    pub fn at(monitor: PathBuf, arguments: &[OsString]) -> io::Result<Self> {
        Self::by(&mut Command::new(QEMU), monitor, arguments)
    }

    /// By a command that becomes QEMU.
    pub fn by(command: &mut Command, monitor: PathBuf, arguments: &[OsString]) -> io::Result<Self> {
        let child = command
            .args(arguments)
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", monitor.display()))
            .stdin(Stdio::null())
            .spawn()?;
        Ok(Self { child, monitor })
    }

    /// As soon as it listens; an error if it ends before that.
    pub fn connect(&self) -> Result<Qmp, QmpError> {
        let began = Instant::now();
        loop {
            match Qmp::connect(&self.monitor) {
                Err(QmpError::Connect { .. }) if began.elapsed() < PATIENCE && !self.ended() => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                connected => return connected,
            }
        }
    }
}

impl Running {
    fn ended(&self) -> bool {
        let looks = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let pid = WaitId::Pid(Pid::from_child(&self.child));
        !matches!(waitid(pid, looks), Ok(None))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
