//! How a source reaches a destination: which of a name's addresses answers.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::transport::{Interrupt, MigrationId, TransportError, addresses};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::connection::{Connection, LinkState, until};
use crate::dial::{Attempt, Dialled};
use crate::options::TcpOptions;
use crate::preamble::{Kind, Preamble};
use crate::source::TcpSourceLink;

/// How long an address may be silent before the next one is tried too: the connection attempt
/// delay of RFC 8305.
const STAGGER: Duration = Duration::from_millis(250);

/// Connects to a destination that accepts migrations ([`TcpAcceptor`](crate::TcpAcceptor)).
///
/// Tries the addresses of a name one after another, and the next one too when one is silent for a
/// quarter of a second (RFC 8305, "Happy Eyeballs"); the first that is connected is taken. Each is
/// given at most [`TcpOptions::connect_timeout`]. A refusal is an answer: it is returned as
/// [`TransportError::Refused`]. To be able to end it, use [`TcpConnector`].
pub fn connect(
    addr: impl ToSocketAddrs + fmt::Debug,
    options: TcpOptions,
) -> Result<TcpSourceLink, TransportError> {
    TcpConnector::new(options).connect(addr)
}

/// Connects, and can be told to stop.
///
/// ```
/// use pageferry::transport::{Interrupt, TransportError};
/// use pageferry_tcp::{TcpConnector, TcpOptions};
///
/// let connector = TcpConnector::new(TcpOptions::default());
/// let interrupter = connector.interrupter();
/// // From any thread, while `connect` runs or before.
/// interrupter.interrupt();
/// let result = connector.connect("127.0.0.1:7400");
/// assert!(matches!(result, Err(TransportError::Interrupted)));
/// ```
#[derive(Debug)]
pub struct TcpConnector {
    options: TcpOptions,
    state: Arc<LinkState>,
}

impl TcpConnector {
    /// For one connection.
    pub fn new(options: TcpOptions) -> Self {
        Self { options, state: LinkState::new(|| {}) }
    }

    /// A handle that ends [`connect`](Self::connect), now and later, with
    /// [`TransportError::Interrupted`]; and the link that came of it. A name that is being looked
    /// up is waited for.
    pub fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.state) as Arc<dyn Interrupt>
    }

    /// As [`connect()`].
    pub fn connect(
        self,
        addr: impl ToSocketAddrs + fmt::Debug,
    ) -> Result<TcpSourceLink, TransportError> {
        let Self { options, state } = self;
        let unreachable =
            |cause| TransportError::Connect { address: addresses::text(&addr), cause };
        let found = addresses::resolve(&addr).map_err(unreachable)?;
        let id = MigrationId::random()
            .map_err(|cause| TransportError::Io { operation: "make a migration id", cause })?;
        let preamble = Preamble { id, kind: Kind::Control };
        let mut race = Race {
            options: &options,
            state: &state,
            waiting: found.into(),
            attempts: Vec::new(),
            next_start: Instant::now(),
            last_error: unreachable(io::ErrorKind::NotFound.into()),
        };
        loop {
            let answer = race.winner()?.greet(&preamble, &options).and_then(Dialled::await_answer);
            match answer {
                Ok(control) => {
                    options.check_buffers(control.socket()).map_err(unreachable)?;
                    return Ok(TcpSourceLink::new(id, options, state, control));
                }
                // What listens there is no destination of ours; another address may be.
                Err(error @ TransportError::Connect { .. }) => race.last_error = error,
                Err(error) => return Err(error),
            }
        }
    }
}

/// Attempts to connect to the addresses of one name. Nothing is said on those that lose.
struct Race<'a> {
    options: &'a TcpOptions,
    state: &'a Arc<LinkState>,
    waiting: VecDeque<SocketAddr>,
    attempts: Vec<Attempt>,
    next_start: Instant,
    last_error: TransportError,
}

impl Race<'_> {
    /// Starts the next attempt, if it is time or nothing else is under way; whether there was one.
    fn start_next(&mut self) -> Result<bool, TransportError> {
        if !self.attempts.is_empty() && Instant::now() < self.next_start {
            return Ok(false);
        }
        let Some(peer) = self.waiting.pop_front() else { return Ok(false) };
        match Attempt::begin(peer, self.options, self.state) {
            Ok(attempt) => self.attempts.push(attempt),
            Err(error @ TransportError::Connect { .. }) => self.last_error = error,
            Err(error) => return Err(error),
        }
        self.next_start = Instant::now() + STAGGER;
        Ok(true)
    }

    /// Waits for the first attempt that is connected.
    fn winner(&mut self) -> Result<Attempt, TransportError> {
        loop {
            self.state.check()?;
            if self.start_next()? {
                continue;
            }
            if self.attempts.is_empty() {
                let nobody = TransportError::OutOfOrder("no address is left");
                return Err(std::mem::replace(&mut self.last_error, nobody));
            }
            for index in self.ready()?.into_iter().rev() {
                let attempt = self.attempts.swap_remove(index);
                match attempt.outcome() {
                    Ok(()) => return Ok(attempt),
                    Err(error @ TransportError::Connect { .. }) => self.last_error = error,
                    Err(error) => return Err(error),
                }
            }
        }
    }

    /// Waits until attempts are decided or their time is over, or another is to begin; which.
    fn ready(&self) -> Result<Vec<usize>, TransportError> {
        let deadlines = self.attempts.iter().filter_map(|attempt| attempt.deadline);
        let next_start = (!self.waiting.is_empty()).then_some(self.next_start);
        let timeout = deadlines.chain(next_start).min().map(until);
        let connections: Vec<&Connection> =
            self.attempts.iter().map(|attempt| &*attempt.connection).collect();
        let mut polled: Vec<PollFd<'_>> =
            connections.iter().map(|connection| PollFd::new(*connection, PollFlags::OUT)).collect();
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                return Err(TransportError::Io {
                    operation: "wait for connections",
                    cause: errno.into(),
                });
            }
        }
        let now = Instant::now();
        let is_over = |index: usize| {
            let over = self.attempts[index].deadline.is_some_and(|deadline| now >= deadline);
            over || !polled[index].revents().is_empty()
        };
        Ok((0..polled.len()).filter(|index| is_over(*index)).collect())
    }
}
