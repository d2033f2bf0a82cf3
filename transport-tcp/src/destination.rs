//! The destination's end of a link: the acceptor found its control connection, and finds the
//! data connections.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pageferry::memory::GuestMemory;
use pageferry::transport::reception::Seat;
use pageferry::transport::{
    Capabilities, ControlChannel, DestinationLink, Interrupt, Link, LinkId, PageReceiver, ReadLane,
    Registration, Returning, TransportError,
};

use crate::channels::{DataChannels, Joined};
use crate::connection::{Connection, LinkState};
use crate::data_socket::DataSocket;
use crate::end::End;
use crate::hearing::GivenChannels;
use crate::inbox::{Inbox, Side};
use crate::incoming::Incoming;
use crate::lanes::TcpPageRequests;
use crate::newcomer::Newcomer;
use crate::preamble::Kind;
use crate::receiver::TcpPageReceiver;
use crate::waiting::deadline_after;
use crate::{CAPABILITIES, NAME};

/// The destination's end of a link over TCP. Made by
/// [`TcpAcceptor::accept`](crate::TcpAcceptor::accept).
///
/// # Resource cleanup
///
/// Dropping it closes all connections of the migration, and the acceptor takes the next one. It
/// keeps the acceptor's thread and port alive even if the acceptor was dropped.
#[derive(Debug)]
pub struct TcpDestinationLink {
    end: End,
    /// Given up after the connections are closed.
    data: Data,
}

/// Where the data channels' connections come from.
#[derive(Debug)]
enum Data {
    /// They are accepted.
    Seat(Seat<Newcomer, Joined>),
    /// They are there.
    Given(GivenChannels),
}

impl TcpDestinationLink {
    pub(crate) fn new(
        newcomer: Newcomer,
        seat: Seat<Newcomer, Joined>,
    ) -> Result<Self, TransportError> {
        let Newcomer { id, incoming, greeting, state, .. } = newcomer;
        let control = state.adopt_control(incoming.wire, incoming.peer)?;
        let inbox = Arc::new(Inbox::new(&control, Side::Destination, greeting));
        Ok(Self { end: End::new(id, state, &inbox), data: Data::Seat(seat) })
    }

    pub(crate) fn given(
        id: LinkId,
        state: Arc<LinkState>,
        control: &Arc<Connection>,
        data: GivenChannels,
    ) -> Self {
        let inbox = Arc::new(Inbox::new(control, Side::Destination, None));
        Self { end: End::new(id, state, &inbox), data: Data::Given(data) }
    }

    /// The migration, as the acceptor's logs call it.
    pub fn link_id(&self) -> LinkId {
        self.end.link_id()
    }

    /// The source's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.end.peer_addr()
    }

    /// Whether what passes is encrypted, by whomever.
    pub fn is_encrypted(&self) -> bool {
        self.end.is_encrypted()
    }

    /// Whether data channels are encrypted in this process, and not by the kernel: there are no
    /// [`DataSocket`]s then, since only this transport can move bytes.
    pub fn encrypts_in_process(&self) -> bool {
        self.end.encrypts_in_process()
    }

    /// Fails once the link was interrupted, or it is known why it is over.
    pub fn check(&self) -> Result<(), TransportError> {
        self.end.check()
    }

    /// Accepts the connections of `channels` data channels, in order of their index, for a
    /// transport that moves bytes in a way of its own. In place of
    /// [`DestinationLink::open_receivers`].
    pub fn open_sockets(
        &mut self,
        channels: u16,
        timeout: Duration,
    ) -> Result<Vec<DataSocket>, TransportError> {
        End::sockets(self.open(channels, timeout)?)
    }

    fn open(
        &mut self,
        channels: u16,
        timeout: Duration,
    ) -> Result<Vec<Arc<Connection>>, TransportError> {
        let Self { end, data } = self;
        end.open(channels, |end| {
            let kind = |channel| Kind::Data { channel };
            data.take(end, kind, channels, timeout, |joined| &mut joined.channels)
        })
    }
}

impl Data {
    /// So many connections of a kind, once all are there; which kind, `of` says too.
    fn take(
        &mut self,
        end: &End,
        kind: impl Fn(u16) -> Kind,
        count: u16,
        timeout: Duration,
        of: impl Fn(&mut Joined) -> &mut DataChannels,
    ) -> Result<Vec<Arc<Connection>>, TransportError> {
        let seat = match self {
            Self::Seat(seat) => seat,
            Self::Given(given) => return given.open(end.link_id(), kind, count, timeout),
        };
        let deadline = deadline_after(Some(timeout));
        seat.connections(|joined| of(joined).set(count));
        let sockets = seat.take(deadline, || end.check(), |joined| of(joined).take_all())?;
        let sockets = sockets.ok_or(TransportError::TimedOut {
            operation: "accept data channels",
            after: timeout,
        })?;
        let adopt = |incoming: Incoming| {
            let connection = end.state().adopt(incoming.wire, incoming.peer)?;
            connection.leave_to_kernel()?;
            Ok(connection)
        };
        sockets.into_iter().map(adopt).collect()
    }
}

impl Link for TcpDestinationLink {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { protects_pages: self.end.protects_pages(), ..CAPABILITIES }
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.end.control()
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        self.end.register(memory)?;
        self.end.state().fate.settle();
        Ok(Registration::default())
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.end.interrupter()
    }
}

impl DestinationLink for TcpDestinationLink {
    fn expect_return(&mut self, returning: Returning) {
        match &self.data {
            Data::Seat(seat) => seat.expect_return(returning),
            // Nobody else can come.
            Data::Given(_) => {}
        }
    }

    fn open_receivers(
        &mut self,
        channels: u16,
        timeout: Duration,
    ) -> Result<Vec<Box<dyn PageReceiver>>, TransportError> {
        let memory = self.end.registered()?;
        let connections = self.open(channels, timeout)?;
        Ok(connections
            .into_iter()
            .map(|connection| {
                Box::new(TcpPageReceiver::new(connection, Arc::clone(&memory)))
                    as Box<dyn PageReceiver>
            })
            .collect())
    }

    fn open_readers(
        &mut self,
        lanes: u16,
        into: &Arc<GuestMemory>,
        timeout: Duration,
    ) -> Result<Vec<ReadLane>, TransportError> {
        let Self { end, data } = self;
        let (_, connections) = end.open_reads(lanes, |end| {
            let kind = |lane| Kind::Lane { lane };
            data.take(end, kind, lanes, timeout, |joined| &mut joined.lanes)
        })?;
        let lane = |connection: Arc<Connection>| ReadLane {
            requests: Box::new(TcpPageRequests::new(Arc::clone(&connection), Arc::clone(into))),
            landings: Box::new(TcpPageReceiver::of_lane(connection, Arc::clone(into))),
        };
        Ok(connections.into_iter().map(lane).collect())
    }
}
