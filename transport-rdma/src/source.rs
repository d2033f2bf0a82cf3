//! The source's end of a link.

use std::net::SocketAddr;
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use pageferry::transport::{
    Capabilities, ControlChannel, Interrupt, Link, MigrationId, PageSender, ReadGrant,
    Registration, SourceLink, TransportError,
};

use crate::announce::{Directory, tell_all};
use crate::cm::RemoteAccess;
use crate::dial::{Connected, Workshop};
use crate::inbox::Inbox;
use crate::memory::Registered;
use crate::options::Mtu;
use crate::preamble::Purpose;
use crate::reader::RdmaReadGrant;
use crate::sender::RdmaPageSender;
use crate::verbs::Access;
use crate::{CAPABILITIES, NAME, control};

/// The source's end of a link over RDMA.
///
/// # Resource cleanup
///
/// Dropping it, after its channels, ends the registration of guest memory; nothing stays behind in
/// the device but what the kernel keeps of a closed connection for a while (`TIMEWAIT`).
#[derive(Debug)]
pub struct RdmaSourceLink {
    control: Option<ControlChannel>,
    inbox: Arc<Inbox>,
    registered: Option<Arc<Registered>>,
    /// Whether data channels were opened: once.
    opened: bool,
    migration: MigrationId,
    mtu: u32,
    workshop: Workshop,
}

impl RdmaSourceLink {
    /// Of a destination that has let in the first control connection.
    pub(crate) fn new(connected: Connected) -> Result<Self, TransportError> {
        let Connected { workshop, migration, outlet } = connected;
        workshop.watch(&outlet.connection.id)?;
        let inlet = workshop.dial_inlet(&workshop.preamble(Purpose::ControlBack, migration))?;
        let mtu = outlet.connection.mtu;
        let inbox = Inbox::at_source(inlet, workshop.peer)?;
        let control = Some(control::channel(outlet, &inbox));
        Ok(Self { control, inbox, registered: None, opened: false, migration, mtu, workshop })
    }

    /// What this migration is called on the wire.
    pub fn migration_id(&self) -> MigrationId {
        self.migration
    }

    /// The path MTU that both sides have agreed on, of the control connection.
    pub fn path_mtu(&self) -> Mtu {
        Mtu::decoded(self.mtu)
    }

    /// The destination's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.workshop.peer
    }

    /// What came of opening connections. Whoever is turned away meanwhile has no migration there, and is
    /// told that for each of them.
    fn explained<T>(&self, opened: Result<T, TransportError>) -> Result<T, TransportError> {
        opened.map_err(|error| self.inbox.explain(error))
    }

    fn dial_senders(
        &self,
        here: &Arc<Registered>,
        channels: u16,
    ) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
        let preamble = |purpose| self.workshop.preamble(purpose, self.migration);
        let table = self.workshop.dial_inlet(&preamble(Purpose::Table))?;
        let directory = Arc::new(Directory::new(table, here.memory.layout()));
        let slice_bytes = self.workshop.slice_bytes();
        (0..channels)
            .map(|channel| -> Result<Box<dyn PageSender>, TransportError> {
                let preamble = preamble(Purpose::Pages { channel });
                let outlet = self.workshop.dial_outlet(&preamble, RemoteAccess::Nothing)?;
                let (here, directory) = (Arc::clone(here), Arc::clone(&directory));
                let sender =
                    RdmaPageSender::new(outlet, here, directory, CAPABILITIES, slice_bytes);
                Ok(Box::new(sender))
            })
            .collect()
    }

    fn dial_grant(&self, registered: Arc<Registered>) -> Result<RdmaReadGrant, TransportError> {
        // The destination may ask for any page.
        registered.all_now()?;
        let preamble = self.workshop.preamble(Purpose::Reads, self.migration);
        let mut outlet = self.workshop.dial_outlet(&preamble, RemoteAccess::Read)?;
        tell_all(&mut outlet, &registered)?;
        Ok(RdmaReadGrant::new(outlet, registered))
    }

    fn registered(&self) -> Result<Arc<Registered>, TransportError> {
        let missing = TransportError::OutOfOrder("guest memory is not registered");
        self.registered.clone().ok_or(missing)
    }
}

impl Link for RdmaSourceLink {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        CAPABILITIES
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.workshop.state.check()?;
        self.control.take().ok_or(TransportError::OutOfOrder("the control channel was taken"))
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        let (registered, cost) = self.workshop.register(memory, Access::RemoteRead)?;
        self.registered = Some(registered);
        Ok(cost)
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.workshop.state) as Arc<dyn Interrupt>
    }
}

impl SourceLink for RdmaSourceLink {
    fn open_senders(&mut self, channels: u16) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
        self.workshop.state.check()?;
        let here = self.registered()?;
        if self.opened {
            return Err(TransportError::OutOfOrder("data channels are open"));
        }
        let senders = self.explained(self.dial_senders(&here, channels))?;
        self.opened = true;
        Ok(senders)
    }

    fn grant_reads(&mut self) -> Result<Box<dyn ReadGrant>, TransportError> {
        self.workshop.state.check()?;
        let registered = self.registered()?;
        Ok(Box::new(self.explained(self.dial_grant(registered))?))
    }
}
