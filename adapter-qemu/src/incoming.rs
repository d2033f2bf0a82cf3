//! A QEMU that is started to take a guest in.

use std::ffi::OsString;
use std::io;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use thiserror::Error;

use crate::device_state;
use crate::qmp::{Qmp, QmpError};

/// How long QEMU may take until its monitor greets: with `prealloc` it touches all of its RAM before.
const STARTS_WITHIN: Duration = Duration::from_secs(120);
/// How long it may take to end when it is told to.
const ENDS_WITHIN: Duration = Duration::from_secs(10);

/// How QEMU is started: its program and what the user gives it. What it needs to wait for a guest is added.
#[derive(Debug, Clone)]
pub struct QemuCommand {
    /// The program.
    pub program: PathBuf,
    /// Its arguments: machine, RAM and devices as at the source.
    pub arguments: Vec<OsString>,
}

/// Why no QEMU waits for a guest.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum IncomingError {
    /// It could not be started.
    #[error("failed to start {}", .program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// There is no socket for its monitor.
    #[error("failed to {operation} QEMU's monitor")]
    Monitor {
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// It ended before its monitor greeted.
    #[error("QEMU ended before it waited for a guest ({status}); its own messages say why")]
    Ended {
        /// How.
        status: ExitStatus,
    },
    /// Its monitor did not come.
    #[error("QEMU's monitor did not come within {} s", .waited.as_secs())]
    Silent {
        /// For so long.
        waited: Duration,
    },
    /// It did not do what it was asked.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// It is something else than a QEMU that waits.
    #[error("QEMU does not wait for a guest, its state is {status:?}")]
    NotWaiting {
        /// QEMU's word for it.
        status: String,
    },
}

/// A QEMU that waits for a guest, with a monitor that nobody else has. Dropping it ends it, until the guest runs.
#[derive(Debug)]
pub(crate) struct Incoming {
    child: Option<Child>,
    qmp: Arc<Qmp>,
    guest_runs: bool,
}

impl Incoming {
    /// Starts QEMU and waits until it waits.
    pub(crate) fn start(command: &QemuCommand) -> Result<Self, IncomingError> {
        let failed = |operation| move |cause| IncomingError::Monitor { operation, cause };
        // QEMU connects to it, so that nobody has to look whether its socket is there.
        let folder = tempfile::tempdir().map_err(failed("make a folder for"))?;
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).map_err(failed("make a socket for"))?;
        let mut socket = OsString::from("socket,id=pageferry,path=");
        socket.push(&path);
        let child = Command::new(&command.program)
            .args(&command.arguments)
            .arg("-chardev")
            .arg(socket)
            .args(["-mon", "chardev=pageferry,mode=control", "-incoming", "defer", "-S"])
            .stdin(Stdio::null())
            // Whose output this program's is waits for its end, and not for the guest's.
            .stdout(io::stderr())
            // What a terminal tells this program is not for the guest.
            .process_group(0)
            .spawn()
            .map_err(|cause| IncomingError::Start { program: command.program.clone(), cause })?;
        let mut child = Starting(Some(child));
        let stream = child.monitor(&listener)?;
        let qmp = Arc::new(Qmp::over(stream)?);
        let state = qmp.run_state()?;
        if state.status != "inmigrate" {
            return Err(IncomingError::NotWaiting { status: state.status });
        }
        device_state::prepare(&qmp, true)?;
        Ok(Self { child: child.0.take(), qmp, guest_runs: false })
    }

    pub(crate) fn qmp(&self) -> &Arc<Qmp> {
        &self.qmp
    }

    /// Lets the guest run. Nothing that fails here later is to end it.
    pub(crate) fn run(&mut self) -> Result<(), QmpError> {
        self.qmp.cont()?;
        self.guest_runs = true;
        Ok(())
    }

    /// Its process, which lives on.
    pub(crate) fn keep(mut self) -> (Option<Child>, Arc<Qmp>) {
        (self.child.take(), Arc::clone(&self.qmp))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        let Some(child) = self.child.take().filter(|_| !self.guest_runs) else { return };
        if let Err(error) = self.qmp.quit() {
            tracing::debug!(%error, "QEMU was not told to quit");
        }
        end(child);
    }
}

/// A QEMU that has not greeted yet.
struct Starting(Option<Child>);

impl Starting {
    /// The connection of its monitor.
    fn monitor(
        &mut self,
        listener: &UnixListener,
    ) -> Result<std::os::unix::net::UnixStream, IncomingError> {
        let failed = |operation| move |cause| IncomingError::Monitor { operation, cause };
        let Some(child) = &mut self.0 else {
            return Err(IncomingError::Silent { waited: Duration::ZERO });
        };
        let gone = |child: &Child| pidfd(child).map_err(failed("watch who starts"));
        let pidfd = gone(child)?;
        let deadline = Instant::now() + STARTS_WITHIN;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut polled =
                [PollFd::new(listener, PollFlags::IN), PollFd::new(&pidfd, PollFlags::IN)];
            match poll(&mut polled, Some(&time(left))) {
                Ok(0) => return Err(IncomingError::Silent { waited: STARTS_WITHIN }),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(cause) => return Err(failed("wait for")(cause.into())),
            }
            if !polled[0].revents().is_empty() {
                return Ok(listener.accept().map_err(failed("accept"))?.0);
            }
            if !polled[1].revents().is_empty() {
                let status = child.wait().map_err(failed("wait for"))?;
                self.0 = None;
                return Err(IncomingError::Ended { status });
            }
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = self.0.take() {
            end(child);
        }
    }
}

/// Waits for the end of a process, and sees to it.
fn end(mut child: Child) {
    let ended = pidfd(&child).is_ok_and(|pidfd| {
        let deadline = Instant::now() + ENDS_WITHIN;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&time(left))) {
                Err(rustix::io::Errno::INTR) => {}
                polled => break polled == Ok(1),
            }
        }
    });
    if !ended && let Err(error) = child.kill() {
        tracing::warn!(%error, pid = child.id(), "a QEMU that took no guest is left");
        return;
    }
    if let Err(error) = child.wait() {
        tracing::warn!(%error, "a QEMU that took no guest is left");
    }
}

fn pidfd(child: &Child) -> io::Result<std::os::fd::OwnedFd> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::NotFound)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

fn time(left: Duration) -> Timespec {
    let seconds = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
    Timespec { tv_sec: seconds, tv_nsec: left.subsec_nanos().into() }
}
