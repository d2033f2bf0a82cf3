//! The acceptor's thread: owns the listener, reads preambles, and never waits for a stranger.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use socket2::Socket;

use crate::board::{Bell, Board, Incoming};
use crate::connection::until;
use crate::half_open::{Expiry, HalfOpen};
use crate::options::TcpOptions;

/// An hour is for ever to a stranger, and a moment that any clock can name.
const LONGEST_PREAMBLE: Duration = Duration::from_secs(60 * 60);

/// Most connections that have not said yet what they are for. With more, the oldest goes: a peer
/// of ours says it at once.
const MAX_HALF_OPEN: usize = 64;
/// Most connections taken from the listener before the others get their turn.
const ACCEPTS_AT_ONCE: usize = 16;
/// How often it is looked whether there is room for a source that waits.
const GLANCE: Duration = Duration::from_millis(10);
/// How long the listener rests when the machine has no descriptors or memory for a connection.
const REST: Duration = Duration::from_millis(100);

pub(crate) struct PollLoop {
    listener: Socket,
    bell: Arc<Bell>,
    board: Arc<Board>,
    options: TcpOptions,
    /// Oldest first.
    half_open: Vec<HalfOpen>,
    rests_until: Option<Instant>,
}

impl PollLoop {
    pub(crate) fn new(
        listener: Socket,
        bell: Arc<Bell>,
        board: Arc<Board>,
        options: TcpOptions,
    ) -> Self {
        Self { listener, bell, board, options, half_open: Vec::new(), rests_until: None }
    }

    /// Runs until the board is stopped.
    pub(crate) fn run(mut self) {
        while !self.board.is_stopped() {
            if let Err(errno) = self.turn() {
                tracing::error!("stopped accepting connections: {errno}");
                self.board.stop(Some(errno));
            }
        }
    }

    /// Waits for something to happen, and deals with all that did.
    fn turn(&mut self) -> Result<(), Errno> {
        let now = Instant::now();
        self.rests_until = self.rests_until.filter(|&until| until > now);
        let glance = self.half_open.iter().any(HalfOpen::is_waiting).then(|| now + GLANCE);
        let deadlines = self.half_open.iter().map(|half_open| half_open.deadline);
        let deadline = deadlines.chain(self.rests_until).chain(glance).min();

        let listening = if self.rests_until.is_some() { PollFlags::empty() } else { PollFlags::IN };
        let mut polled = vec![
            PollFd::new(self.bell.fd(), PollFlags::IN),
            PollFd::new(&self.listener, listening),
        ];
        polled.extend(self.half_open.iter().map(|half_open| {
            let events = if half_open.is_waiting() { PollFlags::empty() } else { PollFlags::IN };
            PollFd::new(&half_open.incoming.socket, events)
        }));
        match poll(&mut polled, deadline.map(until).as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(()),
            Err(errno) => return Err(errno),
        }
        let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(polled);

        self.serve_half_open(&ready[2..]);
        if ready[1] {
            self.accept();
        }
        Ok(())
    }

    fn serve_half_open(&mut self, ready: &[bool]) {
        let now = Instant::now();
        let late_after = Expiry::Late(self.options.preamble_timeout);
        for (half_open, &ready) in std::mem::take(&mut self.half_open).into_iter().zip(ready) {
            let due = ready || half_open.is_waiting();
            let still_open = if due { half_open.advance(&self.board) } else { Some(half_open) };
            match still_open {
                Some(late) if late.deadline <= now => late.expire(late_after),
                Some(half_open) => self.half_open.push(half_open),
                None => {}
            }
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS_AT_ONCE {
            let (socket, address) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) => {
                    match error.raw_os_error().map(Errno::from_raw_os_error) {
                        Some(Errno::AGAIN) => {}
                        // The connection ended before it was taken: nothing to do with the
                        // listener (see accept(2)).
                        Some(Errno::CONNABORTED | Errno::INTR | Errno::PROTO) => continue,
                        _ => {
                            tracing::warn!("failed to accept a connection: {error}");
                            self.rests_until = Some(Instant::now() + REST);
                        }
                    }
                    return;
                }
            };
            let peer = address.as_socket().unwrap_or(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)));
            let prepared = socket
                .set_nonblocking(true)
                .and_then(|()| self.options.apply(&socket))
                .and_then(|()| self.options.apply_to_path(&socket));
            if let Err(error) = prepared {
                tracing::warn!(%peer, "closed a connection: failed to set it up: {error}");
                continue;
            }
            if self.half_open.len() >= MAX_HALF_OPEN {
                // Those that are only being told why they were refused can go first.
                let at = self.half_open.iter().position(HalfOpen::is_refused).unwrap_or(0);
                self.half_open.remove(at).expire(Expiry::Crowded);
            }
            let deadline = Instant::now() + self.options.preamble_timeout.min(LONGEST_PREAMBLE);
            self.half_open.push(HalfOpen::new(Incoming { socket, peer }, deadline));
        }
    }
}
