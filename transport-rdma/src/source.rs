//! The source's end of a link.

use std::net::SocketAddr;
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use pageferry::transport::ways::Way;
use pageferry::transport::{
    Capabilities, ControlChannel, Interrupt, Link, LinkId, PageSender, PageServer, Registration,
    SourceLink, TransportError,
};

use crate::announce::tell_all;
use crate::cm::RemoteAccess;
use crate::dial::Connected;
use crate::end::End;
use crate::inbox::Inbox;
use crate::kept::Kept;
use crate::lanes::RdmaPageServer;
use crate::memory::Registered;
use crate::options::Mtu;
use crate::preamble::Purpose;
use crate::rails::{Beside, dial_senders};
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
    /// Beside the one of the control connections, and what came of those that were looked for.
    ways: Vec<Way>,
    rails: Vec<Beside>,
}

impl RdmaSourceLink {
    /// Of a destination that has let in the first control connection; data channels go by these ways too, as far as there are
    /// some.
    pub(crate) fn new(connected: Connected, ways: Vec<Way>) -> Result<Self, TransportError> {
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
        let end = End::new(migration, control, mtu, workshop);
        Ok(Self { inbox, end, ways, rails: Vec::new() })
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

fn dial_lane(
    end: &End,
    registered: &Arc<Registered>,
    lane: u16,
) -> Result<Box<dyn PageServer>, TransportError> {
    let preamble = end.workshop.preamble(Purpose::Lane { lane }, end.migration);
    let mut outlet = end.workshop.dial_outlet(&preamble, RemoteAccess::Read)?;
    tell_all(&mut outlet, registered)?;
    Ok(Box::new(RdmaPageServer::new(outlet, Arc::clone(registered))))
}

impl Link for RdmaSourceLink {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        // A NIC has its own checksum of each packet, and nothing makes sure of what lies between NIC and memory.
        // Where other ways lead is not known before they are looked for.
        let within_host = self.end.workshop.within_host && self.ways.is_empty();
        Capabilities { protects_pages: within_host, ..CAPABILITIES }
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.end.control()
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        let mut cost = self.end.register(memory, Access::RemoteRead)?;
        let (rails, beside) = Beside::find_all(&self.end, &self.ways, memory)?;
        self.rails = rails;
        cost.add(&beside);
        Ok(cost)
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.end.interrupter()
    }
}

impl SourceLink for RdmaSourceLink {
    fn open_senders(&mut self, channels: u16) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
        let Self { inbox, end, rails, .. } = self;
        end.open(|end, here| {
            // Whoever is turned away meanwhile has no migration there, and is told that for each of them.
            dial_senders(end, here, rails, channels).map_err(|error| inbox.explain(error))
        })
    }

    fn serve_reads(&mut self, lanes: u16) -> Result<Vec<Box<dyn PageServer>>, TransportError> {
        let Self { inbox, end, .. } = self;
        let registered = end.open_reads()?;
        // The destination may ask for any page.
        registered.all_now()?;
        let dial = |lane| dial_lane(end, &registered, lane);
        let dialled: Result<_, _> = (0..lanes).map(dial).collect();
        dialled.map_err(|error| inbox.explain(error))
    }
}
