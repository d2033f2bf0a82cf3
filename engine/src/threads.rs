//! Threads are the host's: it may want names, seccomp filters, CPU sets or cgroups on them.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use tracing::Span;

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
    /// Populates guest memory at the destination.
    Populate(u16),
    /// Sends the device state, if that is long, during a switchover.
    DeviceState,
}

impl fmt::Display for ThreadRole {
    /// A name that fits the kernel's 15 bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Acceptor => f.write_str("ferry-accept"),
            Self::Control => f.write_str("ferry-control"),
            Self::Sender(channel) => write!(f, "ferry-send-{channel}"),
            Self::Receiver(channel) => write!(f, "ferry-recv-{channel}"),
            Self::Populate(thread) => write!(f, "ferry-popu-{thread}"),
            Self::DeviceState => f.write_str("ferry-state"),
        }
    }
}

/// What a thread runs.
pub type ThreadBody = Box<dyn FnOnce() + Send>;

/// Starts the engine's threads; the engine joins every one before a migration returns.
pub trait Spawn: Send + Sync {
    /// Has a thread run `body` to its end, after whatever the host wants done first.
    ///
    /// It may be one of a pool. All bodies of a migration run at the same time: a pool in which one of them has to
    /// wait for another to end holds the migration up until a time limit ends it.
    fn spawn(&self, role: ThreadRole, body: ThreadBody) -> io::Result<Box<dyn Running>>;
}

/// A thread that runs a body.
pub trait Running: Send {
    /// Whether the body has ended.
    fn is_finished(&self) -> bool;

    /// Waits until it has: `Err` with what it panicked with. Called once, from the thread that runs the migration.
    fn join(self: Box<Self>) -> thread::Result<()>;
}

impl Running for JoinHandle<()> {
    fn is_finished(&self) -> bool {
        Self::is_finished(self)
    }

    fn join(self: Box<Self>) -> thread::Result<()> {
        Self::join(*self)
    }
}

/// Plain `std` threads named after their role.
#[derive(Debug, Clone, Copy, Default)]
pub struct StdThreads;

impl Spawn for StdThreads {
    fn spawn(&self, role: ThreadRole, body: ThreadBody) -> io::Result<Box<dyn Running>> {
        Ok(Box::new(thread::Builder::new().name(role.to_string()).spawn(body)?))
    }
}

/// [`StdThreads`], with the threads of data channels bound to CPUs: channel `i` to the `i`-th of
/// the list, over again from its start when there are more channels.
///
/// A thread that cannot be bound (the CPU does not exist, or is not allowed to this process, or this is
/// not Linux) runs unbound, and a warning says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinnedThreads {
    cpus: Vec<usize>,
}

impl PinnedThreads {
    /// With CPU numbers as the kernel counts them. An empty list binds nothing.
    pub fn new(cpus: Vec<usize>) -> Self {
        Self { cpus }
    }

    fn cpu(&self, role: ThreadRole) -> Option<usize> {
        match role {
            ThreadRole::Sender(channel) | ThreadRole::Receiver(channel)
                if !self.cpus.is_empty() =>
            {
                Some(self.cpus[usize::from(channel) % self.cpus.len()])
            }
            _ => None,
        }
    }
}

impl Spawn for PinnedThreads {
    fn spawn(&self, role: ThreadRole, body: ThreadBody) -> io::Result<Box<dyn Running>> {
        let Some(cpu) = self.cpu(role) else { return StdThreads.spawn(role, body) };
        let bound = move || {
            if let Err(error) = bind_to(cpu) {
                tracing::warn!(%error, cpu, %role, "a thread could not be bound to its CPU");
            }
            body();
        };
        StdThreads.spawn(role, Box::new(bound))
    }
}

/// Binds the calling thread.
#[cfg(target_os = "linux")]
fn bind_to(cpu: usize) -> io::Result<()> {
    use rustix::thread::{CpuSet, sched_setaffinity};

    if cpu >= CpuSet::MAX_CPU {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}

#[cfg(not(target_os = "linux"))]
fn bind_to(_cpu: usize) -> io::Result<()> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "threads are bound to CPUs on Linux only"))
}

/// Threads that are joined together.
pub(crate) struct Crew {
    spawn: Arc<dyn Spawn>,
    /// What they are part of.
    span: Span,
    handles: Vec<Box<dyn Running>>,
}

impl Crew {
    pub(crate) fn new(spawn: Arc<dyn Spawn>) -> Self {
        Self { spawn, span: Span::current(), handles: Vec::new() }
    }

    pub(crate) fn spawn(
        &mut self,
        role: ThreadRole,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        // Who has ended keeps its stack until it is joined.
        let (ended, others) = self.handles.drain(..).partition(|thread| thread.is_finished());
        self.handles = ended;
        self.join();
        self.handles = others;
        let span = self.span.clone();
        self.handles.push(self.spawn.spawn(role, Box::new(move || span.in_scope(body)))?);
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

#[cfg(test)]
mod tests {
    use crossbeam_channel::bounded;
    use rustix::thread::{CpuSet, sched_getaffinity};

    use super::*;

    /// The CPUs a thread of this role may run on.
    fn cpus_of(spawn: &dyn Spawn, role: ThreadRole) -> Vec<usize> {
        let (tell, told) = bounded(1);
        let body = Box::new(move || {
            let set = sched_getaffinity(None).unwrap();
            let cpus = (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu));
            tell.send(cpus.collect()).unwrap();
        });
        spawn.spawn(role, body).unwrap().join().unwrap();
        told.recv().unwrap()
    }

    #[test]
    fn data_channels_are_bound_in_turn_and_others_are_free() {
        let free = cpus_of(&StdThreads, ThreadRole::Control);
        let some = vec![free[0], *free.last().unwrap()];
        let pinned = PinnedThreads::new(some.clone());
        for channel in 0..5_u16 {
            let expected = vec![some[usize::from(channel) % 2]];
            assert_eq!(cpus_of(&pinned, ThreadRole::Sender(channel)), expected);
            assert_eq!(cpus_of(&pinned, ThreadRole::Receiver(channel)), expected);
        }
        assert_eq!(cpus_of(&pinned, ThreadRole::Control), free);
        assert_eq!(cpus_of(&PinnedThreads::new(Vec::new()), ThreadRole::Sender(0)), free);
    }

    #[test]
    fn a_cpu_that_does_not_exist_is_survived() {
        let free = cpus_of(&StdThreads, ThreadRole::Control);
        for cpu in [CpuSet::MAX_CPU - 1, usize::MAX] {
            assert_eq!(cpus_of(&PinnedThreads::new(vec![cpu]), ThreadRole::Sender(0)), free);
        }
    }
}
