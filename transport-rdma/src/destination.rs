//! The destination's end of a link.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::memory::GuestMemory;
use pageferry::transport::reception::Seat;
use pageferry::transport::{
    Capabilities, ControlChannel, DestinationLink, Interrupt, Link, LinkId, PageReceiver, ReadLane,
    Registration, Returning, TransportError,
};

use crate::announce::hear_all;
use crate::cm::RemoteAccess;
use crate::dial::Request;
use crate::end::End;
use crate::inbox::Inbox;
use crate::kept::Kept;
use crate::lanes::lane as lane_of;
use crate::options::Mtu;
use crate::preamble::Purpose;
use crate::rails::Laid;
use crate::reception::Arrival;
use crate::requests::Requests;
use crate::verbs::Access;
use crate::{CAPABILITIES, NAME, control};

/// The destination's end of a link over RDMA.
///
/// # Resource cleanup
///
/// Dropping it, after its channels, ends every way of the source to guest memory: it cannot write to it, whatever it
/// knows. The registration ends too, unless that is for all links of an [`RdmaRendezvous`](crate::RdmaRendezvous); and the
/// acceptor takes the next source. It keeps the acceptor's
/// thread and port alive even if the acceptor was dropped.
#[derive(Debug)]
pub struct RdmaDestinationLink {
    /// Given up first.
    seat: Seat<Arrival, Requests<Request>>,
    pub(crate) end: End,
}

impl RdmaDestinationLink {
    /// Of a source whose control connections are there.
    pub(crate) fn new(
        arrival: Arrival,
        seat: Seat<Arrival, Requests<Request>>,
    ) -> Result<Self, TransportError> {
        let Arrival { migration, inlet, outlet, seal, greeting, workshop, .. } = arrival;
        let outlet = outlet.ok_or(TransportError::OutOfOrder("half of a control channel"))?;
        let mtu = inlet.connection.mtu;
        let control = control::channel(outlet, &Inbox::at_destination(inlet, seal, greeting)?);
        // Of a source that has displaced another one: its place was not there yet when it was admitted.
        seat.connections(|requests| requests.set_key(workshop.key.clone()));
        Ok(Self { seat, end: End::new(migration, control, mtu, workshop) })
    }

    /// Guest memory is registered for all links of a migration.
    pub(crate) fn keep_in(&mut self, kept: &Kept) {
        self.end.keep_in(kept);
    }

    /// The path MTU that both sides have agreed on, of the control connection.
    pub fn path_mtu(&self) -> Mtu {
        self.end.path_mtu()
    }

    /// What this migration is called on the wire.
    pub fn link_id(&self) -> LinkId {
        self.end.migration
    }

    /// The source's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.end.peer_addr()
    }
}

/// Data channels are being opened.
struct Opening<'a> {
    seat: &'a Seat<Arrival, Requests<Request>>,
    end: &'a End,
    memory: &'a Arc<GuestMemory>,
    rails: BTreeMap<u16, Laid>,
    deadline: Option<Instant>,
    timeout: Duration,
}

impl Opening<'_> {
    /// The receiver of a channel, and before that the rails that a source asks for: by their tables, and how many there are
    /// it does not say. A rail that comes to nothing is done without, and the source goes another way.
    fn receiver(&mut self, due: u16) -> Result<Box<dyn PageReceiver>, TransportError> {
        let is_due = |purpose| match purpose {
            Purpose::Table { .. } => true,
            Purpose::Pages { channel, .. } => channel == due,
            _ => false,
        };
        loop {
            let request = take(self.seat, self.end, is_due, self.deadline, self.timeout)?;
            let purpose = request.preamble.purpose;
            let (rail, failed) = match purpose {
                Purpose::Table { rail } => match Laid::new(self.end, self.memory, rail, request) {
                    Ok(laid) => {
                        self.rails.insert(rail, laid);
                        continue;
                    }
                    Err(error) => (rail, error),
                },
                Purpose::Pages { rail, .. } => {
                    let laid = self.rails.get(&rail).filter(|laid| laid.is_of(&request.id));
                    let accepted = if let Some(laid) = laid {
                        laid.accept(request)
                    } else {
                        request.id.reject(b"there is no such rail");
                        Err(TransportError::OutOfOrder("a data channel by no rail"))
                    };
                    match accepted {
                        Ok(receiver) => return Ok(receiver),
                        Err(error) => (rail, error),
                    }
                }
                _ => return Err(TransportError::OutOfOrder("a connection of another kind")),
            };
            if rail == 0 {
                return Err(failed);
            }
            self.end.workshop.state.check()?;
            let why = pageferry::Chain::of(&failed).to_string();
            tracing::warn!(rail, "a rail is done without: {why}");
            self.seat.connections(|requests| requests.forget(purpose));
        }
    }
}

