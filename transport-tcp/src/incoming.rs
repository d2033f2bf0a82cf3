//! What the acceptor's thread and the links tell each other: which migration is being served,
//! and which of its connections wait for their link.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use pageferry::transport::{
    Greeted, Holder, MigrationId, Place, Standing, TransportError, Warnings,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use socket2::Socket;

use crate::MAX_CHANNELS;
use crate::connection::{Connection, LinkState, deadline_after, lock};
use crate::framing::refusal;
use crate::preamble::{Answer, Status};

/// A connection from outside.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) socket: Socket,
    pub(crate) peer: SocketAddr,
    /// Whether its preamble was answered.
    answered: bool,
}

impl Incoming {
    pub(crate) fn new(socket: Socket, peer: SocketAddr) -> Self {
        Self { socket, peer, answered: false }
    }

    /// Takes some of what has come, without waiting.
    pub(crate) fn receive(&self, into: &mut [u8]) -> Result<usize, Errno> {
        let flags = RecvFlags::DONTWAIT;
        rustix::io::retry_on_intr(|| rustix::net::recv(&self.socket, &mut *into, flags))
            .map(|(_, received)| received)
    }

    /// Whether its other side has hung up, as far as is known.
    fn has_left(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let mut byte = [0];
        let peeked =
            rustix::io::retry_on_intr(|| rustix::net::recv(&self.socket, &mut byte, flags));
        !matches!(peeked, Ok((_, 1..)) | Err(Errno::AGAIN))
    }

    /// Whether its other side has shut its half, whatever of that is unread.
    fn has_hung_up(&self) -> bool {
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut polled = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let looked = rustix::io::retry_on_intr(|| poll(&mut polled, Some(&Timespec::default())));
        looked.is_ok() && polled[0].revents().intersects(gone)
    }

    /// Answers a good preamble.
    pub(crate) fn let_in(&mut self) -> io::Result<()> {
        self.say(&Answer { status: Status::Ok, reason: String::new() }.encode())?;
        self.answered = true;
        Ok(())
    }

    /// Says why it is turned away.
    pub(crate) fn refuse(&self, status: Status, reason: &str) -> io::Result<()> {
        let answer = Answer { status, reason: reason.to_owned() };
        if self.answered { self.say(&refusal(&answer)) } else { self.say(&answer.encode()) }
    }

    /// The few bytes always fit in the buffer of a fresh socket, so this never waits.
    fn say(&self, bytes: &[u8]) -> io::Result<()> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = rustix::io::retry_on_intr(|| rustix::net::send(&self.socket, bytes, flags))?;
        if sent < bytes.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }
}

/// A source, before it has its place.
#[derive(Debug)]
pub(crate) struct Newcomer {
    pub(crate) id: MigrationId,
    pub(crate) incoming: Incoming,
    /// Its first control frame, where one had to come.
    greeting: Option<Vec<u8>>,
    round_trip: Duration,
    standing: Standing,
}

impl Newcomer {
    /// It has greeted, so long after it was let in.
    pub(crate) fn greeted(
        id: MigrationId,
        incoming: Incoming,
        greeting: Vec<u8>,
        round_trip: Duration,
    ) -> Self {
        let (greeting, standing) = (Some(greeting), Standing::greeted(round_trip));
        Self { id, incoming, greeting, round_trip, standing }
    }

    /// It needs no greeting; its preamble is answered when it has its place.
    pub(crate) fn stranger(id: MigrationId, incoming: Incoming) -> Self {
        let (round_trip, standing) = (Duration::ZERO, Standing::firm());
        Self { id, incoming, greeting: None, round_trip, standing }
    }

    /// Whether it waits for nothing any more.
    pub(crate) fn has_left(&self) -> bool {
        // A source that has greeted keeps its half open; what others say, and how, is their own matter.
        if self.greeting.is_some() { self.incoming.has_hung_up() } else { self.incoming.has_left() }
    }

    /// How it has greeted.
    pub(crate) fn how(&self) -> Greeted {
        let bytes = self.greeting.as_ref().map_or(0, Vec::len);
        Greeted { from: self.incoming.peer, bytes, round_trip: self.round_trip }
    }

    /// It has its place.
    fn take_place(&mut self) -> io::Result<()> {
        self.incoming.socket.set_nonblocking(false)?;
        if self.incoming.answered { Ok(()) } else { self.incoming.let_in() }
    }
}

/// A connection that was not taken, for somebody to turn away.
#[derive(Debug)]
pub(crate) struct Unwanted {
    pub(crate) incoming: Incoming,
    pub(crate) status: Status,
    pub(crate) reason: String,
}

impl Unwanted {
    /// It said what no peer says, or not enough.
    pub(crate) fn malformed(incoming: Incoming, reason: String) -> Self {
        Self { incoming, status: Status::Malformed, reason }
    }

