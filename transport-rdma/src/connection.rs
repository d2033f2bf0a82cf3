//! One connected queue pair, and all that can end a wait for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use pageferry::transport::{Interrupt, TransportError, WorkRequestCounts};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cm::{Event, Id};
use crate::proof::Proof;
use crate::state::ChannelState;
use crate::verbs::{Completion, QueuePair};

/// How long a wait looks for completions itself before it sleeps: a sleep and its end cost a
/// system call each and an interrupt.
pub(crate) const SPIN: Duration = Duration::from_micros(20);

/// A connected queue pair. Used by one thread at a time.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) qp: QueuePair,
    pub(crate) id: Arc<Id>,
    pub(crate) state: Arc<ChannelState>,
    /// The path MTU that was agreed on, as verbs encode it; 0 before that.
    pub(crate) mtu: u32,
    /// By which it was asked for, at the source; zeros without TLS.
    pub(crate) asked: Proof,
    /// The other side is there, and has gone.
    established: bool,
    gone: bool,
    /// Calls that waited.
    pub(crate) system_calls: u64,
    polls: u64,
}

impl Connection {
    pub(crate) fn new(qp: QueuePair, id: Id, state: ChannelState) -> Self {
        let (id, state) = (Arc::new(id), Arc::new(state));
        Self {
            qp,
            id,
            state,
            mtu: 0,
            asked: Proof::default(),
            established: false,
            gone: false,
            system_calls: 0,
            polls: 0,
        }
    }

    /// Ends this connection alone.
    pub(crate) fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::new(ConnectionInterrupt {
            state: Arc::clone(&self.state),
            id: Arc::downgrade(&self.id),
        })
    }

    /// Fails once the connection or its link was interrupted.
    pub(crate) fn check(&self) -> Result<(), TransportError> {
        self.state.check()
    }

    pub(crate) fn work_requests(&self) -> WorkRequestCounts {
        WorkRequestCounts { polls: self.polls, ..self.qp.work_requests() }
    }

    /// Adds completions to `into`. Waits for some until `deadline` (`None` for only those that are
    /// there); adds none if the time is over.
    pub(crate) fn completions(
        &mut self,
        into: &mut Vec<Completion>,
        deadline: Option<Instant>,
    ) -> Result<(), TransportError> {
        let failed = |cause| TransportError::Io { operation: "wait for completions", cause };
        let before = into.len();
        let began = Instant::now();
        let mut asked = false;
        loop {
            self.state.check()?;
            let gone = self.gone;
            self.polls += 1;
            self.qp.completions.poll(into).map_err(failed)?;
            if into.len() > before {
                return Ok(());
            }
            if gone {
                return Err(TransportError::Lost {
                    operation: "wait for completions",
                    cause: io::Error::new(
                        io::ErrorKind::ConnectionReset,
                        "the other side disconnected",
                    ),
                });
            }
            let Some(deadline) = deadline else { return Ok(()) };
            let now = Instant::now();
            if now >= deadline {
                return Ok(());
            }
            if now.duration_since(began) < SPIN {
                std::thread::yield_now();
                continue;
            }
            if !asked {
                // One that came just before makes no event: look once more.
                self.qp.completions.ask_for_event().map_err(failed)?;
                asked = true;
                continue;
            }
            asked = !self.sleep(deadline - now).map_err(failed)?;
        }
    }

    /// Takes in what has happened to the connection.
    fn take_events(&mut self) -> io::Result<()> {
        while let Some(event) = self.id.take_event()? {
            match event {
                Event::Established => self.established = true,
                Event::Disconnected
                | Event::DeviceRemoved
                | Event::Rejected { .. }
                | Event::Failed { .. } => self.gone = true,
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether the other side is known to be there; as of the last look at what happened.
    pub(crate) fn is_established(&self) -> bool {
        self.established
    }

    /// Looks whether the other side has gone, without waiting.
    pub(crate) fn has_left(&mut self) -> bool {
        self.take_events().is_err() || self.gone
    }

    /// Sleeps until anything happens; true if it was a completion.
    fn sleep(&mut self, time: Duration) -> io::Result<bool> {
        self.system_calls += 1;
        let woken = sleep(self.qp.completions.fd(), &self.id, &self.state, time)?;
        if woken.by_completion {
            self.qp.completions.take_event();
        }
        if woken.by_event {
            self.take_events()?;
        }
        if woken.by_device {
            self.state.link.look();
        }
        Ok(woken.by_completion)
    }

    /// For who waits, and is to keep nobody else from this connection meanwhile.
    pub(crate) fn sleeper(&self) -> io::Result<Sleeper> {
        Ok(Sleeper {
            completions: self.qp.completions.fd().try_clone_to_owned()?,
            id: Arc::clone(&self.id),
            state: Arc::clone(&self.state),
        })
    }

    /// Takes in what has woken a [`Sleeper`], and has the next completion wake it. One that came just before
    /// does not: look once more.
    pub(crate) fn wake(&mut self) -> Result<(), TransportError> {
        let failed = |cause| TransportError::Io { operation: "wait for completions", cause };
        self.qp.completions.take_event();
        self.take_events().map_err(failed)?;
        self.state.link.look();
        self.qp.completions.ask_for_event().map_err(failed)
    }
}

/// What ended a sleep, of what is to be taken in.
struct Woken {
    by_completion: bool,
    by_event: bool,
    by_device: bool,
}

/// Sleeps until anything happens to a connection, at most for so long.
fn sleep(
    completions: BorrowedFd<'_>,
    id: &Id,
    state: &ChannelState,
    time: Duration,
) -> io::Result<Woken> {
    let link = &state.link;
    let look_in = link.look_at().map(|at| at.saturating_duration_since(Instant::now()));
    let time = look_in.map_or(time, |look_in| look_in.min(time));
    let time = Timespec::try_from(time).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
    let (bell, device) = (link.bell(), link.device());
    let watched = [completions, id.fd(), state.bell(), bell, device.unwrap_or(bell)];
    let mut fds = watched.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    let count = if device.is_some() { 5 } else { 4 };
    match poll(&mut fds[..count], Some(&time)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let ready = fds.map(|fd| !fd.revents().is_empty());
    Ok(Woken {
        by_completion: ready[0],
        by_event: ready[1],
        by_device: ready[4] || look_in.is_some(),
    })
}

/// Waits for what happens to a connection that others use meanwhile.
#[derive(Debug)]
pub(crate) struct Sleeper {
    completions: OwnedFd,
    id: Arc<Id>,
    state: Arc<ChannelState>,
}

impl Sleeper {
    pub(crate) fn state(&self) -> &ChannelState {
        &self.state
    }

    /// Sleeps until anything happens, at most for so long. What it was is for [`Connection::wake`].
    pub(crate) fn sleep(&self, time: Duration) -> Result<(), TransportError> {
        let failed = |cause| TransportError::Io { operation: "wait for completions", cause };
        sleep(self.completions.as_fd(), &self.id, &self.state, time).map(drop).map_err(failed)
    }
}

/// Holds neither queues nor memory.
struct ConnectionInterrupt {
    state: Arc<ChannelState>,
    id: Weak<Id>,
}

impl Interrupt for ConnectionInterrupt {
    fn interrupt(&self) {
        self.state.interrupt();
        if let Some(id) = self.id.upgrade() {
            // The other side is not to wait for this one's thread to notice.
            id.disconnect();
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.id.disconnect();
    }
}
