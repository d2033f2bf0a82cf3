//! The source's end of a link.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use pageferry::transport::{
    Capabilities, ControlChannel, Interrupt, Link, LinkId, PageSender, PageServer, Registration,
    SourceLink, TransportError,
};
use pageferry_tcp::{TcpOptions, TcpSourceLink, ZeroCopy};

use crate::end::{End, Registered};
use crate::features::Feature;
use crate::options::IoUringOptions;
use crate::rings::Rings;
use crate::sender::IoUringPageSender;
use crate::{CAPABILITIES, NAME};

/// Connects to a destination that accepts migrations over tcp, whatever moves the pages there.
///
/// Without io_uring this fails before anything is sent; [`Rings::new`] tells beforehand.
pub fn connect(
    addr: impl ToSocketAddrs + fmt::Debug,
    tcp: TcpOptions,
    options: IoUringOptions,
) -> Result<IoUringSourceLink, TransportError> {
    let rings = Rings::new(options).map_err(TransportError::from)?;
    Ok(rings.source_link(pageferry_tcp::connect(addr, tcp)?))
}

/// The source's end of a link whose pages go through io_uring. Made by [`connect()`] or
/// [`Rings::source_link`].
///
/// # Resource cleanup
///
/// Dropping it revokes the registration of guest memory and closes all connections, as
/// [`TcpSourceLink`] does.
#[derive(Debug)]
pub struct IoUringSourceLink(End<TcpSourceLink>);

impl Rings {
    /// Has io_uring move the pages of a connected link. The other end may be of either sort.
    pub fn source_link(&self, tcp: TcpSourceLink) -> IoUringSourceLink {
        IoUringSourceLink(End::new(tcp, self.clone()))
    }
}

impl IoUringSourceLink {
    /// The migration, as the destination's logs call it.
    pub fn link_id(&self) -> LinkId {
        self.0.tcp.link_id()
    }

    /// The destination's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.0.tcp.peer_addr()
    }

    /// Whether any send may be zero-copy.
    fn may_be_zero_copy(&self) -> bool {
        let features = self.0.rings.features();
        match self.0.rings.options().zero_copy {
            ZeroCopy::Off => false,
            // What is encrypted is a copy.
            _ if self.0.tcp.is_encrypted() => false,
            ZeroCopy::On => features.has(Feature::SendZc),
            // `Auto`: only where it can be told whether it pays.
            _ => features.has(Feature::ReportUsage),
        }
    }

    /// Whether memory is registered. That pins all of it, and so allocates what is zero too: only
    /// for who asks for it.
    fn registers(&self) -> bool {
        self.0.rings.options().zero_copy == ZeroCopy::On && self.may_be_zero_copy()
    }
}

impl Link for IoUringSourceLink {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        let (zero_copy, needs_registration) = (self.may_be_zero_copy(), self.registers());
        let protects_pages = self.0.tcp.capabilities().protects_pages;
        Capabilities { zero_copy, needs_registration, protects_pages, ..CAPABILITIES }
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.0.tcp.control()
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        self.0.tcp.check()?;
        let (mut table, mut cost) = if self.registers() {
            self.0.rings.register(memory, || self.0.tcp.check())?
        } else {
            (None, Registration::default())
        };
        if table.take_if(|table| table.starves_sends()).is_some() {
            tracing::info!(
                "guest memory is in huge pages, and zero-copy sends from registered buffers in huge \
                 pages starve: it is not registered, the kernel pins what it sends"
            );
            cost.registered_bytes = 0;
        }
        // For the case that there is no ring for a channel.
        self.0.tcp.register(memory)?;
        self.0.register(memory, table);
        Ok(cost)
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.0.tcp.interrupter()
    }
}

impl SourceLink for IoUringSourceLink {
    fn open_senders(&mut self, channels: u16) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
        self.0.tcp.check()?;
        let Registered { memory, table } = self.0.registered()?;
        if self.0.tcp.is_encrypted() && self.0.rings.options().zero_copy == ZeroCopy::On {
            return Err(TransportError::Unsupported("zero-copy sends where TLS encrypts them"));
        }
        let in_process = self.0.tcp.encrypts_in_process();
        let Some(rings) =
            self.0
                .rings
                .for_channels(channels, table.as_ref(), in_process, || self.0.tcp.check())?
        else {
            return self.0.tcp.open_senders(channels);
        };
        let sockets = self.0.tcp.open_sockets(channels)?;
        sockets
            .into_iter()
            .zip(rings)
            .map(|(socket, ring)| {
                let (memory, table) = (Arc::clone(&memory), table.clone());
                let options = self.0.rings.options();
                let sender = IoUringPageSender::new(socket, memory, table, ring, options);
                Ok(Box::new(sender) as Box<dyn PageSender>)
            })
            .collect()
    }

    fn serve_reads(&mut self, lanes: u16) -> Result<Vec<Box<dyn PageServer>>, TransportError> {
        // Each waits for one answer: there is nothing to gain from a ring.
        self.0.tcp.serve_reads(lanes)
    }
}
