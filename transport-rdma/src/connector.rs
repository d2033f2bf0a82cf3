//! How a source reaches a destination: which of a name's addresses answers.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Instant;

use pageferry::transport::race::{Attempt, Progress, Race};
use pageferry::transport::ways::{Way, resolve_any};
use pageferry::transport::{Interrupt, LinkId, TransportError, addresses};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::cm::{Id, RemoteAccess};
use crate::dial::{Connected, Found, Search, Workshop, check_device};
use crate::options::RdmaOptions;
use crate::preamble::Purpose;
use crate::source::RdmaSourceLink;
use crate::state::LinkState;
use crate::trust::{Trust, check_path};
use crate::{after, check_libraries};

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
        let found = addresses::resolve(&address);
        self.connect_to(&text, found.map(|found| vec![found]))
    }

    /// As [`connect()`], to a destination that has several addresses, of several devices or ports, say: the control
    /// connections go to the first that answers, and data channels are dealt out over all of them. One that cannot be
    /// looked up or reached is done without. The destination has to listen at all of them: at the unspecified address,
    /// `0.0.0.0`.
    ///
    /// By certificates the destination's name is that of the first, unless [`Tls::peer_name`](crate::Tls::peer_name) says.
    pub fn connect_by_any(self, addresses: &[String]) -> Result<RdmaSourceLink, TransportError> {
        let found = resolve_any(addresses);
        self.connect_to(&addresses.join(","), found)
    }

    /// Each of `found` is what one way to the destination may go to.
    fn connect_to(
        self,
        text: &str,
        found: io::Result<Vec<Vec<SocketAddr>>>,
    ) -> Result<RdmaSourceLink, TransportError> {
        let failed = |cause| TransportError::Connect { address: text.to_owned(), cause };
        let found = found.map_err(failed)?;
        check_libraries().map_err(|unavailable| failed(unavailable.into()))?;
        check_device(&self.options, text)?;
        let trust = Trust::new(&self.options, text.split(',').next().unwrap_or(text))?;
        let sources = &self.options.source_addresses;
        let last = sources.len().saturating_sub(1);
        let mut turn = 0;
        let connected = loop {
            let mut race = Race::new(found.concat(), failed(io::ErrorKind::NotFound.into()));
            let connected = race.winner(
                |address| self.begin(&trust, self.options.way(address, turn)),
                |attempts, until| self.wait(attempts, until),
            );
            // Nothing is left of those that lost while this one goes on.
            drop(race);
            match connected {
                Err(error @ TransportError::Connect { .. }) if turn < last => {
                    let why = pageferry::Chain::of(&error).to_string();
                    tracing::warn!(from = %sources[turn], "the control connections come from elsewhere: {why}");
                    turn += 1;
                }
                connected => break connected?,
            }
        };
        let own = self.options.way(connected.workshop.peer, turn);
        let ways = own.and_others(&found, sources).split_off(1);
        RdmaSourceLink::new(*connected, ways)
    }

    fn begin<'a>(&'a self, trust: &'a Trust, way: Way) -> Result<Dialling<'a>, TransportError> {
        self.state.check()?;
        let deadline = after(self.options.connect_timeout);
        let stage = Stage::Searching(Search::begin(way, &self.options)?);
        Ok(Dialling { by: self, trust, way, deadline, stage })
    }

    /// Sleeps until something happens to one of them.
    fn wait(
        &self,
        attempts: &[Dialling<'_>],
        until: Option<Instant>,
    ) -> Result<(), TransportError> {
        let left = until.map(|until| {
            let left = until.saturating_duration_since(Instant::now());
            Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 })
        });
        let ids = attempts.iter().map(|attempt| attempt.id().fd());
        let mut fds: Vec<_> = ids
            .chain([self.state.bell()])
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => self.state.check(),
            Err(errno) => {
                Err(TransportError::Io { operation: "wait for connections", cause: errno.into() })
            }
        }
    }
}

/// An address that is tried.
#[derive(Debug)]
struct Dialling<'a> {
    by: &'a RdmaConnector,
    trust: &'a Trust,
    way: Way,
    deadline: Instant,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Searching(Search),
    /// The destination was asked.
    Asking(Box<Connected>),
}

impl Dialling<'_> {
    fn id(&self) -> &Id {
        match &self.stage {
            Stage::Searching(search) => &search.id,
            Stage::Asking(asked) => &asked.outlet.connection.id,
        }
    }
}

impl Attempt for Dialling<'_> {
    type Connected = Box<Connected>;

    fn deadline(&self) -> Option<Instant> {
        Some(self.deadline)
    }

    fn go_on(mut self) -> Result<Progress<Self>, TransportError> {
        let (way, RdmaConnector { options, state }) = (self.way, self.by);
        let failed = |cause| TransportError::Connect { address: way.to.to_string(), cause };
        while let Some(event) = self.id().take_event().map_err(failed)? {
            self.stage = match self.stage {
                Stage::Searching(search) => match search.go_on(event, options)? {
                    Found::NotYet(search) => Stage::Searching(search),
                    Found::Way(id) => {
                        let asked = ask(id, way, self.trust, options, state)?;
                        Stage::Asking(Box::new(asked))
                    }
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
    way: Way,
    trust: &Trust,
    options: &RdmaOptions,
    state: &Arc<LinkState>,
) -> Result<Connected, TransportError> {
    check_path(options, &id).map_err(|reason| {
        let (address, reason) = (way.to.to_string(), reason.to_owned());
        TransportError::Security { address, reason }
    })?;
    let migration = LinkId::random()
        .map_err(|cause| TransportError::Io { operation: "make an id for a link", cause })?;
    let seal = trust.seal(way.to)?;
    let workshop = Workshop::at(&id, way, options.clone(), Arc::clone(state))?;
    let say = workshop.preamble(Purpose::Control, migration);
    let outlet = workshop.ask_for_outlet(id, &say, RemoteAccess::Nothing)?;
    Ok(Connected { workshop, migration, outlet, seal })
}
