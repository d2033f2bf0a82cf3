//! The destination's end of a link.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pageferry::memory::GuestMemory;
use pageferry::transport::{
    Capabilities, ControlChannel, DestinationLink, Interrupt, Link, LinkId, PageReceiver, ReadLane,
    Registration, Returning, TransportError,
};
use pageferry_tcp::TcpDestinationLink;

use crate::end::{End, Registered};
use crate::receiver::IoUringPageReceiver;
use crate::rings::Rings;
use crate::{CAPABILITIES, NAME};

/// The destination's end of a link whose pages go through io_uring. Made by
/// [`Rings::destination_link`].
///
/// # Resource cleanup
///
/// Dropping it revokes the registration of guest memory and closes all connections, as
/// [`TcpDestinationLink`] does.
#[derive(Debug)]
pub struct IoUringDestinationLink(End<TcpDestinationLink>);

impl Rings {
    /// Has io_uring place the pages of an accepted link. The other end may be of either sort.
    pub fn destination_link(&self, tcp: TcpDestinationLink) -> IoUringDestinationLink {
        IoUringDestinationLink(End::new(tcp, self.clone()))
    }
}

impl IoUringDestinationLink {
    /// The migration, as the acceptor's logs call it.
    pub fn link_id(&self) -> LinkId {
        self.0.tcp.link_id()
    }

    /// The source's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.0.tcp.peer_addr()
    }
}

impl Link for IoUringDestinationLink {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        let needs_registration = self.0.rings.options().register_destination;
        let protects_pages = self.0.tcp.capabilities().protects_pages;
        Capabilities { needs_registration, protects_pages, ..CAPABILITIES }
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.0.tcp.control()
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        // Also for the case that there is no ring for a channel. First, since the source keeps its
        // place from here on, however long it takes to pin memory.
        self.0.tcp.register(memory)?;
        let (table, cost) = if self.0.rings.options().register_destination {
            self.0.rings.register(memory, || self.0.tcp.check())?
        } else {
            (None, Registration::default())
        };
        self.0.register(memory, table);
        Ok(cost)
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.0.tcp.interrupter()
    }
}

impl DestinationLink for IoUringDestinationLink {
    fn expect_return(&mut self, returning: Returning) {
        self.0.tcp.expect_return(returning);
    }

    fn open_receivers(
        &mut self,
        channels: u16,
        timeout: Duration,
    ) -> Result<Vec<Box<dyn PageReceiver>>, TransportError> {
        self.0.tcp.check()?;
        let Registered { memory, .. } = self.0.registered()?;
        // No request of a receiver names a registered buffer: its ring needs no table.
        let in_process = self.0.tcp.encrypts_in_process();
        let Some(rings) =
            self.0.rings.for_channels(channels, None, in_process, || self.0.tcp.check())?
        else {
            return self.0.tcp.open_receivers(channels, timeout);
        };
        let sockets = self.0.tcp.open_sockets(channels, timeout)?;
        sockets
            .into_iter()
            .zip(rings)
            .map(|(socket, ring)| {
                let receiver = IoUringPageReceiver::new(socket, Arc::clone(&memory), ring);
                Ok(Box::new(receiver) as Box<dyn PageReceiver>)
            })
            .collect()
    }

    fn open_readers(
        &mut self,
        lanes: u16,
        into: &Arc<GuestMemory>,
        timeout: Duration,
    ) -> Result<Vec<ReadLane>, TransportError> {
        // As at the source.
        self.0.tcp.open_readers(lanes, into, timeout)
    }
}
