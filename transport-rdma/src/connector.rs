//! How a source reaches a destination: which of a name's addresses answers.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::transport::{Interrupt, MigrationId, TransportError, addresses};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::cm::{Id, RemoteAccess};
use crate::dial::{Connected, Found, Search, Workshop, check_device};
use crate::options::RdmaOptions;
use crate::preamble::Purpose;
use crate::source::RdmaSourceLink;
use crate::state::LinkState;
use crate::{after, check_libraries};

/// How long an address may be silent before the next one is tried too: the connection attempt delay
/// of RFC 8305.
const STAGGER: Duration = Duration::from_millis(250);

/// Connects to a destination that listens at an RDMA device's address.
///
/// The address tells which device is used, unless one is asked for by [`RdmaOptions::device`];
/// then it must be that one's.
///
/// Tries the addresses of a name one after another, and the next one too when one is silent for a
/// quarter of a second; the first that is connected is taken. Each is given at most
/// [`RdmaOptions::connect_timeout`]. A refusal is an answer: it is returned as
/// [`TransportError::Refused`]. To be able to end it, use [`RdmaConnector`].
pub fn connect(
    address: impl ToSocketAddrs + fmt::Debug,
    options: RdmaOptions,
) -> Result<RdmaSourceLink, TransportError> {
    RdmaConnector::new(options)?.connect(address)
}

/// Connects, and can be told to stop.
#[derive(Debug)]
pub struct RdmaConnector {
    options: RdmaOptions,
    state: Arc<LinkState>,
}

impl RdmaConnector {
    /// For one connection.
    pub fn new(options: RdmaOptions) -> Result<Self, TransportError> {
        let failed = |cause| TransportError::Io { operation: "make an event counter", cause };
        Ok(Self { options, state: LinkState::new(|| {}).map_err(failed)? })
    }

    /// A handle that ends [`connect`](Self::connect), now and later, with
    /// [`TransportError::Interrupted`]; and the link that came of it. A name that is being looked up
    /// is waited for.
    pub fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.state) as Arc<dyn Interrupt>
    }

    /// As [`connect()`].
    pub fn connect(
        self,
        address: impl ToSocketAddrs + fmt::Debug,
    ) -> Result<RdmaSourceLink, TransportError> {
        let text = addresses::text(&address);
        let failed = |cause| TransportError::Connect { address: text.clone(), cause };
        let found = addresses::resolve(&address).map_err(failed)?;
        check_libraries().map_err(|unavailable| failed(unavailable.into()))?;
        check_device(&self.options, &text)?;
        let mut race = Race {
            last_error: failed(io::ErrorKind::NotFound.into()),
            options: self.options,
            state: self.state,
            waiting: found.into(),
            attempts: Vec::new(),
            next_start: Instant::now(),
        };
        RdmaSourceLink::new(race.winner()?)
    }
}

/// An address that is tried.
#[derive(Debug)]
struct Attempt {
    address: SocketAddr,
    deadline: Instant,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Searching(Search),
    /// The destination was asked.
    Asking(Box<Connected>),
}

/// How far an attempt is.
enum Progress {
    NotYet(Attempt),
    Connected(Box<Connected>),
}

impl Attempt {
    fn begin(address: SocketAddr, options: &RdmaOptions) -> Result<Self, TransportError> {
        let deadline = after(options.connect_timeout);
        Ok(Self { address, deadline, stage: Stage::Searching(Search::begin(address, options)?) })
    }

    fn id(&self) -> &Id {
        match &self.stage {
            Stage::Searching(search) => &search.id,
            Stage::Asking(asked) => &asked.outlet.connection.id,
        }
    }

