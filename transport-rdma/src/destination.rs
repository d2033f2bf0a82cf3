//! The destination's end of a link, and where it comes from.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::memory::GuestMemory;
use pageferry::transport::{
    Capabilities, ControlChannel, DestinationLink, Interrupt, Link, MigrationId, PageReader,
    PageReceiver, Registration, TransportError,
};

use crate::announce::{Announcer, hear_all};
use crate::cm::RemoteAccess;
use crate::control::{RdmaControlReceiver, RdmaControlSender};
use crate::dial::{Workshop, check_device};
use crate::listener::{Listener, Request};
use crate::memory::Registered;
use crate::options::RdmaOptions;
use crate::preamble::{Preamble, Purpose};
use crate::reader::RdmaPageReader;
use crate::receiver::RdmaPageReceiver;
use crate::state::LinkState;
use crate::verbs::Access;
use crate::{CAPABILITIES, NAME, check_libraries, first_of};

/// Listens at an RDMA device's address for sources.
///
/// # Thread safety
///
/// May be shared; each source is accepted once.
#[derive(Debug)]
pub struct RdmaAcceptor {
    listener: Arc<Listener>,
    options: RdmaOptions,
    state: Arc<LinkState>,
}

impl RdmaAcceptor {
    /// Listens; a port of 0 lets the kernel choose one.
    pub fn bind(address: impl ToSocketAddrs, options: RdmaOptions) -> Result<Self, TransportError> {
        let unknown = |cause| TransportError::Listen { address: String::from("?"), cause };
        let address = first_of(address).map_err(unknown)?;
        let failed = |cause| TransportError::Listen { address: address.to_string(), cause };
        check_libraries().map_err(|unavailable| failed(unavailable.into()))?;
        check_device(&options, &address.to_string())?;
        let listener = Listener::bind(address).map_err(failed)?;
        let state = LinkState::new().map_err(failed)?;
        Ok(Self { listener: Arc::new(listener), options, state })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.listener.local
    }

    /// Ends [`Self::accept`], now and later. Links that were accepted go on.
    pub fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.state) as Arc<dyn Interrupt>
    }

    /// Waits for a source, at most `timeout` (`None`: for as long as it takes).
    pub fn accept(&self, timeout: Option<Duration>) -> Result<RdmaDestinationLink, TransportError> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let begins = |preamble: &Preamble| preamble.purpose == Purpose::Control;
        match self.listener.take(begins, deadline, &self.state)? {
            Some(request) => self.link(request),
            None => Err(TransportError::TimedOut {
                operation: "accept a source",
                after: timeout.unwrap_or_default(),
            }),
        }
    }

    fn link(&self, request: Request) -> Result<RdmaDestinationLink, TransportError> {
        let peer = request.id.peer().unwrap_or(self.listener.local);
        let failed = |cause| TransportError::Connect { address: peer.to_string(), cause };
        let state = LinkState::new().map_err(failed)?;
        let migration = request.preamble.migration;
        let workshop = Workshop::at(&request.id, peer, self.options.clone(), state)?;
        let inlet = workshop.accept_inlet(request, RemoteAccess::Nothing)?;
        let back = RdmaDestinationLink::take(
            &self.listener,
            &workshop,
            migration,
            |purpose| purpose == Purpose::ControlBack,
            workshop.options.connect_timeout,
        )?;
        let outlet = workshop.accept_outlet(back)?;
        self.listener.expect(migration);
        let control = ControlChannel {
            sender: Box::new(RdmaControlSender::new(outlet)),
            receiver: Box::new(RdmaControlReceiver::new(inlet)),
        };
        Ok(RdmaDestinationLink {
            control: Some(control),
            registered: None,
            migration,
            workshop,
            listener: Arc::clone(&self.listener),
        })
    }
}

/// The destination's end of a link over RDMA.
///
/// # Resource cleanup
///
/// Dropping it, after its channels, ends the registration of guest memory: from then on the source
/// cannot write to it, whatever it knows.
#[derive(Debug)]
pub struct RdmaDestinationLink {
    control: Option<ControlChannel>,
    registered: Option<Arc<Registered>>,
    migration: MigrationId,
    workshop: Workshop,
    listener: Arc<Listener>,
}

impl RdmaDestinationLink {
    /// What this migration is called on the wire.
    pub fn migration_id(&self) -> MigrationId {
        self.migration
    }

    /// The source's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.workshop.peer
    }

    fn take(
        listener: &Listener,
        workshop: &Workshop,
        migration: MigrationId,
        wanted: impl Fn(Purpose) -> bool,
        timeout: Duration,
    ) -> Result<Request, TransportError> {
        let is_wanted =
            |preamble: &Preamble| preamble.migration == migration && wanted(preamble.purpose);
        let deadline = Instant::now().checked_add(timeout);
        let found = listener.take(is_wanted, deadline, &workshop.state)?;
        let operation = "accept the source's connections";
        found.ok_or(TransportError::TimedOut { operation, after: timeout })
    }

    /// Takes this link's own.
    fn take_own(&self, wanted: Purpose, timeout: Duration) -> Result<Request, TransportError> {
        let wanted = |purpose| purpose == wanted;
        Self::take(&self.listener, &self.workshop, self.migration, wanted, timeout)
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
        let outlet = self.workshop.accept_outlet(self.take_own(Purpose::Table, timeout)?)?;
        let announcer = Arc::new(Announcer::new(outlet, Arc::clone(&registered)));
        announcer.announce()?;
        (0..channels)
            .map(|channel| -> Result<Box<dyn PageReceiver>, TransportError> {
                let request = self.take_own(Purpose::Pages { channel }, timeout)?;
                let inlet = self.workshop.accept_inlet(request, RemoteAccess::Write)?;
                let (registered, announcer) = (Arc::clone(&registered), Arc::clone(&announcer));
                Ok(Box::new(RdmaPageReceiver::new(inlet, registered, announcer)))
            })
            .collect()
    }

    fn open_reader(&mut self, timeout: Duration) -> Result<Box<dyn PageReader>, TransportError> {
        let here = self.registered()?;
        let request = self.take_own(Purpose::Reads, timeout)?;
        let mut inlet = self.workshop.accept_inlet(request, RemoteAccess::Nothing)?;
        let there = hear_all(&mut inlet, here.memory.layout(), timeout)?;
        let slice_bytes = self.workshop.slice_bytes();
        Ok(Box::new(RdmaPageReader::new(inlet, here, there, slice_bytes)))
    }
}

impl Drop for RdmaDestinationLink {
    fn drop(&mut self) {
        self.listener.forget(self.migration);
    }
}
