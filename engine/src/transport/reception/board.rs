//! What an acceptor's thread and the links tell each other: which source is served, which one is next, and
//! which connections wait for their link.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Holder, Place, Warnings};
use crate::transport::{Interrupt, LinkId, Returning, TransportError};

/// A source that has greeted, or needs not.
pub trait Arrived {
    /// Its link.
    fn link(&self) -> LinkId;

    /// Where it comes from.
    fn peer(&self) -> SocketAddr;

    /// Its first control frame, if it has greeted.
    fn greeting(&self) -> Option<&[u8]>;

    /// Whether it has left, as far as is known.
    fn has_left(&mut self) -> bool;

    /// What is left to know of it once somebody has accepted it.
    fn served(&self) -> Arc<dyn Served>;

    /// It gets its place, unless this fails. Must not wait.
    fn take_place(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One end of a link at the destination, as far as others concern it that want the place of its source.
pub trait Served: Send + Sync + fmt::Debug {
    /// Whether its source keeps its place ([`Standing`](super::Standing)).
    fn place(&self) -> Place;

    /// Ends it for the sake of another source.
    fn displace(&self);
}

/// Who has the place: of sources `A`, of which each may be accepted; and what of `C` waits for its link, the
/// connections of its migration.
#[derive(Debug)]
pub struct Board<A, C> {
    state: Mutex<State<A, C>>,
    changed: Condvar,
    /// Of strangers.
    pub warnings: Warnings,
}

#[derive(Debug)]
struct State<A, C> {
    current: Option<Migration<A, C>>,
    /// It has greeted, while the current one did not answer, which therefore has to go.
    next: Option<Migration<A, C>>,
    accept_interrupted: bool,
    stopped: Option<Stopped>,
}

#[derive(Debug)]
struct Stopped {
    cause: Option<io::Error>,
}

/// The one migration that is being served, until its link is gone.
#[derive(Debug)]
struct Migration<A, C> {
    id: LinkId,
    /// Until somebody accepts it.
    arrived: Option<A>,
    served: Arc<dyn Served>,
    /// Its own source, should that come back.
    returning: Option<Returning>,
    connections: C,
}

impl<A, C> Default for Board<A, C> {
    fn default() -> Self {
        let state = State { current: None, next: None, accept_interrupted: false, stopped: None };
        Self { state: Mutex::new(state), changed: Condvar::new(), warnings: Warnings::default() }
    }
}

impl<A, C> Board<A, C> {
    fn state(&self) -> MutexGuard<'_, State<A, C>> {
        // No critical section leaves it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change; `None` when the time is over.
    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State<A, C>>,
        deadline: Option<Instant>,
    ) -> Option<MutexGuard<'a, State<A, C>>> {
        let Some(deadline) = deadline else {
            return Some(self.changed.wait(state).unwrap_or_else(PoisonError::into_inner));
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        let waited = self.changed.wait_timeout(state, left);
        Some(waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    /// The link of the current migration is gone: the next one may come.
    pub fn end_migration(&self) {
        let mut state = self.state();
        let next = state.next.take();
        let ended = std::mem::replace(&mut state.current, next);
        self.changed.notify_all();
        drop(state);
        // Connections that nobody took are refused where they are dropped, which is a system call.
        drop(ended);
    }

    /// Makes everyone who waits look again.
    pub fn wake_all(&self) {
        // With the lock held nobody is between looking and waiting.
        let _state = self.state();
        self.changed.notify_all();
    }

    /// The acceptor's thread ends; with a cause if it did not mean to.
    pub fn stop(&self, cause: Option<io::Error>) {
        self.state().stopped = Some(Stopped { cause });
        self.changed.notify_all();
    }

    /// Whether the acceptor's thread was asked to end.
    pub fn is_stopped(&self) -> bool {
        self.state().stopped.is_some()
    }

    /// Once it is stopped: sources that nobody has accepted.
    pub fn left_over(&self) -> Vec<A> {
        let mut state = self.state();
        let State { current, next, .. } = &mut *state;
        [current, next].into_iter().flatten().filter_map(|waits| waits.arrived.take()).collect()
    }
}

impl<A: Send + 'static, C: Send + 'static> Board<A, C> {
    /// Makes everyone who waits look again, if there is still a board: for a link that ends.
    pub fn waker(self: &Arc<Self>) -> impl Fn() + Send + Sync + 'static + use<A, C> {
        let board = Arc::downgrade(self);
        move || {
            if let Some(board) = board.upgrade() {
                board.wake_all();
            }
        }
    }
}

impl<A: Arrived, C: Default> Board<A, C> {
    /// Gives a source its place; or gives the source back, if somebody has that.
    pub fn admit(&self, mut arrived: A) -> Option<(A, Holder)> {
        let mut state = self.state();
        state.forget_who_has_left();
        let (mut displaced, returns) = (None, state.is_returning(&arrived));
        if let Some(current) = &state.current {
            let place = if state.next.is_some() {
                Place::Open
            } else if returns {
                Place::Forfeited
            } else {
                current.served.place()
            };
            if place != Place::Forfeited {
                return Some((arrived, Holder { id: current.id, place }));
            }
            displaced = Some(Arc::clone(&current.served));
        }
        let peer = arrived.peer();
        if let Err(error) = arrived.take_place() {
            self.warnings.warn(peer, format_args!("closed a connection: {error}"));
            return None;
        }
        let migration = Migration::new(arrived);
        tracing::debug!(%peer, link = %migration.id, "has its place");
        match displaced {
            None => {
                state.current = Some(migration);
                self.changed.notify_all();
            }
            Some(displaced) => {
                state.next = Some(migration);
                drop(state);
                let whom = if returns {
                    "its own link, which seemed to live"
                } else {
                    "a source that does not answer its welcome"
                };
                self.warnings.warn(peer, format_args!("displaces {whom}"));
                displaced.displace();
            }
        }
        None
    }

    /// Whether a source is the one that has the place, and has come back.
    pub fn is_returning(&self, arrived: &A) -> bool {
        self.state().is_returning(arrived)
    }

    /// From now on the source of that link may displace it, when it comes back.
    pub fn expect_return(&self, link: LinkId, returning: Returning) {
        let mut state = self.state();
        if let Some(current) = state.current.as_mut().filter(|current| current.id == link) {
            current.returning = Some(returning);
        }
    }

    /// Waits for a source, and hands it to whoever makes a link of it. Fails once `check` does, which is asked again at
    /// each [wake-up](Self::wake_all).
    pub fn next_migration(
        &self,
        timeout: Option<Duration>,
        check: impl Fn() -> Result<(), TransportError>,
    ) -> Result<A, TransportError> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.state();
        loop {
            if state.accept_interrupted {
                return Err(TransportError::Interrupted);
            }
            check()?;
            state.check_running()?;
            state.forget_who_has_left();
            if let Some(arrived) = state.current.as_mut().and_then(|current| current.arrived.take())
            {
                return Ok(arrived);
            }
            state = self.wait(state, deadline).ok_or(TransportError::TimedOut {
                operation: "accept a migration",
                after: timeout.unwrap_or_default(),
            })?;
        }
    }

    /// Changes what waits for the link of a migration, which looks again after it; there is none if that
    /// migration is not the one that is served. Must not wait.
    pub fn connections<T>(&self, link: LinkId, change: impl FnOnce(Option<&mut C>) -> T) -> T {
        let mut state = self.state();
        state.forget_who_has_left();
        let current = state.current.as_mut().filter(|current| current.id == link);
        let changed = change(current.map(|current| &mut current.connections));
        self.changed.notify_all();
        changed
    }

    /// Waits until there is something to take of what waits for a link, at most until `deadline`; `None` if
    /// there was not. Fails once `check` does.
    pub fn take<T>(
        &self,
        link: LinkId,
        deadline: Option<Instant>,
        check: impl Fn() -> Result<(), TransportError>,
        mut take: impl FnMut(&mut C) -> Option<T>,
    ) -> Result<Option<T>, TransportError> {
        let mut state = self.state();
        loop {
            check()?;
            state.check_running()?;
            let current = state.current.as_mut().filter(|current| current.id == link);
            let Some(current) = current else {
                return Err(TransportError::OutOfOrder("connections of no migration"));
            };
            if let Some(taken) = take(&mut current.connections) {
                return Ok(Some(taken));
            }
            match self.wait(state, deadline) {
                Some(changed) => state = changed,
                None => return Ok(None),
            }
        }
    }
}

/// Ends the wait of [`Board::next_migration`], now and later.
impl<A: Send, C: Send> Interrupt for Board<A, C> {
    fn interrupt(&self) {
        self.state().accept_interrupted = true;
        self.changed.notify_all();
    }
}

impl<A: Arrived, C> State<A, C> {
    fn is_returning(&self, arrived: &A) -> bool {
        let returning = self.current.as_ref().and_then(|current| current.returning.as_ref());
        returning.zip(arrived.greeting()).is_some_and(|(returning, frame)| returning.is_back(frame))
    }

    /// A source that nobody has accepted, and nobody will, keeps no place.
    fn forget_who_has_left(&mut self) {
        let left =
            |current: &mut Migration<A, C>| current.arrived.as_mut().is_some_and(Arrived::has_left);
        self.current.take_if(left);
    }
}

impl<A, C> State<A, C> {
    fn check_running(&self) -> Result<(), TransportError> {
        let Some(Stopped { cause }) = &self.stopped else { return Ok(()) };
        let cause = match cause {
            None => io::ErrorKind::NotConnected.into(),
            Some(cause) => match cause.raw_os_error() {
                Some(code) => io::Error::from_raw_os_error(code),
                None => io::Error::new(cause.kind(), cause.to_string()),
            },
        };
        Err(TransportError::Io { operation: "accept connections", cause })
    }
}

impl<A: Arrived, C: Default> Migration<A, C> {
    fn new(arrived: A) -> Self {
        let (id, served) = (arrived.link(), arrived.served());
        Self { id, arrived: Some(arrived), served, returning: None, connections: C::default() }
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
