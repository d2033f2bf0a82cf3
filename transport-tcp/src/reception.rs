//! The acceptor's thread: owns the listener, reads preambles, and never waits for a stranger.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::transport::addresses::canonical;
use pageferry::transport::reception::{Arrived, Bell};
use pageferry::transport::{WaitingRoom, first_of_the_most};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use socket2::Socket;

use crate::half_open::{Expiry, HalfOpen, Rules, Step};
use crate::incoming::{Incoming, Unwanted};
use crate::newcomer::{Newcomer, TcpBoard};
use crate::options::TcpOptions;
use crate::preamble::Status;
use crate::trust::{Distrusted, Doorkeeper};
use crate::waiting::until;
use crate::wire::Wire;

/// An hour is for ever to a stranger, and a moment that any clock can name.
const LONGEST_PREAMBLE: Duration = Duration::from_secs(60 * 60);

/// Most connections that have not said yet what they are for, or who they are. With more, the oldest goes
/// of those from one address, from the one that has most: a peer of ours says it at once, or within a
/// round trip.
const MAX_HALF_OPEN: usize = 512;
/// Of the descriptors that the process may have, what connections of either of the two kinds may hold at most:
/// a half is left for the host, and for a migration.
const SHARE_OF_DESCRIPTORS: u64 = 4;
/// Most bytes of greetings that are arriving, and as many of those that wait. With more, the oldest goes.
const MAX_GREETINGS_BYTES: usize = 8 << 20;
/// Most sources that have greeted and wait for their place. Each is a connection.
const MAX_WAITING: usize = 64;
/// Most connections taken from the listener before the others get their turn.
const ACCEPTS_AT_ONCE: usize = 16;
/// How often it is looked whether there is room for a source that waits.
const GLANCE: Duration = Duration::from_millis(10);
/// How long the listener rests when the machine has no descriptors or memory for a connection.
const REST: Duration = Duration::from_millis(100);

pub(crate) struct Reception {
    listener: Socket,
    bell: Arc<Bell>,
    board: Arc<TcpBoard>,
    options: TcpOptions,
    doorkeeper: Doorkeeper,
    /// Oldest first.
    half_open: Vec<HalfOpen>,
    most_half_open: usize,
    /// Have greeted.
    waiting: WaitingRoom<Newcomer>,
    rests_until: Option<Instant>,
}

impl Reception {
    pub(crate) fn new(
        listener: Socket,
        bell: Arc<Bell>,
        board: Arc<TcpBoard>,
        options: TcpOptions,
    ) -> Self {
        let share = share_of_descriptors();
        Self {
            listener,
            bell,
            board,
            doorkeeper: Doorkeeper::new(options.security.clone()),
            options,
            half_open: Vec::new(),
            most_half_open: MAX_HALF_OPEN.min(share),
            waiting: WaitingRoom::new(MAX_WAITING.min(share), MAX_GREETINGS_BYTES),
            rests_until: None,
        }
    }

    /// Runs until the board is stopped.
    pub(crate) fn run(mut self) {
        while !self.board.is_stopped() {
            if let Err(errno) = self.turn() {
                tracing::error!("stopped accepting connections: {errno}");
                self.board.stop(Some(errno.into()));
            }
        }
        self.turn_all_away();
    }

    /// Nobody is served any more, and nobody is left without a word.
    fn turn_all_away(self) {
        let warnings = &self.board.warnings;
        let half_open =
            self.half_open.into_iter().filter_map(|it| it.expire(Expiry::Closed, warnings));
        let waiting = self.waiting.empty().chain(self.board.left_over());
        let busy =
            |newcomer: Newcomer| HalfOpen::refuse(Unwanted::busy(newcomer.incoming), warnings);
        for refused in half_open.chain(waiting.map(busy)) {
            // What is unread would reset the connection, and the answer with it.
            refused.discard();
        }
    }

    /// Waits for something to happen, and deals with all that did.
    fn turn(&mut self) -> Result<(), Errno> {
        let now = Instant::now();
        self.rests_until = self.rests_until.filter(|&until| until > now);
        let glance = (!self.waiting.is_empty()).then(|| now + GLANCE);
        let deadlines = self.half_open.iter().map(|half_open| half_open.deadline);
        let deadline = deadlines.chain(self.rests_until).chain(glance).min();

        let listening = if self.rests_until.is_some() { PollFlags::empty() } else { PollFlags::IN };
        let mut polled =
            vec![PollFd::new(&self.bell, PollFlags::IN), PollFd::new(&self.listener, listening)];
        let awaited = |half_open: &'_ HalfOpen| half_open.awaits();
        let wires = self.half_open.iter();
        polled.extend(wires.map(|it| PollFd::new(&it.incoming.wire, awaited(it))));
        match poll(&mut polled, deadline.map(until).as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(()),
            Err(errno) => return Err(errno),
        }
        let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(polled);

        let greeted = self.serve_half_open(&ready[2..]);
        self.serve_waiting(greeted);
        if ready[1] {
            self.accept();
        }
        Ok(())
    }

