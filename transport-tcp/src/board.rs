//! What the acceptor's thread and the links tell each other: which migration is being served,
//! and which of its connections wait for their link.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use pageferry::transport::{Interrupt, MigrationId, TransportError};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use socket2::Socket;

use crate::MAX_CHANNELS;
use crate::connection::{Connection, LinkState, deadline_after, lock};
use crate::preamble::{Answer, Kind, Preamble, Status};

/// A connection from outside.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) socket: Socket,
    pub(crate) peer: SocketAddr,
}

impl Incoming {
    /// Answers the preamble. The few bytes always fit in the buffer of a fresh socket, so this
    /// never waits.
    pub(crate) fn answer(&self, status: Status, reason: &str) -> io::Result<()> {
        let bytes = Answer { status, reason: reason.to_owned() }.encode();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = rustix::io::retry_on_intr(|| rustix::net::send(&self.socket, &bytes, flags))?;
        if sent < bytes.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }

    /// What the other side has said since its preamble, as far as is known; an error if it is gone.
    pub(crate) fn speech(&self) -> Result<Speech, Errno> {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let mut byte = [0];
        let peeked =
            rustix::io::retry_on_intr(|| rustix::net::recv(&self.socket, &mut byte, flags));
        match peeked {
            Ok((_, 0)) => Err(Errno::CONNRESET),
            Ok(_) => Ok(Speech::Something),
            Err(Errno::AGAIN) => Ok(Speech::Nothing),
            Err(errno) => Err(errno),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Speech {
    Nothing,
    Something,
}

/// What became of a connection whose preamble is good.
#[derive(Debug)]
pub(crate) enum Admitted {
    /// It is on the board, or closed.
    Done,
    /// It is a control connection of a source that has yet to say something: another one is being
    /// served that says nothing either, and whichever speaks first is the source.
    Speechless(MigrationId, Incoming),
}

/// A connection that was not taken, for somebody to turn away.
#[derive(Debug)]
pub(crate) struct Unwanted {
    pub(crate) incoming: Incoming,
    pub(crate) status: Status,
    pub(crate) reason: String,
}

#[derive(Debug, Default)]
pub(crate) struct Board {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    current: Option<Migration>,
    /// It has spoken while the current one did not, which therefore has to go.
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
    control: Option<Incoming>,
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
    fn new(id: MigrationId, control: Incoming) -> Self {
        let (control, link) = (Some(control), Weak::new());
        Self { id, control, link, channels: MAX_CHANNELS, data: BTreeMap::new() }
    }

    /// Whether nobody accepted it yet, and nobody will: its source is gone.
    fn was_given_up(&self) -> bool {
        self.control.as_ref().is_some_and(|control| control.speech().is_err())
    }

    /// Whether its source has greeted, and goes on. Strangers who speak a preamble do not.
    fn keeps_place(&self) -> bool {
        match &self.control {
            Some(control) => control.speech() == Ok(Speech::Something),
            None => self.link.upgrade().is_none_or(|link| link.keeps_place()),
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
    /// Takes a connection whose preamble is complete, or gives it back. Answers it only if it is
    /// taken.
    pub(crate) fn admit(
        &self,
        incoming: Incoming,
        preamble: &Preamble,
    ) -> Result<Admitted, Unwanted> {
        let mut state = lock(&self.state);
        let refusal = match (preamble.kind, &state.current) {
            (Kind::Control, Some(current))
                if !current.was_given_up() && (current.keeps_place() || state.next.is_some()) =>
            {
                Some((Status::Busy, "another migration is being served".to_owned()))
            }
            (Kind::Control, _) => None,
            (Kind::Data { channel }, Some(current)) if current.id == preamble.id => {
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
            (Kind::Data { .. }, _) => {
                let reason = "no migration with this id is being served".to_owned();
                Some((Status::UnknownMigration, reason))
            }
        };
        if let Some((status, reason)) = refusal {
            return Err(Unwanted { incoming, status, reason });
        }
        let peer = incoming.peer;
        let welcomed =
            incoming.socket.set_nonblocking(false).and_then(|()| incoming.answer(Status::Ok, ""));
        if let Err(error) = welcomed {
            tracing::warn!(%peer, "closed a connection: failed to answer it: {error}");
            return Ok(Admitted::Done);
        }
        tracing::debug!(%peer, migration = %preamble.id, kind = ?preamble.kind, "connected");
        match (preamble.kind, &mut state.current) {
            (Kind::Data { channel }, Some(current)) => {
                current.data.insert(channel, DataChannel::Waiting(incoming));
            }
            (_, Some(current)) if !current.was_given_up() => {
                return Ok(Admitted::Speechless(preamble.id, incoming));
            }
            (_, current) => *current = Some(Migration::new(preamble.id, incoming)),
        }
        self.changed.notify_all();
        Ok(Admitted::Done)
    }

    /// A source that was speechless has spoken: it takes the place of one that has not.
    pub(crate) fn speaks(&self, id: MigrationId, incoming: Incoming) {
        let peer = incoming.peer;
        let mut state = lock(&self.state);
        let displaced = match &state.current {
            Some(current) if !current.was_given_up() => {
                if current.keeps_place() || state.next.is_some() {
                    // It was let in, so there are no words for this.
                    tracing::warn!(%peer, "closed a connection: another migration is being served");
                    return;
                }
                tracing::warn!(migration = %current.id, "given up: it says nothing, and another source does");
                current.control.is_none().then(|| current.link.upgrade())
            }
            _ => None,
        };
        let newcomer = Some(Migration::new(id, incoming));
        if let Some(link) = displaced {
            state.next = newcomer;
            drop(state);
            if let Some(link) = link {
                link.interrupt();
            }
        } else {
            state.current = newcomer;
            self.changed.notify_all();
        }
    }

    /// Waits for a control connection, and gives it to `link`, which is new. From then on whoever
    /// displaces it interrupts the link.
    pub(crate) fn next_migration(
        &self,
        timeout: Option<Duration>,
        link: &Arc<LinkState>,
    ) -> Result<(MigrationId, Arc<Connection>), TransportError> {
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
                && let Some(Incoming { socket, peer }) = current.control.take()
            {
                // With the lock held nobody displaces it yet. An interrupt that came first would be
                // this call's error, and not the link's.
                let control = link.adopt(socket, peer)?;
                current.link = Arc::downgrade(link);
                return Ok((current.id, control));
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
