//! The source's end of a link.

use std::net::SocketAddr;
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use pageferry::transport::{
    Capabilities, ControlChannel, Interrupt, Link, LinkId, PageSender, ReadGrant, Registration,
    SourceLink, TransportError,
};

use crate::announce::{Directory, tell_all};
use crate::cm::RemoteAccess;
use crate::dial::Connected;
use crate::end::End;
use crate::inbox::Inbox;
use crate::kept::Kept;
use crate::memory::Registered;
use crate::options::Mtu;
use crate::preamble::Purpose;
use crate::reader::RdmaReadGrant;
use crate::sender::RdmaPageSender;
use crate::verbs::Access;
use crate::{CAPABILITIES, NAME, after, control};

/// The source's end of a link over RDMA.
///
/// # Resource cleanup
///
/// Dropping it, after its channels, ends the registration of guest memory, unless that is for all links of an
/// [`RdmaDialler`](crate::RdmaDialler); nothing else stays behind in the device but what the kernel keeps of a closed
/// connection for a while (`TIMEWAIT`).
#[derive(Debug)]
pub struct RdmaSourceLink {
    inbox: Arc<Inbox>,
    pub(crate) end: End,
}

impl RdmaSourceLink {
    /// Of a destination that has let in the first control connection.
    pub(crate) fn new(connected: Connected) -> Result<Self, TransportError> {
        let Connected { mut workshop, migration, mut outlet, seal } = connected;
        workshop.watch(&outlet.connection.id)?;
        let say = workshop.preamble(Purpose::ControlBack, migration);
        let mut inlet = workshop.dial_inlet(&say)?;
        if let Some(seal) = &seal {
            let deadline = after(workshop.options.connect_timeout);
            control::shake_hands(seal, &mut outlet, &mut inlet, deadline)?;
            workshop.key = Some(seal.key(migration)?);
        }
        let mtu = outlet.connection.mtu;
        let inbox = Inbox::at_source(inlet, seal, workshop.peer)?;
        let control = control::channel(outlet, &inbox);
        Ok(Self { inbox, end: End::new(migration, control, mtu, workshop) })
    }

    /// What this migration is called on the wire.
    pub fn link_id(&self) -> LinkId {
        self.end.migration
    }

    /// Guest memory is registered for all links of a migration.
    pub(crate) fn keep_in(&mut self, kept: &Kept) {
        self.end.keep_in(kept);
    }

    /// The path MTU that both sides have agreed on, of the control connection.
    pub fn path_mtu(&self) -> Mtu {
        self.end.path_mtu()
    }

    /// The destination's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.end.peer_addr()
    }
}

fn dial_senders(
    end: &End,
    here: &Arc<Registered>,
    channels: u16,
) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
    let End { workshop, migration, .. } = end;
    let preamble = |purpose| workshop.preamble(purpose, *migration);
    let table = workshop.dial_inlet(&preamble(Purpose::Table))?;
    let directory = Arc::new(Directory::new(table, here.memory.layout()));
    let slice_bytes = workshop.slice_bytes();
    (0..channels)
        .map(|channel| -> Result<Box<dyn PageSender>, TransportError> {
            let preamble = preamble(Purpose::Pages { channel });
            let outlet = workshop.dial_outlet(&preamble, RemoteAccess::Nothing)?;
            let (here, directory) = (Arc::clone(here), Arc::clone(&directory));
            let sender = RdmaPageSender::new(outlet, here, directory, CAPABILITIES, slice_bytes);
            Ok(Box::new(sender))
        })
        .collect()
}

fn dial_grant(end: &End, registered: Arc<Registered>) -> Result<RdmaReadGrant, TransportError> {
    // The destination may ask for any page.
    registered.all_now()?;
    let preamble = end.workshop.preamble(Purpose::Reads, end.migration);
    let mut outlet = end.workshop.dial_outlet(&preamble, RemoteAccess::Read)?;
    tell_all(&mut outlet, &registered)?;
    Ok(RdmaReadGrant::new(outlet, registered))
}

impl Link for RdmaSourceLink {
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
        self.end.register(memory, Access::RemoteRead)
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.end.interrupter()
    }
}

impl SourceLink for RdmaSourceLink {
    fn open_senders(&mut self, channels: u16) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
        let Self { inbox, end } = self;
        end.open(|end, here| {
            // Whoever is turned away meanwhile has no migration there, and is told that for each of them.
            dial_senders(end, here, channels).map_err(|error| inbox.explain(error))
        })
    }

    fn grant_reads(&mut self) -> Result<Box<dyn ReadGrant>, TransportError> {
        let registered = self.end.registered()?;
        let grant = dial_grant(&self.end, registered);
        Ok(Box::new(grant.map_err(|error| self.inbox.explain(error))?))
    }
}
