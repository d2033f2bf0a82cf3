//! The source's end of a link: it connects.

use std::net::SocketAddr;
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use pageferry::transport::{
    Capabilities, ControlChannel, Interrupt, Link, MigrationId, PageSender, Registration,
    SourceLink, TransportError,
};

use crate::connection::{Connection, LinkState, close_all};
use crate::data_socket::DataSocket;
use crate::dial::Dialled;
use crate::inbox::{Inbox, Side};
use crate::options::{TcpOptions, ZeroCopy};
use crate::preamble::{Kind, Preamble};
use crate::sender::TcpPageSender;
use crate::{CAPABILITIES, NAME, control};

/// The source's end of a link over TCP. Made by [`connect()`](crate::connect()).
///
/// # Resource cleanup
///
/// Dropping it closes all connections, and ends zero-copy sends that are still under way. If data
/// channels were finished and dropped before all their batches were acknowledged, it first waits for the
/// other side to take them, at most two seconds in all.
#[derive(Debug)]
pub struct TcpSourceLink {
    id: MigrationId,
    options: TcpOptions,
    state: Arc<LinkState>,
    /// Control first, then data. Held open here, so that dropping a channel sends no reset
    /// after what was sent last.
    connections: Vec<Arc<Connection>>,
    inbox: Arc<Inbox>,
    control_taken: bool,
    memory: Option<Arc<GuestMemory>>,
    opened: bool,
}

impl TcpSourceLink {
    pub(crate) fn new(
        id: MigrationId,
        options: TcpOptions,
        state: Arc<LinkState>,
        control: Arc<Connection>,
    ) -> Self {
        let inbox = Arc::new(Inbox::new(&control, Side::Source, None));
        Self {
            id,
            options,
            state,
            connections: vec![control],
            inbox,
            control_taken: false,
            memory: None,
            opened: false,
        }
    }

    /// The migration, as the destination's logs call it.
    pub fn migration_id(&self) -> MigrationId {
        self.id
    }

    /// The destination's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.connections[0].peer()
    }

    /// Fails once the link was interrupted, or it is known why it is over.
    pub fn check(&self) -> Result<(), TransportError> {
        self.state.check()
    }

    /// Opens the connections of `channels` data channels for a transport that moves bytes in a
    /// way of its own. In place of [`SourceLink::open_senders`], and with the destination's
    /// counterpart meanwhile.
    pub fn open_sockets(&mut self, channels: u16) -> Result<Vec<DataSocket>, TransportError> {
        Ok(self.open(channels)?.into_iter().map(DataSocket::new).collect())
    }

    fn open(&mut self, channels: u16) -> Result<Vec<Arc<Connection>>, TransportError> {
        self.state.check()?;
        crate::check_channels(channels)?;
        if self.opened {
            return Err(TransportError::OutOfOrder("data channels are open"));
        }
        let connections = self.dial(channels).map_err(|error| {
            // Whoever is turned away meanwhile has no migration there, and is told that for each of them.
            self.inbox.look_for_the_end();
            self.state.check().err().unwrap_or(error)
        })?;
        self.opened = true;
        self.connections.extend(connections.iter().cloned());
        Ok(connections)
    }

    fn dial(&self, channels: u16) -> Result<Vec<Arc<Connection>>, TransportError> {
        let peer = self.peer_addr();
        // All preambles go out before the first answer is waited for.
        let dialled = (0..channels)
            .map(|channel| {
                let preamble = Preamble { id: self.id, kind: Kind::Data { channel } };
                Dialled::begin(peer, &preamble, &self.options, &self.state)
            })
            .collect::<Result<Vec<_>, _>>()?;
        dialled.into_iter().map(Dialled::await_answer).collect()
    }
}

impl Link for TcpSourceLink {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { zero_copy: self.options.zero_copy != ZeroCopy::Off, ..CAPABILITIES }
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.state.check()?;
        if std::mem::replace(&mut self.control_taken, true) {
            return Err(TransportError::OutOfOrder("the control channel is taken"));
        }
        Ok(control::channel(Arc::clone(&self.inbox)))
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        self.state.check()?;
        self.memory = Some(Arc::clone(memory));
        Ok(Registration::default())
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.state) as Arc<dyn Interrupt>
    }
}

impl SourceLink for TcpSourceLink {
    fn open_senders(&mut self, channels: u16) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
        self.state.check()?;
        let Some(memory) = self.memory.clone() else {
            return Err(TransportError::OutOfOrder("data channels before registration"));
        };
        let connections = self.open(channels)?;
        connections
            .into_iter()
            .map(|connection| {
                let memory = Arc::clone(&memory);
                let sender = TcpPageSender::new(connection, memory, &self.options)?;
                Ok(Box::new(sender) as Box<dyn PageSender>)
            })
            .collect()
    }
}

impl Drop for TcpSourceLink {
    fn drop(&mut self) {
        close_all(&self.connections);
    }
}
