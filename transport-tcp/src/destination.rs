//! The destination's end of a link: the acceptor found its control connection, and finds the
//! data connections.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pageferry::memory::GuestMemory;
use pageferry::transport::{
    Capabilities, ControlChannel, DestinationLink, Interrupt, Link, MigrationId, PageReceiver,
    Registration, TransportError,
};

use crate::board::Accepted;
use crate::connection::{Connection, LinkState, close_all};
use crate::data_socket::DataSocket;
use crate::desk::Desk;
use crate::inbox::{Inbox, Side};
use crate::receiver::TcpPageReceiver;
use crate::{CAPABILITIES, NAME, control};

/// The destination's end of a link over TCP. Made by
/// [`TcpAcceptor::accept`](crate::TcpAcceptor::accept).
///
/// # Resource cleanup
///
/// Dropping it closes all connections of the migration, and the acceptor takes the next one. It
/// keeps the acceptor's thread and port alive even if the acceptor was dropped.
#[derive(Debug)]
pub struct TcpDestinationLink {
    id: MigrationId,
    desk: Arc<Desk>,
    state: Arc<LinkState>,
    /// Control first, then data.
    connections: Vec<Arc<Connection>>,
    /// The first control frame, if that has come.
    greeting: Option<Vec<u8>>,
    control_taken: bool,
    memory: Option<Arc<GuestMemory>>,
    opened: bool,
}

impl TcpDestinationLink {
    pub(crate) fn new(accepted: Accepted, desk: Arc<Desk>, state: Arc<LinkState>) -> Self {
        let Accepted { id, control, greeting } = accepted;
        Self {
            id,
            desk,
            state,
            connections: vec![control],
            greeting,
            control_taken: false,
            memory: None,
            opened: false,
        }
    }

    /// The migration, as the acceptor's logs call it.
    pub fn migration_id(&self) -> MigrationId {
        self.id
    }

    /// The source's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.connections[0].peer()
    }

    /// Fails once the link was interrupted, or it is known why it is over.
    pub fn check(&self) -> Result<(), TransportError> {
        self.state.check()
    }

    /// Accepts the connections of `channels` data channels, in order of their index, for a
    /// transport that moves bytes in a way of its own. In place of
    /// [`DestinationLink::open_receivers`].
    pub fn open_sockets(
        &mut self,
        channels: u16,
        timeout: Duration,
    ) -> Result<Vec<DataSocket>, TransportError> {
        Ok(self.open(channels, timeout)?.into_iter().map(DataSocket::new).collect())
    }

    fn open(
        &mut self,
        channels: u16,
        timeout: Duration,
    ) -> Result<Vec<Arc<Connection>>, TransportError> {
        self.state.check()?;
        crate::check_channels(channels)?;
        if self.opened {
            return Err(TransportError::OutOfOrder("data channels are open"));
        }
        let sockets = self.desk.board().collect_channels(channels, timeout, &self.state)?;
        self.opened = true;
        let connections = sockets
            .into_iter()
            .map(|incoming| self.state.adopt(incoming.socket, incoming.peer))
            .collect::<Result<Vec<_>, _>>()?;
        self.connections.extend(connections.iter().cloned());
        Ok(connections)
    }
}

impl Link for TcpDestinationLink {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        CAPABILITIES
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.state.check()?;
        if std::mem::replace(&mut self.control_taken, true) {
            return Err(TransportError::OutOfOrder("the control channel is taken"));
        }
        let greeting = self.greeting.take();
        let inbox = Inbox::new(&self.connections[0], Side::Destination, greeting);
        Ok(control::channel(Arc::new(inbox)))
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        self.state.check()?;
        self.state.settle();
        self.memory = Some(Arc::clone(memory));
        Ok(Registration::default())
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.state) as Arc<dyn Interrupt>
    }
}

impl DestinationLink for TcpDestinationLink {
    fn open_receivers(
        &mut self,
        channels: u16,
        timeout: Duration,
    ) -> Result<Vec<Box<dyn PageReceiver>>, TransportError> {
        self.state.check()?;
        let Some(memory) = self.memory.clone() else {
            return Err(TransportError::OutOfOrder("data channels before registration"));
        };
        let connections = self.open(channels, timeout)?;
        Ok(connections
            .into_iter()
            .map(|connection| {
                Box::new(TcpPageReceiver::new(connection, Arc::clone(&memory)))
                    as Box<dyn PageReceiver>
            })
            .collect())
    }
}

impl Drop for TcpDestinationLink {
    fn drop(&mut self) {
        close_all(&self.connections);
        self.desk.board().end_migration();
    }
}