    /// There is no room for more that wait.
    pub(crate) fn crowded(incoming: Incoming) -> Self {
        let reason = "another migration is being served, and too many wait".to_owned();
        Self { incoming, status: Status::Busy, reason }
    }

    /// Another one keeps its place.
    pub(crate) fn busy(incoming: Incoming) -> Self {
        let reason = "another migration is being served".to_owned();
        Self { incoming, status: Status::Busy, reason }
    }
}

/// A source that somebody has accepted.
pub(crate) struct Accepted {
    pub(crate) id: MigrationId,
    pub(crate) control: Arc<Connection>,
    /// Its first control frame, if that has come.
    pub(crate) greeting: Option<Vec<u8>>,
}

#[derive(Debug, Default)]
pub(crate) struct Board {
    state: Mutex<State>,
    changed: Condvar,
    /// Of strangers.
    pub(crate) warnings: Warnings,
}

#[derive(Debug, Default)]
struct State {
    current: Option<Migration>,
    /// It has greeted, while the current one did not answer, which therefore has to go.
    next: Option<Migration>,
    accept_interrupted: bool,
    stopped: Option<Stopped>,
}

#[derive(Debug)]
struct Stopped {
    cause: Option<Errno>,
}

/// The one migration that is being served, from its control connection to the end of its link.
#[derive(Debug)]
struct Migration {
    id: MigrationId,
    /// Until somebody accepts it.
    newcomer: Option<Newcomer>,
    /// From then on.
    link: Weak<LinkState>,
    /// How many data channels there will be; [`MAX_CHANNELS`] until it is known.
    channels: u16,
    data: BTreeMap<u16, DataChannel>,
}

#[derive(Debug)]
enum DataChannel {
    Waiting(Incoming),
    Taken,
}

impl Migration {
    fn new(newcomer: Newcomer) -> Self {
        let (id, link) = (newcomer.id, Weak::new());
        let newcomer = Some(newcomer);
        Self { id, newcomer, link, channels: MAX_CHANNELS, data: BTreeMap::new() }
    }

    /// Whether nobody accepted it yet, and nobody will: its source is gone.
    fn was_given_up(&self) -> bool {
        self.newcomer.as_ref().is_some_and(Newcomer::has_left)
    }

    fn place(&self) -> Place {
        match &self.newcomer {
            Some(newcomer) => newcomer.standing.place(Instant::now()),
            // Without a link it has just ended.
            None => self.link.upgrade().map_or(Place::Open, |link| link.place()),
        }
    }

    fn has_all_channels(&self) -> bool {
        (0..self.channels)
            .all(|channel| matches!(self.data.get(&channel), Some(DataChannel::Waiting(_))))
    }

    fn take_channels(&mut self) -> Vec<Incoming> {
        let take = |slot: &mut DataChannel| match std::mem::replace(slot, DataChannel::Taken) {
            DataChannel::Waiting(incoming) => Some(incoming),
            DataChannel::Taken => None,
        };
        self.data.values_mut().filter_map(take).collect()
    }
}

