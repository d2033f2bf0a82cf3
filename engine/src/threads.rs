//! Threads are the host's: it may want names, seccomp filters, CPU sets or cgroups on them.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

/// What a thread of the engine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ThreadRole {
    /// Accepts connections for a transport. Started by the transport, if its host asks it to.
    Acceptor,
    /// Waits for control messages.
    Control,
    /// Drives a data channel at the source.
    Sender(u16),
    /// Drives a data channel at the destination.
    Receiver(u16),
}

impl fmt::Display for ThreadRole {
    /// A name that fits the kernel's 15 bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Acceptor => f.write_str("ferry-accept"),
            Self::Control => f.write_str("ferry-control"),
            Self::Sender(channel) => write!(f, "ferry-send-{channel}"),
            Self::Receiver(channel) => write!(f, "ferry-recv-{channel}"),
        }
    }
}

/// What a thread runs.
pub type ThreadBody = Box<dyn FnOnce() + Send>;

/// Starts the engine's threads; the engine joins every one before a migration returns.
pub trait Spawn: Send + Sync {
    /// Starts a thread that runs `body` to its end, after whatever the host wants done first.
    fn spawn(&self, role: ThreadRole, body: ThreadBody) -> io::Result<JoinHandle<()>>;
}

/// Plain `std` threads named after their role.
#[derive(Debug, Clone, Copy, Default)]
pub struct StdThreads;

impl Spawn for StdThreads {
    fn spawn(&self, role: ThreadRole, body: ThreadBody) -> io::Result<JoinHandle<()>> {
        thread::Builder::new().name(role.to_string()).spawn(body)
    }
}

/// Threads that are joined together.
pub(crate) struct Crew {
    spawn: Arc<dyn Spawn>,
    handles: Vec<JoinHandle<()>>,
}

impl Crew {
    pub(crate) fn new(spawn: Arc<dyn Spawn>) -> Self {
        Self { spawn, handles: Vec::new() }
    }

    pub(crate) fn spawn(
        &mut self,
        role: ThreadRole,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        self.handles.push(self.spawn.spawn(role, Box::new(body))?);
        Ok(())
    }

    /// Waits for all. Whoever calls this has made sure that they end: by an interrupt of the
    /// link, or because their work is done.
    pub(crate) fn join(&mut self) {
        for handle in self.handles.drain(..) {
            if handle.join().is_err() {
                tracing::error!("a thread of the engine panicked");
            }
        }
    }
}