    /// Goes on with those that are half open; who of them has greeted.
    fn serve_half_open(&mut self, ready: &[bool]) -> Vec<Newcomer> {
        let now = Instant::now();
        let (board, options) = (Arc::clone(&self.board), &self.options);
        let (admission, silence) =
            (options.admission, options.preamble_timeout.min(LONGEST_PREAMBLE));
        let rules = Rules { admission, silence, warnings: &board.warnings };
        let late_after = Expiry::Late(options.preamble_timeout);
        let mut greeted = Vec::new();
        for (half_open, &ready) in std::mem::take(&mut self.half_open).into_iter().zip(ready) {
            let step =
                if ready { half_open.advance(&board, &rules) } else { Step::Stays(half_open) };
            match step {
                Step::Stays(late) if late.deadline <= now => {
                    self.half_open.extend(late.expire(late_after, rules.warnings));
                }
                Step::Stays(half_open) => self.half_open.push(half_open),
                Step::Comes(newcomer) => greeted.push(newcomer),
                Step::Done => {}
            }
        }
        let mut kept: usize = self.half_open.iter().map(HalfOpen::greeting_bytes).sum();
        while kept > MAX_GREETINGS_BYTES
            && let Some(at) = self.half_open.iter().position(|other| other.greeting_bytes() > 0)
        {
            kept -= self.half_open[at].greeting_bytes();
            self.evict(at);
        }
        greeted
    }

    /// Gives the place to the first who waits, if it is to be had.
    fn serve_waiting(&mut self, greeted: Vec<Newcomer>) {
        let (now, board) = (Instant::now(), Arc::clone(&self.board));
        // Who has left keeps nobody out.
        for left in self.waiting.without(Newcomer::has_left) {
            let peer = left.incoming.peer;
            board.warnings.warn(peer, "closed a connection: it left while it waited");
        }
        for newcomer in greeted {
            if board.is_returning(&newcomer) {
                // Its own place.
                if let Some((newcomer, _)) = board.admit(newcomer) {
                    self.turn_away(Unwanted::busy(newcomer.incoming));
                }
                continue;
            }
            let how = newcomer.how();
            for crowded in self.waiting.enter(now, newcomer, how) {
                self.turn_away(Unwanted::crowded(crowded.incoming));
            }
        }
        for later in self.waiting.serve(now, |newcomer| board.admit(newcomer)) {
            self.turn_away(Unwanted::busy(later.incoming));
        }
    }

    fn turn_away(&mut self, unwanted: Unwanted) {
        if self.half_open.len() >= self.most_half_open
            && let Some(at) = self.first_refused()
        {
            self.half_open.remove(at);
        }
        self.half_open.push(HalfOpen::refuse(unwanted, &self.board.warnings));
    }

    /// One more is half open.
    fn enter(&mut self, half_open: HalfOpen) {
        while self.half_open.len() >= self.most_half_open {
            let from = self.half_open.iter().map(|half_open| half_open.incoming.peer);
            let first = self.first_refused().or_else(|| first_of_the_most(from));
            self.close(first.unwrap_or(0));
        }
        self.half_open.push(half_open);
    }

    /// Turns one away that is half open.
    fn evict(&mut self, at: usize) {
        let refused = self.half_open.remove(at).expire(Expiry::Crowded, &self.board.warnings);
        self.half_open.extend(refused);
    }

    /// Closes one that is half open, which is told why. Not as [`Self::evict`], where it keeps its descriptor
    /// until it has had time to read that.
    fn close(&mut self, at: usize) {
        let refused = self.half_open.remove(at).expire(Expiry::Crowded, &self.board.warnings);
        // What is unread would reset the connection, and the answer with it.
        refused.map(HalfOpen::discard);
    }

    /// The first of those that are only being told why they were refused.
    fn first_refused(&self) -> Option<usize> {
        self.half_open.iter().position(HalfOpen::is_refused)
    }

    /// Closes a connection for the sake of another one, for which there is no descriptor: whose claim is the
    /// least, whether it has greeted or not. Whether there was any.
    fn let_go(&mut self) -> bool {
        let half_open = self.half_open.iter().map(|half_open| half_open.incoming.peer);
        let from = half_open.chain(self.waiting.from());
        let Some(at) = self.first_refused().or_else(|| first_of_the_most(from)) else {
            return false;
        };
        match at.checked_sub(self.half_open.len()) {
            None => self.close(at),
            Some(at) => {
                let crowded = self.waiting.remove(at).map(|it| Unwanted::crowded(it.incoming));
                crowded.map(|it| HalfOpen::refuse(it, &self.board.warnings).discard());
            }
        }
        true
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
                        Some(Errno::MFILE | Errno::NFILE) if self.let_go() => {
                            let why = format_args!("made room for a connection: {error}");
                            self.board.warnings.warn("unknown", why);
                            continue;
                        }
                        _ => {
                            let why = format_args!("failed to accept a connection: {error}");
                            self.board.warnings.warn("unknown", why);
                            self.rests_until = Some(Instant::now() + REST);
                        }
                    }
                    return;
                }
            };
            let peer = address.as_socket().map_or((Ipv4Addr::UNSPECIFIED, 0).into(), canonical);
            let prepared = socket
                .set_nonblocking(true)
                .and_then(|()| self.options.apply(&socket))
                .and_then(|()| self.options.apply_to_path(&socket));
            if let Err(error) = prepared {
                let why = format_args!("closed a connection: failed to set it up: {error}");
                self.board.warnings.warn(peer, why);
                continue;
            }
            match self.doorkeeper.wire(socket) {
                Ok(wire) => {
                    let silence = self.options.preamble_timeout.min(LONGEST_PREAMBLE);
                    let incoming = Incoming::new(wire, peer);
                    self.enter(HalfOpen::new(incoming, Instant::now() + silence));
                }
                Err(Distrusted { socket, told, why }) => {
                    self.board.warnings.warn(peer, format_args!("no secure connection: {why}"));
                    let incoming = Incoming::new(Wire::plain(socket), peer);
                    let (status, reason) = (Status::Insecure, told.to_owned());
                    self.turn_away(Unwanted { incoming, status, reason });
                }
            }
        }
    }
}

/// As many connections as may be of one kind.
fn share_of_descriptors() -> usize {
    let most = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(most / SHARE_OF_DESCRIPTORS).unwrap_or(usize::MAX).max(1)
}
