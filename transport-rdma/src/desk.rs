//! What the acceptor and the links that came from it share.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::board::Board;
use crate::cm::Id;
use crate::dial::Request;
use crate::options::RdmaOptions;
use crate::reception::{Arrival, Reception};
use crate::state::Bell;

/// The acceptor's thread, shared by the acceptor and its links. Ends with the last of them.
#[derive(Debug)]
pub(crate) struct Desk {
    board: Arc<Board<Arrival, Request>>,
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl Desk {
    pub(crate) fn open(
        listener: Id,
        local: SocketAddr,
        options: RdmaOptions,
        spawn: impl FnOnce(Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>,
    ) -> io::Result<Self> {
        let (board, bell) = (Arc::new(Board::default()), Arc::new(Bell::new()?));
        let reception =
            Reception::new(listener, local, Arc::clone(&bell), Arc::clone(&board), options);
        let thread = spawn(Box::new(move || reception.run()))?;
        Ok(Self { board, bell, thread: Some(thread) })
    }

    pub(crate) fn board(&self) -> &Arc<Board<Arrival, Request>> {
        &self.board
    }
}

impl Drop for Desk {
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
