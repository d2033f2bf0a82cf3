//! The destination's end of a link.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::memory::GuestMemory;
use pageferry::transport::reception::Seat;
use pageferry::transport::{
    Capabilities, ControlChannel, DestinationLink, Interrupt, Link, LinkId, PageReader,
    PageReceiver, Registration, Returning, TransportError,
};

use crate::announce::{Announcer, hear_all};
use crate::cm::RemoteAccess;
use crate::dial::Request;
use crate::end::End;
use crate::inbox::Inbox;
use crate::kept::Kept;
use crate::options::Mtu;
use crate::preamble::Purpose;
use crate::reader::RdmaPageReader;
use crate::receiver::RdmaPageReceiver;
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

/// Takes a connection of a link's.
fn take(
    seat: &Seat<Arrival, Requests<Request>>,
    end: &End,
    wanted: Purpose,
    deadline: Option<Instant>,
    timeout: Duration,
) -> Result<Request, TransportError> {
    let check = || end.workshop.state.check();
    let found = seat.take(deadline, check, |requests| requests.take(wanted))?;
    let operation = "accept the source's connections";
    found.ok_or(TransportError::TimedOut { operation, after: timeout })
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
            let table = take(seat, end, Purpose::Table, deadline, timeout)?;
            let outlet = end.workshop.accept_outlet(table)?;
            let announcer = Arc::new(Announcer::new(outlet, Arc::clone(registered)));
            announcer.announce()?;
            (0..channels)
                .map(|channel| -> Result<Box<dyn PageReceiver>, TransportError> {
                    let wanted = Purpose::Pages { channel };
                    let request = take(seat, end, wanted, deadline, timeout)?;
                    let inlet = end.workshop.accept_inlet(request, RemoteAccess::Write)?;
                    let (registered, announcer) = (Arc::clone(registered), Arc::clone(&announcer));
                    Ok(Box::new(RdmaPageReceiver::new(inlet, registered, announcer)))
                })
                .collect()
        })
    }

    fn open_reader(&mut self, timeout: Duration) -> Result<Box<dyn PageReader>, TransportError> {
        let Self { seat, end } = self;
        let here = end.registered()?;
        let deadline = Instant::now().checked_add(timeout);
        let request = take(seat, end, Purpose::Reads, deadline, timeout)?;
        let mut inlet = end.workshop.accept_inlet(request, RemoteAccess::Nothing)?;
        let there = hear_all(&mut inlet, here.memory.layout(), timeout)?;
        let slice_bytes = end.workshop.slice_bytes();
        Ok(Box::new(RdmaPageReader::new(inlet, here, there, slice_bytes)))
    }
}