/// Takes a connection of a link's.
fn take(
    seat: &Seat<Arrival, Requests<Request>>,
    end: &End,
    is_wanted: impl Fn(Purpose) -> bool,
    deadline: Option<Instant>,
    timeout: Duration,
) -> Result<Request, TransportError> {
    let check = || {
        end.workshop.state.check()?;
        // Also where there is always somebody who waits.
        match deadline {
            Some(deadline) if Instant::now() > deadline => Err(late(timeout)),
            _ => Ok(()),
        }
    };
    let found = seat.take(deadline, check, |requests| requests.take(&is_wanted))?;
    found.ok_or_else(|| late(timeout))
}

fn late(after: Duration) -> TransportError {
    TransportError::TimedOut { operation: "accept the source's connections", after }
}

impl Link for RdmaDestinationLink {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        // A NIC has its own checksum of each packet, and nothing makes sure of what lies between NIC and memory.
        Capabilities { protects_pages: self.end.workshop.within_host, ..CAPABILITIES }
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.end.control()
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        self.end.workshop.state.fate.settle();
        self.end.register(memory, Access::RemoteWrite)
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.end.interrupter()
    }
}

impl DestinationLink for RdmaDestinationLink {
    fn expect_return(&mut self, returning: Returning) {
        self.seat.expect_return(returning);
    }

    fn open_receivers(
        &mut self,
        channels: u16,
        timeout: Duration,
    ) -> Result<Vec<Box<dyn PageReceiver>>, TransportError> {
        let Self { seat, end } = self;
        end.open(|end, registered| {
            let beyond = seat.connections(|requests| requests.set_channels(channels));
            for beyond in beyond.into_iter().flatten() {
                let what = format!("there are only {channels} data channels");
                tracing::warn!(peer = ?beyond.id.peer(), "refused a connection: {what}");
                beyond.id.reject(what.as_bytes());
            }
            let deadline = Instant::now().checked_add(timeout);
            let mut opening = Opening {
                seat,
                end,
                memory: &registered.memory,
                rails: BTreeMap::new(),
                deadline,
                timeout,
            };
            (0..channels).map(|channel| opening.receiver(channel)).collect()
        })
    }

    fn open_readers(
        &mut self,
        lanes: u16,
        into: &Arc<GuestMemory>,
        timeout: Duration,
    ) -> Result<Vec<ReadLane>, TransportError> {
        let Self { seat, end } = self;
        let registered = end.open_reads()?;
        let mut workshop = end.workshop.clone();
        // What lands in the memory of data channels is registered for more than this.
        let same = Arc::ptr_eq(into, &registered.memory);
        let access = if same { Access::RemoteWrite } else { Access::LocalWrite };
        let when = workshop.options.registration;
        let (here, _) = end.register_beside(&mut workshop, into, access, when)?;
        let deadline = Instant::now().checked_add(timeout);
        let open = |lane| {
            let wanted = Purpose::Lane { lane };
            let request = take(seat, end, |purpose| purpose == wanted, deadline, timeout)?;
            let mut inlet = workshop.accept_inlet(request, RemoteAccess::Nothing)?;
            let there = hear_all(&mut inlet, here.memory.layout(), timeout)?;
            lane_of(inlet, Arc::clone(&here), there, workshop.slice_bytes())
        };
        (0..lanes).map(open).collect()
    }
}
