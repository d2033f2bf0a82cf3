//! Where connections come in, and wait for who wants them.

use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry::transport::{MigrationId, TransportError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cm::{Event, Id};
use crate::preamble::{Preamble, Purpose};
use crate::state::LinkState;

/// Requests that may wait.
const BACKLOG: i32 = 64;

/// How often someone who waits looks whether another has taken in what he waits for.
const GLANCE: Duration = Duration::from_millis(20);

/// Somebody who wants to connect, and is not answered yet.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) id: Id,
    pub(crate) preamble: Preamble,
}

#[derive(Debug)]
pub(crate) struct Listener {
    id: Id,
    pub(crate) local: SocketAddr,
    desk: Mutex<Desk>,
}

#[derive(Debug, Default)]
struct Desk {
    waiting: Vec<Request>,
    /// Migrations whose connections are expected.
    expected: Vec<MigrationId>,
}

impl Desk {
    /// Whether somebody may want it; why not, in words for the other side.
    fn admit(&self, preamble: Preamble) -> Result<Preamble, &'static str> {
        if self.waiting.len() >= usize::try_from(BACKLOG).unwrap_or(0) {
            return Err("too many connections are waiting");
        }
        let begins = matches!(preamble.purpose, Purpose::Control | Purpose::ControlBack);
        if !begins && !self.expected.contains(&preamble.migration) {
            return Err("no such migration");
        }
        Ok(preamble)
    }
}

impl Listener {
    pub(crate) fn bind(mut address: SocketAddr) -> io::Result<Self> {
        let id = Id::new()?;
        address.set_port(id.listen(address, BACKLOG)?);
        Ok(Self { id, local: address, desk: Mutex::default() })
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        // No critical section leaves it half changed.
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets further connections of a migration in.
    pub(crate) fn expect(&self, migration: MigrationId) {
        self.desk().expected.push(migration);
    }

    /// Its link is gone.
    pub(crate) fn forget(&self, migration: MigrationId) {
        let mut desk = self.desk();
        desk.expected.retain(|other| *other != migration);
        desk.waiting.retain(|request| request.preamble.migration != migration);
    }

    /// Takes the first request that is wanted; waits for it until `deadline`.
    pub(crate) fn take(
        &self,
        wanted: impl Fn(&Preamble) -> bool,
        deadline: Option<Instant>,
        state: &LinkState,
    ) -> Result<Option<Request>, TransportError> {
        let failed = |cause| TransportError::Io { operation: "wait for a connection", cause };
        loop {
            state.check()?;
            {
                let mut desk = self.desk();
                self.take_in(&mut desk).map_err(failed)?;
                let found = desk.waiting.iter().position(|request| wanted(&request.preamble));
                if let Some(index) = found {
                    return Ok(Some(desk.waiting.remove(index)));
                }
            }
            let left = match deadline {
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
                None => GLANCE,
            };
            if left.is_zero() {
                return Ok(None);
            }
            let glance = left.min(GLANCE);
            let glance = Timespec::try_from(glance).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 1 });
            let mut fds = [PollFd::from_borrowed_fd(self.id.fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&glance)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
        }
    }

    /// Takes in what has come; answers what nobody will want.
    fn take_in(&self, desk: &mut Desk) -> io::Result<()> {
        while let Some(event) = self.id.take_event()? {
            let Event::Requested { id, said } = event else { continue };
            match Preamble::decode(&said).and_then(|preamble| desk.admit(preamble)) {
                Ok(preamble) => desk.waiting.push(Request { id, preamble }),
                Err(what) => {
                    tracing::warn!(peer = ?id.peer(), "refused a connection: {what}");
                    id.reject(what.as_bytes());
                }
            }
        }
        Ok(())
    }
}
