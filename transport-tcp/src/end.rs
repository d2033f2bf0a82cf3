//! What the source's end of a link and the destination's have in common.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use pageferry::memory::GuestMemory;
use pageferry::transport::{ControlChannel, Interrupt, LinkId, Stages, TransportError};

use crate::connection::{Connection, LINGER, LinkState};
use crate::data_socket::DataSocket;
use crate::inbox::Inbox;
use crate::wire::Seal;
use crate::{MAX_CHANNELS, control};

#[derive(Debug)]
pub(crate) struct End {
    id: LinkId,
    state: Arc<LinkState>,
    /// Control first, then data. Held open here, so that dropping a channel sends no reset
    /// after what was sent last.
    connections: Vec<Arc<Connection>>,
    stages: Stages<Arc<GuestMemory>>,
    protects_pages: bool,
}

impl End {
    /// Of a link of which there is the control connection.
    pub(crate) fn new(id: LinkId, state: Arc<LinkState>, inbox: &Arc<Inbox>) -> Self {
        let connections = vec![Arc::clone(inbox.connection())];
        let stages = Stages::new(control::channel(Arc::clone(inbox)));
        let control = &connections[0];
        let protects_pages = control.seal() != Seal::Plain || control.stays_within_host();
        Self { id, state, connections, stages, protects_pages }
    }

    pub(crate) fn link_id(&self) -> LinkId {
        self.id
    }

    pub(crate) fn peer_addr(&self) -> SocketAddr {
        self.connections[0].peer()
    }

    pub(crate) fn state(&self) -> &Arc<LinkState> {
        &self.state
    }

    pub(crate) fn check(&self) -> Result<(), TransportError> {
        self.state.check()
    }

    pub(crate) fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.check()?;
        self.stages.control()
    }

    pub(crate) fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<(), TransportError> {
        self.check()?;
        self.stages.register(Arc::clone(memory));
        Ok(())
    }

    pub(crate) fn registered(&self) -> Result<Arc<GuestMemory>, TransportError> {
        self.check()?;
        self.stages.registered()
    }

    pub(crate) fn is_encrypted(&self) -> bool {
        self.connections[0].seal() != Seal::Plain
    }

    /// Whether what lands is what was sent.
    pub(crate) fn protects_pages(&self) -> bool {
        self.protects_pages
    }

    pub(crate) fn encrypts_in_process(&self) -> bool {
        self.connections[0].is_for_copies()
    }

    /// For another transport to move bytes over; fails where that would be in plain text.
    pub(crate) fn sockets(
        connections: Vec<Arc<Connection>>,
    ) -> Result<Vec<DataSocket>, TransportError> {
        if connections.iter().any(|connection| connection.seal() == Seal::Process) {
            return Err(TransportError::Unsupported(
                "sockets for others, where TLS is in this process",
            ));
        }
        Ok(connections.into_iter().map(DataSocket::new).collect())
    }

    /// Opens data channels, once, by connections that `connect` makes.
    pub(crate) fn open(
        &mut self,
        channels: u16,
        connect: impl FnOnce(&Self) -> Result<Vec<Arc<Connection>>, TransportError>,
    ) -> Result<Vec<Arc<Connection>>, TransportError> {
        self.check()?;
        check_number(channels)?;
        self.stages.check_closed()?;
        let connections = connect(self)?;
        self.stages.open();
        self.connections.extend(connections.iter().cloned());
        Ok(connections)
    }

    /// Opens lanes for reads, once, by connections that `connect` makes. With the memory that is registered.
    pub(crate) fn open_reads(
        &mut self,
        lanes: u16,
        connect: impl FnOnce(&Self) -> Result<Vec<Arc<Connection>>, TransportError>,
    ) -> Result<(Arc<GuestMemory>, Vec<Arc<Connection>>), TransportError> {
        self.check()?;
        check_number(lanes)?;
        let memory = self.stages.open_reads()?;
        let connections = connect(self)?;
        self.connections.extend(connections.iter().cloned());
        Ok((memory, connections))
    }

    pub(crate) fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.state) as Arc<dyn Interrupt>
    }
}

fn check_number(channels: u16) -> Result<(), TransportError> {
    if channels <= MAX_CHANNELS {
        return Ok(());
    }
    let (size, limit) = (u64::from(channels), u64::from(MAX_CHANNELS));
    Err(TransportError::TooLarge { what: "number of data channels", size, limit })
}

impl Drop for End {
    fn drop(&mut self) {
        let deadline = Instant::now() + LINGER;
        for connection in &self.connections {
            connection.close(deadline);
        }
    }
}
