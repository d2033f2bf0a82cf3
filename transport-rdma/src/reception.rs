//! The acceptor's thread: owns the listener, hears what requests are for, makes control connections,
//! and never waits for a stranger.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::transport::reception::{Arrived, Bell, Board, Holder, Served, TurnedAway};
use pageferry::transport::ways::Way;
use pageferry::transport::{
    Admission, Greeted, LinkId, MAX_GREETING_BYTES, Standing, TransportError, WaitingRoom,
    Warnings, check_greeting, first_of_the_most,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::cm::{Event, Id, RemoteAccess};
use crate::control;
use crate::dial::{Request, Workshop};
use crate::frames::Frame;
use crate::options::RdmaOptions;
use crate::pipe::{Inlet, Message, Outlet, RECEIVES};
use crate::preamble::{Preamble, Purpose};
use crate::requests::{Part, Requests, judge};
use crate::seal::Seal;
use crate::state::LinkState;
use crate::trust::{Doorkeeper, check_path};

/// Most sources whose control connections are not there yet, or that have not greeted. With more, the
/// oldest goes of those from one address, from the one that has most: a source of ours makes them at once.
const MAX_HALF_OPEN: usize = 16;
/// Most requests taken from the listener before the others get their turn.
const REQUESTS_AT_ONCE: usize = 64;
/// Most sources that have greeted and wait for their place. Each is two queue pairs.
pub(crate) const MAX_WAITING: usize = 16;
/// How long a greeting may take that goes on arriving. Sources wait for an answer for less.
const GREETING_AT_MOST: Duration = Duration::from_secs(60);
/// How often it is looked what a source has said, and whether there is room for one that waits.
const GLANCE: Duration = Duration::from_millis(10);
/// How long the listener rests when the machine has no descriptors or memory for a connection.
const REST: Duration = Duration::from_millis(100);

/// What the acceptor's thread and the links tell each other.
pub(crate) type RdmaBoard = Board<Arrival, Requests<Request>>;

/// A source, and its control connections as far as they are there.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) migration: LinkId,
    pub(crate) inlet: Inlet,
    pub(crate) outlet: Option<Outlet>,
    /// Where there is TLS.
    pub(crate) seal: Option<Seal>,
    /// When the second connection was accepted.
    accepted: Instant,
    arriving: Frame,
    /// Its first control frame, once that is there and where one has to come.
    pub(crate) greeting: Option<Vec<u8>>,
    /// How long that took.
    round_trip: Duration,
    deadline: Instant,
    /// After the queues.
    pub(crate) workshop: Workshop,
}

impl Arrival {
    /// Accepts the first connection of a migration.
    fn begin(
        request: Request,
        peer: SocketAddr,
        seal: Option<Seal>,
        options: &RdmaOptions,
        board: &Arc<RdmaBoard>,
    ) -> Result<Self, TransportError> {
        let failed = |cause| TransportError::Connect { address: peer.to_string(), cause };
        let state = LinkState::new(board.waker()).map_err(failed)?;
        let migration = request.preamble.migration;
        let way = Way { to: peer, from: None };
        let workshop = Workshop::at(&request.id, way, options.clone(), state)?;
        workshop.watch(&request.id)?;
        let inlet = workshop.begin_inlet(request, RemoteAccess::Nothing)?;
        Ok(Self {
            migration,
            inlet,
            outlet: None,
            seal,
            accepted: Instant::now(),
            arriving: Frame::default(),
            greeting: None,
            round_trip: Duration::ZERO,
            deadline: crate::after(options.connect_timeout),
            workshop,
        })
    }

    /// Accepts the other one.
    fn complete(&mut self, request: Request) -> Result<(), TransportError> {
        self.accepted = Instant::now();
        self.outlet = Some(self.workshop.begin_outlet(request)?);
        Ok(())
    }

    fn ids(&self) -> impl Iterator<Item = &Id> {
        let back = self.outlet.iter().map(|outlet| &*outlet.connection.id);
        std::iter::once(&*self.inlet.connection.id).chain(back)
    }

