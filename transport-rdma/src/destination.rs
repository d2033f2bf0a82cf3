//! The destination's end of a link.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::memory::GuestMemory;
use pageferry::transport::{
    Capabilities, ControlChannel, DestinationLink, Interrupt, Link, MigrationId, PageReader,
    PageReceiver, Registration, TransportError,
};

use crate::announce::{Announcer, hear_all};
use crate::cm::RemoteAccess;
use crate::desk::Desk;
use crate::dial::{Request, Workshop};
use crate::inbox::Inbox;
use crate::memory::Registered;
use crate::options::Mtu;
use crate::preamble::Purpose;
use crate::reader::RdmaPageReader;
use crate::receiver::RdmaPageReceiver;
use crate::reception::Arrival;
use crate::verbs::Access;
use crate::{CAPABILITIES, NAME, control};

/// The destination's end of a link over RDMA.
///
/// # Resource cleanup
///
/// Dropping it, after its channels, ends the registration of guest memory: from then on the source
/// cannot write to it, whatever it knows; and the acceptor takes the next source. It keeps the acceptor's
/// thread and port alive even if the acceptor was dropped.
#[derive(Debug)]
pub struct RdmaDestinationLink {
    control: Option<ControlChannel>,
    registered: Option<Arc<Registered>>,
    /// Whether data channels were opened: once.
    opened: bool,
    migration: MigrationId,
    mtu: u32,
    pub(crate) workshop: Workshop,
    desk: Arc<Desk>,
}

impl RdmaDestinationLink {
    /// Of a source whose control connections are there.
    pub(crate) fn new(arrival: Arrival, desk: Arc<Desk>) -> Result<Self, TransportError> {
        let Arrival { migration, inlet, outlet, greeting, standing, workshop, .. } = arrival;
        let outlet = outlet.ok_or(TransportError::OutOfOrder("half of a control channel"))?;
        let mtu = inlet.connection.mtu;
        workshop.state.take_place(standing);
        let control = Some(control::channel(outlet, &Inbox::at_destination(inlet, greeting)?));
        Ok(Self { control, registered: None, opened: false, migration, mtu, workshop, desk })
    }

    /// The path MTU that both sides have agreed on, of the control connection.
    pub fn path_mtu(&self) -> Mtu {
        Mtu::decoded(self.mtu)
    }

    /// What this migration is called on the wire.
    pub fn migration_id(&self) -> MigrationId {
        self.migration
    }

    /// The source's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.workshop.peer
    }

    /// Takes a connection of this link's.
    fn take(
        &self,
        wanted: Purpose,
        deadline: Option<Instant>,
        timeout: Duration,
    ) -> Result<Request, TransportError> {
        let found = self.desk.board().take(wanted, deadline, &self.workshop.state)?;
        let operation = "accept the source's connections";
        found.ok_or(TransportError::TimedOut { operation, after: timeout })
    }

    fn registered(&self) -> Result<Arc<Registered>, TransportError> {
        let missing = TransportError::OutOfOrder("guest memory is not registered");
        self.registered.clone().ok_or(missing)
    }
}

impl Link for RdmaDestinationLink {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        CAPABILITIES
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.control.take().ok_or(TransportError::OutOfOrder("the control channel was taken"))
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        // However long that takes.
        self.workshop.state.settle();
        let (registered, cost) = self.workshop.register(memory, Access::RemoteWrite)?;
        self.registered = Some(registered);
        Ok(cost)
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.workshop.state) as Arc<dyn Interrupt>
    }
}

impl DestinationLink for RdmaDestinationLink {
    fn open_receivers(
        &mut self,
        channels: u16,
        timeout: Duration,
    ) -> Result<Vec<Box<dyn PageReceiver>>, TransportError> {
        let registered = self.registered()?;
        if self.opened {
            return Err(TransportError::OutOfOrder("data channels are open"));
        }
        for beyond in self.desk.board().set_channels(channels) {
            let what = format!("there are only {channels} data channels");
            tracing::warn!(peer = ?beyond.id.peer(), "refused a connection: {what}");
            beyond.id.reject(what.as_bytes());
        }
        let deadline = Instant::now().checked_add(timeout);
        let table = self.take(Purpose::Table, deadline, timeout)?;
        let outlet = self.workshop.accept_outlet(table)?;
        let announcer = Arc::new(Announcer::new(outlet, Arc::clone(&registered)));
        announcer.announce()?;
        let receivers = (0..channels)
            .map(|channel| -> Result<Box<dyn PageReceiver>, TransportError> {
                let request = self.take(Purpose::Pages { channel }, deadline, timeout)?;
                let inlet = self.workshop.accept_inlet(request, RemoteAccess::Write)?;
                let (registered, announcer) = (Arc::clone(&registered), Arc::clone(&announcer));
                Ok(Box::new(RdmaPageReceiver::new(inlet, registered, announcer)))
            })
            .collect::<Result<_, _>>()?;
        self.opened = true;
        Ok(receivers)
    }

    fn open_reader(&mut self, timeout: Duration) -> Result<Box<dyn PageReader>, TransportError> {
        let here = self.registered()?;
        let deadline = Instant::now().checked_add(timeout);
        let request = self.take(Purpose::Reads, deadline, timeout)?;
        let mut inlet = self.workshop.accept_inlet(request, RemoteAccess::Nothing)?;
        let there = hear_all(&mut inlet, here.memory.layout(), timeout)?;
        let slice_bytes = self.workshop.slice_bytes();
        Ok(Box::new(RdmaPageReader::new(inlet, here, there, slice_bytes)))
    }
}

impl Drop for RdmaDestinationLink {
    fn drop(&mut self) {
        self.desk.board().end_migration();
    }
}
