//! One connected queue pair, and all that can end a wait for it.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::transport::{Interrupt, TransportError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cm::{Event, Id};
use crate::state::{LinkState, OwnStop};
use crate::verbs::{Completion, QueuePair};

/// How long a wait looks for completions itself before it sleeps: a sleep and its end cost a
/// system call each and an interrupt.
const SPIN: Duration = Duration::from_micros(20);

/// A connected queue pair. Used by one thread at a time.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) qp: QueuePair,
    pub(crate) id: Id,
    state: Arc<LinkState>,
    stop: Arc<OwnStop>,
    /// The other side has gone.
    gone: bool,
    /// Calls that waited.
    pub(crate) system_calls: u64,
}

impl Connection {
    pub(crate) fn new(qp: QueuePair, id: Id, state: Arc<LinkState>) -> io::Result<Self> {
        Ok(Self { qp, id, state, stop: OwnStop::new()?, gone: false, system_calls: 0 })
    }

    /// Fails once the link or this connection was interrupted.
    pub(crate) fn check(&self) -> Result<(), TransportError> {
        self.stop.check().and_then(|()| self.state.check())
    }

    /// A handle that ends this connection alone.
    pub(crate) fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.stop) as Arc<dyn Interrupt>
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
            self.check()?;
            let gone = self.gone;
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

    /// Sleeps until anything happens; true if it was a completion.
    fn sleep(&mut self, time: Duration) -> io::Result<bool> {
        let time = Timespec::try_from(time).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
        let (bell, device) = (self.state.bell(), self.state.device());
        let watched = [
            self.qp.completions.fd(),
            self.id.fd(),
            bell,
            self.stop.bell(),
            device.unwrap_or(bell),
        ];
        let mut fds = watched.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let count = if device.is_some() { 5 } else { 4 };
        self.system_calls += 1;
        match poll(&mut fds[..count], Some(&time)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let ready = fds.map(|fd| !fd.revents().is_empty());
        if ready[0] {
            self.qp.completions.take_event();
        }
        if ready[1] {
            while let Some(event) = self.id.take_event()? {
                self.gone |= matches!(event, Event::Disconnected | Event::DeviceRemoved);
            }
        }
        if ready[4] {
            self.state.look();
        }
        Ok(ready[0])
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.id.disconnect();
    }
}
