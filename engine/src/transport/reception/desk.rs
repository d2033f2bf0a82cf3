//! What an acceptor and the links that came from it share.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::{Arrived, Bell, Board};
use crate::transport::{MigrationId, TransportError};

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
        let arrived = self.board.next_migration(timeout)?;
        let (desk, migration) = (Arc::clone(self), arrived.migration());
        Ok((arrived, Seat { desk, migration }))
    }
}

/// The place of a source that was accepted, for its link to keep. Dropped, it is free for the next one.
#[derive(Debug)]
pub struct Seat<A, C> {
    desk: Arc<Desk<A, C>>,
    migration: MigrationId,
}

impl<A, C> Seat<A, C> {
    /// Whose it is.
    pub fn migration(&self) -> MigrationId {
        self.migration
    }
}

impl<A: Arrived, C: Default> Seat<A, C> {
    /// Changes what waits for the link.
    pub fn connections<T>(&self, change: impl FnOnce(&mut C) -> T) -> Option<T> {
        self.desk.board.connections(self.migration, |connections| connections.map(change))
    }

    /// Waits until there is something to take of what waits for the link, at most until `deadline`; `None` if
    /// there was not. Fails once `check` does.
    pub fn take<T>(
        &self,
        deadline: Option<Instant>,
        check: impl Fn() -> Result<(), TransportError>,
        take: impl FnMut(&mut C) -> Option<T>,
    ) -> Result<Option<T>, TransportError> {
        self.desk.board.take(self.migration, deadline, check, take)
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
