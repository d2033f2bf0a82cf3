//! What an acceptor and the links that came from it share.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::{Arrived, Bell, Board};
use crate::transport::{Interrupt, LinkId, Returning, TransportError};

/// An acceptor's thread, shared by the acceptor and its links. Ends with the last of them.
#[derive(Debug)]
pub struct Desk<A, C> {
    board: Arc<Board<A, C>>,
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl<A, C> Desk<A, C> {
    /// Starts the thread by `spawn`. It has to end once the [board is stopped](Board::is_stopped), of which
    /// the bell tells.
    pub fn open<W: FnOnce() + Send + 'static>(
        work: impl FnOnce(Arc<Board<A, C>>, Arc<Bell>) -> W,
        spawn: impl FnOnce(Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>,
    ) -> io::Result<Self> {
        let (board, bell) = (Arc::new(Board::default()), Arc::new(Bell::new()?));
        let thread = spawn(Box::new(work(Arc::clone(&board), Arc::clone(&bell))))?;
        Ok(Self { board, bell, thread: Some(thread) })
    }

    /// What its thread and the links tell each other by.
    pub fn board(&self) -> &Arc<Board<A, C>> {
        &self.board
    }
}

impl<A: Arrived, C: Default> Desk<A, C> {
    /// Waits for a source, at most `timeout` (`None`: until there is one).
    pub fn accept(
        self: &Arc<Self>,
        timeout: Option<Duration>,
    ) -> Result<(A, Seat<A, C>), TransportError> {
        self.accept_while(timeout, || Ok(()))
    }

    fn accept_while(
        self: &Arc<Self>,
        timeout: Option<Duration>,
        check: impl Fn() -> Result<(), TransportError>,
    ) -> Result<(A, Seat<A, C>), TransportError> {
        let arrived = self.board.next_migration(timeout, check)?;
        let (desk, link) = (Arc::clone(self), arrived.link());
        Ok((arrived, Seat { desk, link }))
    }
}

/// Where the links of one migration come in: may be closed, and the desk stays open for others.
#[derive(Debug)]
pub struct Entrance<A, C> {
    desk: Arc<Desk<A, C>>,
    door: Arc<Door<A, C>>,
}

#[derive(Debug)]
struct Door<A, C> {
    closed: AtomicBool,
    board: Weak<Board<A, C>>,
}

impl<A, C> Entrance<A, C> {
    /// An entrance of its own.
    pub fn of(desk: &Arc<Desk<A, C>>) -> Self {
        let door = Door { closed: AtomicBool::new(false), board: Arc::downgrade(&desk.board) };
        Self { desk: Arc::clone(desk), door: Arc::new(door) }
    }
}

impl<A: Arrived + Send + 'static, C: Default + Send + 'static> Entrance<A, C> {
    /// As [`Desk::accept`].
    pub fn accept(&self, timeout: Option<Duration>) -> Result<(A, Seat<A, C>), TransportError> {
        self.desk.accept_while(timeout, || {
            if self.door.closed.load(Ordering::SeqCst) {
                return Err(TransportError::Interrupted);
            }
            Ok(())
        })
    }

    /// A handle that closes it.
    pub fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.door) as Arc<dyn Interrupt>
    }
}

impl<A: Send, C: Send> Interrupt for Door<A, C> {
    fn interrupt(&self) {
        self.closed.store(true, Ordering::SeqCst);
        if let Some(board) = self.board.upgrade() {
            board.wake_all();
        }
    }
}

/// The place of a source that was accepted, for its link to keep. Dropped, it is free for the next one.
#[derive(Debug)]
pub struct Seat<A, C> {
    desk: Arc<Desk<A, C>>,
    link: LinkId,
}

impl<A, C> Seat<A, C> {
    /// Whose it is.
    pub fn link(&self) -> LinkId {
        self.link
    }
}

impl<A: Arrived, C: Default> Seat<A, C> {
    /// From now on the source of this link may displace it, when it comes back.
    pub fn expect_return(&self, returning: Returning) {
        self.desk.board.expect_return(self.link, returning);
    }

    /// Changes what waits for the link.
    pub fn connections<T>(&self, change: impl FnOnce(&mut C) -> T) -> Option<T> {
        self.desk.board.connections(self.link, |connections| connections.map(change))
    }

    /// Waits until there is something to take of what waits for the link, at most until `deadline`; `None` if
    /// there was not. Fails once `check` does.
    pub fn take<T>(
        &self,
        deadline: Option<Instant>,
        check: impl Fn() -> Result<(), TransportError>,
        take: impl FnMut(&mut C) -> Option<T>,
    ) -> Result<Option<T>, TransportError> {
        self.desk.board.take(self.link, deadline, check, take)
    }
}

impl<A, C> Drop for Seat<A, C> {
    fn drop(&mut self) {
        self.desk.board.end_migration();
    }
}

impl<A, C> Drop for Desk<A, C> {
    fn drop(&mut self) {
        self.board.stop(None);
        self.bell.ring();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the acceptor's thread panicked");
        }
    }
}

/// Starts an acceptor's thread, for a host that does not want to do that itself.
pub fn spawn_named(body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
    // Fits the kernel's 15 bytes.
    thread::Builder::new().name("ferry-accept".to_owned()).spawn(body)
}
