//! A userfaultfd of another process.

use std::os::fd::OwnedFd;

use super::error::ForeignError;
use super::process::ForeignProcess;
use crate::pagemap::negotiated;

/// A userfaultfd that was made in another process, and so speaks of its memory.
#[derive(Debug)]
pub struct ForeignUserfaultfd(OwnedFd);

impl ForeignUserfaultfd {
    /// One that the other process made itself and handed over, by a Unix socket or by inheritance: of its
    /// main thread or any other, with `UFFD_USER_MODE_ONLY` or without, before `UFFDIO_API`.
    pub fn given(descriptor: OwnedFd) -> Result<Self, ForeignError> {
        Ok(Self(negotiated(descriptor)?))
    }

    /// One that the other process is made to make: a thread of it that waits in a system call is borrowed for
    /// two others (`userfaultfd`, and `close` once the descriptor is here), by `ptrace`, and waits on. It stands
    /// still for as long as these take. Nothing of the process is changed: no memory, no code, no descriptor.
    ///
    /// It takes what `ptrace` takes (PTRACE_MODE_ATTACH_REALCREDS of ptrace(2)): the same user and
    /// kernel.yama.ptrace_scope 0, or CAP_SYS_PTRACE. The caller must not be killed meanwhile.
    pub fn made_in(process: &ForeignProcess) -> Result<Self, ForeignError> {
        Self::given(by_tracing(process)?)
    }

    pub(super) fn into_inner(self) -> OwnedFd {
        self.0
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn by_tracing(_: &ForeignProcess) -> Result<OwnedFd, ForeignError> {
    Err(ForeignError::Architecture)
}

#[cfg(target_arch = "x86_64")]
use x86_64::by_tracing;

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::io;
    use std::os::fd::{AsFd, OwnedFd};
    use std::time::{Duration, Instant};

    use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

    use super::super::ptrace::Borrowed;
    use super::{ForeignError, ForeignProcess};
    use crate::uffd::USER_MODE;

    /// How long a thread is looked for that can be borrowed.
    const PATIENCE: Duration = Duration::from_secs(2);
    const LOOK_AGAIN: Duration = Duration::from_millis(1);

    /// By a thread of our own: only who traces may wait for what it traces, and what it leaves traced in spite of
    /// all is let go with its end.
    pub(super) fn by_tracing(process: &ForeignProcess) -> Result<OwnedFd, ForeignError> {
        let pid = process.pid();
        std::thread::scope(|scope| {
            let tracer = std::thread::Builder::new()
                .name("borrow".into())
                .spawn_scoped(scope, || trace(process))
                .map_err(|cause| ForeignError::Trace {
                    pid,
                    operation: "begin the tracing",
                    cause,
                })?;
            tracer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn trace(process: &ForeignProcess) -> Result<OwnedFd, ForeignError> {
        let failed = |operation| move |cause| process.not_permitted_or(cause, operation);
        let mut thread = borrow(process)?;
        let made = thread.call(libc::SYS_userfaultfd, [USER_MODE, 0, 0]);
        let taken = made.map(|there| {
            let taken = taken_over(process, there);
            let closed = thread.call(libc::SYS_close, [there, 0, 0]);
            (taken, closed)
        });
        // First of all the thread goes on.
        thread.release().map_err(failed("let a thread go"))?;
        let (taken, closed) =
            taken.map_err(|cause| ForeignError::Userfaultfd { pid: process.pid(), cause })?;
        closed.map_err(failed("close a descriptor"))?;
        taken.map_err(failed("take over a descriptor"))
    }

    fn taken_over(process: &ForeignProcess, there: u64) -> io::Result<OwnedFd> {
        let there = i32::try_from(there).map_err(io::Error::other)?;
        Ok(pidfd_getfd(process.as_fd(), there, PidfdGetfdFlags::empty())?)
    }

    /// A thread that waits in a system call. The main thread of most is one; there are others.
    fn borrow(process: &ForeignProcess) -> Result<Borrowed, ForeignError> {
        let pid = process.pid();
        let began = Instant::now();
        loop {
            let failed = |cause| ForeignError::Proc { pid, file: "task", cause };
            let tasks = process.procfs().and_then(|process| process.tasks()).map_err(failed)?;
            for task in tasks {
                // It may have ended meanwhile.
                let Ok(task) = task else { continue };
                match Borrowed::stop(task.tid) {
                    Ok(Some(thread)) => {
                        // Not another process that has its number now.
                        let Err(ended) = process.check_alive() else { return Ok(thread) };
                        let _ = thread.release();
                        return Err(ended);
                    }
                    Ok(None) => {}
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                    Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
                    Err(cause) => return Err(process.not_permitted_or(cause, "stop a thread")),
                }
            }
            process.check_alive()?;
            let waited = began.elapsed();
            if waited >= PATIENCE {
                return Err(ForeignError::Busy { pid, waited });
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use std::process::Command;

    use super::super::ptrace::Borrowed;
    use super::*;

    #[test]
    fn who_is_traced_already_is_refused_by_name() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id();
        let process = ForeignProcess::open(pid).unwrap();
        let tracer = loop {
            // Once it sleeps.
            if let Some(tracer) = Borrowed::stop(i32::try_from(pid).unwrap()).unwrap() {
                break tracer;
            }
        };
        let refused = ForeignUserfaultfd::made_in(&process).unwrap_err();
        tracer.release().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let ForeignError::NotPermitted { needed, .. } = &refused else { panic!("{refused}") };
        assert!(needed.contains("traces it already"), "{needed}");
    }
}