impl Board {
    /// Takes a data connection of the current migration, or gives it back.
    pub(crate) fn join(
        &self,
        mut incoming: Incoming,
        id: MigrationId,
        channel: u16,
    ) -> Result<(), Unwanted> {
        let mut state = lock(&self.state);
        let refused = match &state.current {
            Some(current) if current.id == id => {
                if channel >= current.channels {
                    let reason =
                        format!("data channel {channel} of only {} channels", current.channels);
                    Some((Status::ChannelOutOfRange, reason))
                } else if current.data.contains_key(&channel) {
                    let reason = format!("data channel {channel} is connected already");
                    Some((Status::ChannelTaken, reason))
                } else {
                    None
                }
            }
            _ => {
                let reason = "no migration with this id is being served".to_owned();
                Some((Status::UnknownMigration, reason))
            }
        };
        if let Some((status, reason)) = refused {
            return Err(Unwanted { incoming, status, reason });
        }
        let peer = incoming.peer;
        let welcomed = incoming.socket.set_nonblocking(false).and_then(|()| incoming.let_in());
        if let Err(error) = welcomed {
            self.warnings.warn(peer, format_args!("closed a data connection: {error}"));
            return Ok(());
        }
        tracing::debug!(%peer, migration = %id, channel, "connected");
        if let Some(current) = &mut state.current {
            current.data.insert(channel, DataChannel::Waiting(incoming));
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Gives a source its place; or gives the source back, if somebody has that.
    pub(crate) fn admit(&self, mut newcomer: Newcomer) -> Option<(Newcomer, Holder)> {
        let mut state = lock(&self.state);
        let current = state.current.as_ref().filter(|current| !current.was_given_up());
        let displaced = match current {
            None => None,
            Some(Migration { id, .. }) if state.next.is_some() => {
                let (id, place) = (*id, Place::Open);
                return Some((newcomer, Holder { id, place }));
            }
            Some(current) => match current.place() {
                Place::Forfeited => Some(current.link.upgrade()),
                place => return Some((newcomer, Holder { id: current.id, place })),
            },
        };
        let (id, peer) = (newcomer.id, newcomer.incoming.peer);
        if let Err(error) = newcomer.take_place() {
            self.warnings.warn(peer, format_args!("closed a connection: {error}"));
            return None;
        }
        tracing::debug!(%peer, migration = %id, "has its place");
        let newcomer = Some(Migration::new(newcomer));
        let Some(link) = displaced else {
            state.current = newcomer;
            self.changed.notify_all();
            return None;
        };
        state.next = newcomer;
        drop(state);
        if let Some(link) = link {
            self.warnings.warn(peer, "displaces a source that does not answer its welcome");
            link.displace();
        }
        None
    }

    /// Waits for a control connection, and gives it to `link`, which is new. From then on whoever
    /// displaces it interrupts the link.
    pub(crate) fn next_migration(
        &self,
        timeout: Option<Duration>,
        link: &Arc<LinkState>,
    ) -> Result<Accepted, TransportError> {
        let deadline = deadline_after(timeout);
        let mut state = lock(&self.state);
        loop {
            if state.accept_interrupted {
                return Err(TransportError::Interrupted);
            }
            state.check_running()?;
            if state.current.as_ref().is_some_and(Migration::was_given_up) {
                state.current = None;
            }
            if let Some(current) = &mut state.current
                && let Some(newcomer) = current.newcomer.take()
            {
                let Newcomer {
                    incoming: Incoming { socket, peer, .. }, greeting, standing, ..
                } = newcomer;
                // With the lock held nobody displaces it yet. An interrupt that came first would be
                // this call's error, and not the link's.
                link.take_place(standing);
                let control = link.adopt(socket, peer)?;
                current.link = Arc::downgrade(link);
                return Ok(Accepted { id: current.id, control, greeting });
            }
            state = self.wait(state, deadline).ok_or(TransportError::TimedOut {
                operation: "accept a migration",
                after: timeout.unwrap_or_default(),
            })?;
        }
    }

    /// Waits for data channels 0 to `channels` of the current migration.
    pub(crate) fn collect_channels(
        &self,
        channels: u16,
        timeout: Duration,
        link: &LinkState,
    ) -> Result<Vec<Incoming>, TransportError> {
        let deadline = deadline_after(Some(timeout));
        let mut state = lock(&self.state);
        loop {
            link.check()?;
            state.check_running()?;
            let Some(current) = &mut state.current else {
                return Err(TransportError::OutOfOrder("data channels of no migration"));
            };
            current.channels = channels;
            for (channel, _) in current.data.split_off(&channels) {
                tracing::warn!("closed data channel {channel}: there are only {channels}");
            }
            if current.has_all_channels() {
                return Ok(current.take_channels());
            }
            state = self.wait(state, deadline).ok_or(TransportError::TimedOut {
                operation: "accept data channels",
                after: timeout,
            })?;
        }
    }

    /// Waits for a change; `None` when the time is over.
    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        deadline: Option<Instant>,
    ) -> Option<MutexGuard<'a, State>> {
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
    pub(crate) fn end_migration(&self) {
        let mut state = lock(&self.state);
        state.current = state.next.take();
        self.changed.notify_all();
    }

    /// Ends the wait of [`Board::next_migration`], now and later.
    pub(crate) fn interrupt_accept(&self) {
        lock(&self.state).accept_interrupted = true;
        self.changed.notify_all();
    }

    /// Makes everyone who waits look again.
    pub(crate) fn wake_all(&self) {
        // With the lock held nobody is between looking and waiting.
        let _state = lock(&self.state);
        self.changed.notify_all();
    }

    /// The acceptor's thread ends; with a cause if it did not mean to.
    pub(crate) fn stop(&self, cause: Option<Errno>) {
        lock(&self.state).stopped = Some(Stopped { cause });
        self.changed.notify_all();
    }

    /// Once it is stopped: sources that nobody has accepted.
    pub(crate) fn left_over(&self) -> Vec<Newcomer> {
        let mut state = lock(&self.state);
        let State { current, next, .. } = &mut *state;
        [current, next].into_iter().flatten().filter_map(|waits| waits.newcomer.take()).collect()
    }

    /// Whether the acceptor's thread was asked to end.
    pub(crate) fn is_stopped(&self) -> bool {
        lock(&self.state).stopped.is_some()
    }
}

impl State {
    fn check_running(&self) -> Result<(), TransportError> {
        match self.stopped {
            None => Ok(()),
            Some(Stopped { cause }) => {
                let cause = cause.map_or(io::ErrorKind::NotConnected.into(), io::Error::from);
                Err(TransportError::Io { operation: "accept connections", cause })
            }
        }
    }
}

/// An event counter that wakes a thread out of `poll`.
#[derive(Debug)]
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Can only fail if it has been rung 2^64 times, and then it rings anyway.
    pub(crate) fn ring(&self) {
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.0
    }
}
