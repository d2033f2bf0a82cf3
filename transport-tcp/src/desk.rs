//! What the acceptor and the links that came from it share.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use socket2::Socket;

use crate::board::{Bell, Board};
use crate::options::TcpOptions;
use crate::poll_loop::PollLoop;

/// The acceptor's thread, shared by the acceptor and its links. Ends with the last of them.
#[derive(Debug)]
pub(crate) struct Desk {
    board: Arc<Board>,
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl Desk {
    pub(crate) fn open(
        listener: Socket,
        options: TcpOptions,
        spawn: impl FnOnce(Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>,
    ) -> io::Result<Self> {
        let board = Arc::new(Board::default());
        let bell = Arc::new(Bell::new()?);
        let poll_loop = PollLoop::new(listener, Arc::clone(&bell), Arc::clone(&board), options);
        let thread = spawn(Box::new(move || poll_loop.run()))?;
        Ok(Self { board, bell, thread: Some(thread) })
    }

    pub(crate) fn board(&self) -> &Arc<Board> {
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