    /// Takes in what has happened to its connections, and what it says; true once it is known to be a
    /// source.
    fn advance(&mut self) -> Result<bool, String> {
        if self.has_left() {
            return Err("the source has left".to_owned());
        }
        let back = self.outlet.as_ref().is_some_and(|outlet| outlet.connection.is_established());
        let is_there = back && self.inlet.connection.is_established();
        if is_there && (!self.is_unknown() || self.listen()?) {
            return Ok(true);
        }
        if self.deadline <= Instant::now() {
            return Err(match self.arriving.bytes().len() {
                0 if !back => "its connections were not there in time".to_owned(),
                0 if self.is_shaking_hands() => "its TLS handshake was not done in time".to_owned(),
                came => format!("{came} bytes of its greeting came in time"),
            });
        }
        Ok(false)
    }

    /// Whether it has something to say yet before it is known to be a source.
    fn is_unknown(&self) -> bool {
        self.workshop.options.admission == Admission::Greeted || self.is_shaking_hands()
    }

    fn is_shaking_hands(&self) -> bool {
        self.seal.as_ref().is_some_and(Seal::is_shaking_hands)
    }

    /// What a message says; nothing where that is TLS's own matter. Answers for TLS.
    fn open(&mut self, message: Vec<u8>) -> Result<Vec<u8>, String> {
        let Some(seal) = &self.seal else { return Ok(message) };
        let failed = |error: TransportError| pageferry::Chain::of(&error).to_string();
        let shaking = seal.is_shaking_hands();
        let said = seal.open(&message).map_err(|unopened| unopened.to_string())?;
        if shaking {
            let outlet = self.outlet.as_mut().ok_or("half of a control channel")?;
            for due in seal.due() {
                outlet.message(&due, Some(Instant::now())).map_err(failed)?;
            }
            if !seal.is_shaking_hands() {
                self.workshop.key = Some(seal.key(self.migration).map_err(failed)?);
                // Who greets has waited for this.
                self.accepted = Instant::now();
            }
        }
        Ok(said)
    }

    /// Takes what has come of its greeting, as many messages as there are credits for, and nothing of what
    /// comes behind; true once it is whole.
    fn listen(&mut self) -> Result<bool, String> {
        let failed = |error: TransportError| pageferry::Chain::of(&error).to_string();
        for _ in 0..RECEIVES {
            let Some(message) = self.inlet.next(Some(Instant::now())).map_err(failed)? else {
                break;
            };
            let Message::Bytes(message) = message else { continue };
            let shaking = self.is_shaking_hands();
            let message = self.open(message)?;
            match (shaking, message.is_empty()) {
                (true, true) if !self.is_unknown() => return Ok(true),
                (_, true) => continue,
                (true, false) => return Err("a frame in the middle of a handshake".to_owned()),
                (false, false) => {}
            }
            let whole = self.arriving.take_in(&message).map_err(failed)?;
            check_greeting(self.arriving.bytes(), self.arriving.len())
                .map_err(|error| format!("no greeting: {error}"))?;
            if whole {
                self.greeting = Some(self.arriving.take());
                self.round_trip = self.accepted.elapsed();
                self.workshop.state.fate.stands(Standing::greeted(self.round_trip));
                return Ok(true);
            }
            // More of it has come.
            let silence = crate::after(self.workshop.options.connect_timeout);
            self.deadline = silence.min(self.accepted + GREETING_AT_MOST);
        }
        Ok(false)
    }

    /// Turns it away, in words if it is there to hear them.
    fn refuse(mut self, why: &str, warnings: &Warnings) {
        warnings.warn(self.workshop.peer, format_args!("turned a source away: {why}"));
        if let Some(outlet) = self.outlet.as_mut().filter(|it| it.connection.is_established()) {
            control::refuse(outlet, self.seal.as_ref(), why);
        }
    }
}

impl Arrived for Arrival {
    fn link(&self) -> LinkId {
        self.migration
    }

    fn peer(&self) -> SocketAddr {
        self.workshop.peer
    }

