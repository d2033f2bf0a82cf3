//! The acceptor's thread: owns the listener, hears what requests are for, makes control connections,
//! and never waits for a stranger.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::transport::{MigrationId, TransportError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::board::{Arrived, Board, Place, Voice};
use crate::cm::{Event, Id, RemoteAccess};
use crate::dial::{Request, Workshop};
use crate::options::RdmaOptions;
use crate::pipe::{Inlet, Outlet};
use crate::preamble::{Preamble, Purpose};
use crate::state::{Bell, LinkState};

/// Most sources whose control connections are not there yet. With more, the oldest goes: a source of
/// ours makes them at once.
const MAX_HALF_OPEN: usize = 16;
/// Most requests taken from the listener before the others get their turn.
const REQUESTS_AT_ONCE: usize = 64;
/// How long a source waits for one that is being served, before it is told to come later.
const TURN: Duration = Duration::from_secs(1);
/// How often it is looked whether there is room for a source that waits.
const GLANCE: Duration = Duration::from_millis(10);
/// How long the listener rests when the machine has no descriptors or memory for a connection.
const REST: Duration = Duration::from_millis(100);

/// A source, and its control connections as far as they are there.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) migration: MigrationId,
    pub(crate) inlet: Inlet,
    pub(crate) outlet: Option<Outlet>,
    deadline: Instant,
    /// After the queues.
    pub(crate) workshop: Workshop,
}

impl Arrival {
    /// Accepts the first connection of a migration.
    fn begin(
        request: Request,
        local: SocketAddr,
        options: &RdmaOptions,
        board: &Arc<Board<Self, Request>>,
    ) -> Result<Self, TransportError> {
        let peer = request.id.peer().unwrap_or(local);
        let failed = |cause| TransportError::Connect { address: peer.to_string(), cause };
        let weak = Arc::downgrade(board);
        let wake = move || {
            if let Some(board) = weak.upgrade() {
                board.wake_all();
            }
        };
        let state = LinkState::new(wake).map_err(failed)?;
        let migration = request.preamble.migration;
        let workshop = Workshop::at(&request.id, peer, options.clone(), state)?;
        workshop.watch(&request.id)?;
        let inlet = workshop.begin_inlet(request, RemoteAccess::Nothing)?;
        let deadline = crate::after(options.connect_timeout);
        Ok(Self { migration, inlet, outlet: None, deadline, workshop })
    }

    /// Accepts the other one.
    fn complete(&mut self, request: Request) -> Result<(), TransportError> {
        self.outlet = Some(self.workshop.begin_outlet(request)?);
        Ok(())
    }

    fn ids(&self) -> impl Iterator<Item = &Id> {
        let back = self.outlet.iter().map(|outlet| &*outlet.connection.id);
        std::iter::once(&*self.inlet.connection.id).chain(back)
    }

    /// Takes in what has happened to its connections; true once they are there.
    fn advance(&mut self) -> Result<bool, &'static str> {
        if self.has_left() {
            return Err("the source has left");
        }
        if self.deadline <= Instant::now() {
            return Err("its connections were not there in time");
        }
        let back = self.outlet.as_ref().is_some_and(|outlet| outlet.connection.is_established());
        Ok(back && self.inlet.connection.is_established())
    }
}

impl Arrived for Arrival {
    fn migration(&self) -> MigrationId {
        self.migration
    }

    fn has_left(&mut self) -> bool {
        let back = self.outlet.as_mut().is_some_and(|outlet| outlet.connection.has_left());
        self.inlet.connection.has_left() || back
    }

    fn listen(&mut self) {
        // What fails now fails for who uses it, too.
        let _ = self.inlet.listen();
    }

    fn voice(&self) -> Arc<dyn Voice> {
        Arc::clone(&self.workshop.state) as Arc<dyn Voice>
    }
}

/// A source that came while another one is served.
struct Waiting {
    request: Request,
    /// When it is told so.
    until: Instant,
}

pub(crate) struct Reception {
    listener: Id,
    local: SocketAddr,
    bell: Arc<Bell>,
    board: Arc<Board<Arrival, Request>>,
    options: RdmaOptions,
    /// Oldest first.
    half_open: Vec<Arrival>,
    waiting: Vec<Waiting>,
    rests_until: Option<Instant>,
}

impl Reception {
    pub(crate) fn new(
        listener: Id,
        local: SocketAddr,
        bell: Arc<Bell>,
        board: Arc<Board<Arrival, Request>>,
        options: RdmaOptions,
    ) -> Self {
        let (half_open, waiting) = (Vec::new(), Vec::new());
        Self { listener, local, bell, board, options, half_open, waiting, rests_until: None }
    }