    /// Takes in what has happened.
    fn go_on(
        mut self,
        options: &RdmaOptions,
        state: &Arc<LinkState>,
    ) -> Result<Progress, TransportError> {
        let address = self.address;
        let failed = |cause| TransportError::Connect { address: address.to_string(), cause };
        while let Some(event) = self.id().take_event().map_err(failed)? {
            self.stage = match self.stage {
                Stage::Searching(search) => match search.go_on(event, options)? {
                    Found::NotYet(search) => Stage::Searching(search),
                    Found::Way(id) => Stage::Asking(Box::new(ask(id, address, options, state)?)),
                },
                Stage::Asking(mut asked) => {
                    let Connected { workshop, outlet, .. } = &mut *asked;
                    workshop.take_answer(&mut outlet.connection, RemoteAccess::Nothing, event)?;
                    return Ok(Progress::Connected(asked));
                }
            };
        }
        if Instant::now() >= self.deadline {
            return Err(failed(io::ErrorKind::TimedOut.into()));
        }
        Ok(Progress::NotYet(self))
    }
}

/// Asks for the first connection of a migration, one of this attempt's own: should an address that
/// was silent answer after all, it is another one that comes to nothing.
fn ask(
    id: Id,
    address: SocketAddr,
    options: &RdmaOptions,
    state: &Arc<LinkState>,
) -> Result<Connected, TransportError> {
    let migration = MigrationId::random()
        .map_err(|cause| TransportError::Io { operation: "make a migration id", cause })?;
    let workshop = Workshop::at(&id, address, options.clone(), Arc::clone(state))?;
    let say = workshop.preamble(Purpose::Control, migration);
    let outlet = workshop.ask_for_outlet(id, &say, RemoteAccess::Nothing)?;
    Ok(Connected { workshop, migration, outlet })
}

/// Attempts to connect to the addresses of one name.
struct Race {
    options: RdmaOptions,
    state: Arc<LinkState>,
    waiting: VecDeque<SocketAddr>,
    attempts: Vec<Attempt>,
    next_start: Instant,
    last_error: TransportError,
}

impl Race {
    /// Waits for the first attempt that is connected.
    fn winner(&mut self) -> Result<Connected, TransportError> {
        loop {
            self.state.check()?;
            self.start_next()?;
            for attempt in std::mem::take(&mut self.attempts) {
                let progress = attempt.go_on(&self.options, &self.state);
                match self.note(progress)? {
                    Some(Progress::Connected(connected)) => return Ok(*connected),
                    Some(Progress::NotYet(attempt)) => self.attempts.push(attempt),
                    None => {}
                }
            }
            if !self.attempts.is_empty() {
                self.wait()?;
            } else if self.waiting.is_empty() {
                let nobody = TransportError::OutOfOrder("no address is left");
                return Err(std::mem::replace(&mut self.last_error, nobody));
            }
        }
    }

    /// Starts the next attempt, if it is time or nothing else is under way.
    fn start_next(&mut self) -> Result<(), TransportError> {
        if !self.attempts.is_empty() && Instant::now() < self.next_start {
            return Ok(());
        }
        let Some(address) = self.waiting.pop_front() else { return Ok(()) };
        self.next_start = Instant::now() + STAGGER;
        let begun = Attempt::begin(address, &self.options);
        let begun = self.note(begun)?;
        self.attempts.extend(begun);
        Ok(())
    }

    /// Where one address is of no use another may be.
    fn note<T>(&mut self, result: Result<T, TransportError>) -> Result<Option<T>, TransportError> {
        match result {
            Err(error @ TransportError::Connect { .. }) => {
                self.last_error = error;
                Ok(None)
            }
            result => result.map(Some),
        }
    }

    /// Waits until something happens to attempts or the time of one is over, or another is to begin.
    fn wait(&self) -> Result<(), TransportError> {
        let deadlines = self.attempts.iter().map(|attempt| attempt.deadline);
        let next_start = (!self.waiting.is_empty()).then_some(self.next_start);
        let until = deadlines.chain(next_start).min().unwrap_or(self.next_start);
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
        let ids = self.attempts.iter().map(|attempt| attempt.id().fd());
        let mut fds: Vec<_> = ids
            .chain([self.state.bell()])
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        match poll(&mut fds, Some(&left)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => {
                Err(TransportError::Io { operation: "wait for connections", cause: errno.into() })
            }
        }
    }
}