    fn greeting(&self) -> Option<&[u8]> {
        self.greeting.as_deref()
    }

    fn has_left(&mut self) -> bool {
        let back = self.outlet.as_mut().is_some_and(|outlet| outlet.connection.has_left());
        self.inlet.connection.has_left() || back
    }

    fn served(&self) -> Arc<dyn Served> {
        Arc::clone(&self.workshop.state) as Arc<dyn Served>
    }
}

/// Gives a source its place, or gives it back; what its other connections are known by is known with the place.
fn admit(board: &RdmaBoard, arrival: Arrival) -> Option<(Arrival, Holder)> {
    let (link, key) = (arrival.migration, arrival.workshop.key.clone());
    let kept_out = board.admit(arrival);
    if kept_out.is_none() {
        board.connections(link, |requests| requests.map(|requests| requests.set_key(key)));
    }
    kept_out
}

pub(crate) struct Reception {
    listener: Id,
    local: SocketAddr,
    bell: Arc<Bell>,
    board: Arc<RdmaBoard>,
    options: RdmaOptions,
    doorkeeper: Doorkeeper,
    /// Oldest first.
    half_open: Vec<Arrival>,
    /// Have greeted.
    waiting: WaitingRoom<Arrival>,
    rests_until: Option<Instant>,
}

impl Reception {
    pub(crate) fn new(
        listener: Id,
        local: SocketAddr,
        bell: Arc<Bell>,
        board: Arc<RdmaBoard>,
        options: RdmaOptions,
    ) -> Self {
        let (half_open, doorkeeper) = (Vec::new(), Doorkeeper::new(&options.security));
        let waiting = WaitingRoom::new(MAX_WAITING, MAX_WAITING * MAX_GREETING_BYTES);
        let rests_until = None;
        Self { listener, local, bell, board, options, doorkeeper, half_open, waiting, rests_until }
    }

    /// Runs until the board is stopped.
    pub(crate) fn run(mut self) {
        while !self.board.is_stopped() {
            if let Err(error) = self.turn() {
                tracing::error!("stopped accepting connections: {error}");
                self.board.stop(Some(error));
            }
        }
        let waiting = self.waiting.empty();
        for arrival in self.half_open.into_iter().chain(waiting).chain(self.board.left_over()) {
            arrival.refuse(&TurnedAway::Busy.to_string(), &self.board.warnings);
        }
    }

    /// Waits for something to happen, and deals with all that did.
    fn turn(&mut self) -> io::Result<()> {
        let now = Instant::now();
        self.rests_until = self.rests_until.filter(|&until| until > now);
        // What a source has said, and whether another one is gone, nobody tells.
        let speaks = self.half_open.iter().any(|arrival| arrival.outlet.is_some());
        let glance = (speaks || !self.waiting.is_empty()).then(|| now + GLANCE);
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
        let greeted = self.advance();
        self.serve_waiting(greeted);
        if listening { self.take_in() } else { Ok(()) }
    }

    /// Goes on with those that are not known to be sources yet; who of them has greeted.
    fn advance(&mut self) -> Vec<Arrival> {
        let mut greeted = Vec::new();
        for mut arrival in std::mem::take(&mut self.half_open) {
            match arrival.advance() {
                Ok(false) => self.half_open.push(arrival),
                Ok(true) => greeted.push(arrival),
                Err(why) => arrival.refuse(&why, &self.board.warnings),
            }
        }
        greeted
    }

    /// Gives the place to the first who waits, if it is to be had.
    fn serve_waiting(&mut self, greeted: Vec<Arrival>) {
        let (now, board) = (Instant::now(), Arc::clone(&self.board));
        // Who has left keeps nobody out.
        for left in self.waiting.without(Arrival::has_left) {
            left.refuse("it left while it waited", &board.warnings);
        }
        for arrival in greeted {
            if board.is_returning(&arrival) {
                // Its own place.
                if let Some((arrival, _)) = admit(&board, arrival) {
                    arrival.refuse(&TurnedAway::Busy.to_string(), &board.warnings);
                }
                continue;
            }
            let bytes = arrival.greeting.as_ref().map_or(0, Vec::len);
            let (from, round_trip) = (arrival.workshop.peer, arrival.round_trip);
            for crowded in self.waiting.enter(now, arrival, Greeted { from, bytes, round_trip }) {
                crowded.refuse(&TurnedAway::Crowded.to_string(), &board.warnings);
            }
        }
        for later in self.waiting.serve(now, |arrival| admit(&board, arrival)) {
            later.refuse(&TurnedAway::Busy.to_string(), &board.warnings);
        }
    }

