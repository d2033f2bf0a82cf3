//! Several links for one migration, one after the other.

use std::sync::Arc;
use std::time::Duration;

use pageferry::transport::{
    Connector, DestinationLink, Interrupt, LinkPurpose, Rendezvous, SourceLink, TransportError,
};
use pageferry_tcp::{TcpDialler, TcpRendezvous};

use crate::rings::Rings;

/// Dials a destination, as often as its migration loses the link. Made by [`Rings::dialler`].
#[derive(Debug)]
pub struct IoUringDialler {
    rings: Rings,
    tcp: TcpDialler,
}

/// Where the links of one migration come in. Made by [`Rings::rendezvous`].
#[derive(Debug)]
pub struct IoUringRendezvous {
    rings: Rings,
    tcp: TcpRendezvous,
}

impl Rings {
    /// Has io_uring move the pages of all links that are dialled.
    pub fn dialler(&self, tcp: TcpDialler) -> IoUringDialler {
        IoUringDialler { rings: self.clone(), tcp }
    }

    /// Has io_uring move the pages of all links that come in.
    pub fn rendezvous(&self, tcp: TcpRendezvous) -> IoUringRendezvous {
        IoUringRendezvous { rings: self.clone(), tcp }
    }
}

impl Connector for IoUringDialler {
    fn connect(&mut self, _: LinkPurpose) -> Result<Box<dyn SourceLink>, TransportError> {
        Ok(Box::new(self.rings.source_link(self.tcp.dial()?)))
    }

    fn redials(&self) -> bool {
        true
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.tcp.interrupter()
    }
}

impl Rendezvous for IoUringRendezvous {
    fn accept(
        &mut self,
        _: LinkPurpose,
        timeout: Option<Duration>,
    ) -> Result<Box<dyn DestinationLink>, TransportError> {
        Ok(Box::new(self.rings.destination_link(self.tcp.wait(timeout)?)))
    }

    fn waits_again(&self) -> bool {
        true
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.tcp.interrupter()
    }
}