    /// Runs until the board is stopped.
    pub(crate) fn run(mut self) {
        while !self.board.is_stopped() {
            if let Err(error) = self.turn() {
                tracing::error!("stopped accepting connections: {error}");
                self.board.stop(Some(error.kind()));
            }
        }
    }

    /// Waits for something to happen, and deals with all that did.
    fn turn(&mut self) -> io::Result<()> {
        let now = Instant::now();
        self.rests_until = self.rests_until.filter(|&until| until > now);
        // Whether another source has spoken, or is gone, nobody tells.
        let complete = self.half_open.iter().any(|arrival| arrival.outlet.is_some());
        let glance = (complete || !self.waiting.is_empty()).then(|| now + GLANCE);
        let deadlines = self.half_open.iter().map(|arrival| arrival.deadline);
        let deadline = deadlines.chain(self.rests_until).chain(glance).min();
        let timeout = deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(now);
            Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 })
        });
        let listening = if self.rests_until.is_some() { PollFlags::empty() } else { PollFlags::IN };
        let mut polled = vec![
            PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.listener.fd(), listening),
        ];
        let ids = self.half_open.iter().flat_map(Arrival::ids);
        polled.extend(ids.map(|id| PollFd::from_borrowed_fd(id.fd(), PollFlags::IN)));
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let listening = !polled[1].revents().is_empty();
        drop(polled);
        self.advance();
        for Waiting { request, until } in std::mem::take(&mut self.waiting) {
            self.answer(request, until);
        }
        if listening { self.take_in() } else { Ok(()) }
    }

    /// Goes on with those that are not there yet.
    fn advance(&mut self) {
        for mut arrival in std::mem::take(&mut self.half_open) {
            let peer = arrival.workshop.peer;
            match arrival.advance() {
                Ok(false) => self.half_open.push(arrival),
                Ok(true) => self.half_open.extend(self.board.arrive(arrival).err()),
                Err(why) => tracing::warn!(%peer, "closed a connection: {why}"),
            }
        }
    }

    /// Takes requests from the listener.
    fn take_in(&mut self) -> io::Result<()> {
        for _ in 0..REQUESTS_AT_ONCE {
            match self.listener.take_event() {
                Ok(Some(Event::Requested { id, said })) => self.hear(id, &said),
                Ok(Some(Event::DeviceRemoved)) => {
                    let gone = "the RDMA device was removed";
                    return Err(io::Error::new(io::ErrorKind::NotFound, gone));
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!("failed to accept a connection: {error}");
                    self.rests_until = Some(Instant::now() + REST);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Hears what a request is for.
    fn hear(&mut self, id: Id, said: &[u8]) {
        match Preamble::decode(said) {
            Ok(preamble) => self.answer(Request { id, preamble }, Instant::now() + TURN),
            Err(why) => refuse(&id, why),
        }
    }

    /// Puts a request where it belongs, or refuses it; at `until` also if it could go somewhere later.
    fn answer(&mut self, request: Request, until: Instant) {
        let Preamble { purpose, migration, .. } = request.preamble;
        let begun = self.half_open.iter().any(|arrival| {
            let complete = arrival.outlet.is_some() && purpose == Purpose::ControlBack;
            arrival.migration == migration && !complete
        });
        let peer = request.id.peer();
        let accepted = match self.board.judge(&request.preamble, begun) {
            Err(why) => return refuse(&request.id, &why),
            Ok(Place::Later) if Instant::now() >= until || self.waiting.len() >= MAX_HALF_OPEN => {
                return refuse(&request.id, "another migration is being served");
            }
            Ok(Place::Later) => return self.waiting.push(Waiting { request, until }),
            Ok(Place::Waits) => return self.board.keep(purpose, request),
            Ok(Place::Begins) => self.begin(request),
            Ok(Place::Completes) => {
                let mut half_open = self.half_open.iter_mut();
                match half_open.find(|arrival| arrival.migration == migration) {
                    Some(arrival) => arrival.complete(request),
                    None => Ok(()),
                }
            }
        };
        if let Err(error) = accepted {
            let why = pageferry::Chain::of(&error).to_string();
            tracing::warn!(?peer, "closed a connection: {why}");
            // What has begun cannot be completed any more.
            self.half_open.retain(|arrival| arrival.migration != migration);
        }
    }

    fn begin(&mut self, request: Request) -> Result<(), TransportError> {
        if self.half_open.len() >= MAX_HALF_OPEN {
            let oldest = self.half_open.remove(0);
            let peer = oldest.workshop.peer;
            tracing::warn!(%peer, "closed a connection: too many others came");
        }
        let arrival = Arrival::begin(request, self.local, &self.options, &self.board)?;
        self.half_open.push(arrival);
        Ok(())
    }
}

fn refuse(id: &Id, why: &str) {
    tracing::warn!(peer = ?id.peer(), "refused a connection: {why}");
    id.reject(why.as_bytes());
}