    /// Takes requests from the listener.
    fn take_in(&mut self) -> io::Result<()> {
        for _ in 0..REQUESTS_AT_ONCE {
            match self.listener.take_event() {
                Ok(Some(Event::Requested { id, said, queue_pair })) => {
                    self.hear(id, &said, queue_pair);
                }
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
    fn hear(&mut self, id: Id, said: &[u8], queue_pair: u32) {
        let heard = check_path(&self.options, &id).and_then(|()| {
            let preamble = Preamble::decode(said)?;
            self.doorkeeper.check(preamble.sealed).map(|()| preamble)
        });
        match heard {
            Ok(preamble) => self.answer(Request { id, preamble, queue_pair }),
            Err(why) => self.refuse(&id, why),
        }
    }

    /// Puts a request where it belongs, or refuses it.
    fn answer(&mut self, request: Request) {
        let Preamble { purpose, migration, .. } = request.preamble;
        let begun = self.half_open.iter().any(|arrival| {
            let complete = arrival.outlet.is_some() && purpose == Purpose::ControlBack;
            arrival.migration == migration && !complete
        });
        let peer = request.id.peer();
        let served = |requests: Option<&mut Requests<_>>| {
            judge(purpose, begun, requests.as_deref().filter(|it| it.is_of(&request)))
        };
        let accepted = match self.board.connections(migration, served) {
            Err(why) => return self.refuse(&request.id, &why),
            Ok(Part::Waits) => {
                let keep = |requests: &mut Requests<_>| requests.keep(purpose, request);
                // Of a migration that is over meanwhile it is refused.
                self.board.connections(migration, |requests| requests.map(keep));
                return;
            }
            Ok(Part::Begins) => self.begin(request),
            Ok(Part::Completes) => {
                let mut half_open = self.half_open.iter_mut();
                match half_open.find(|arrival| arrival.migration == migration) {
                    Some(arrival) => arrival.complete(request),
                    None => Ok(()),
                }
            }
        };
        if let Err(error) = accepted {
            let why = pageferry::Chain::of(&error).to_string();
            let peer = peer.unwrap_or(self.local);
            self.board.warnings.warn(peer, format_args!("closed a connection: {why}"));
            // What has begun cannot be completed any more.
            self.half_open.retain(|arrival| arrival.migration != migration);
        }
    }

    fn begin(&mut self, request: Request) -> Result<(), TransportError> {
        let peer = request.id.peer().unwrap_or(self.local);
        let seal = match self.doorkeeper.seal(peer) {
            Ok(seal) => seal,
            Err(why) => {
                self.board.warnings.warn(peer, format_args!("refused a connection: {why}"));
                request.id.reject(b"the destination cannot show who it is; its log says why");
                return Ok(());
            }
        };
        if self.half_open.len() >= MAX_HALF_OPEN {
            let from = self.half_open.iter().map(|arrival| arrival.workshop.peer);
            let at = first_of_the_most(from).unwrap_or(0);
            self.half_open.remove(at).refuse("too many others came", &self.board.warnings);
        }
        let arrival = Arrival::begin(request, peer, seal, &self.options, &self.board)?;
        self.half_open.push(arrival);
        Ok(())
    }

    fn refuse(&self, id: &Id, why: &str) {
        let peer = id.peer().unwrap_or(self.local);
        self.board.warnings.warn(peer, format_args!("refused a connection: {why}"));
        id.reject(why.as_bytes());
    }
}
