//! Links between processes of this host. A transport of another kind is one more arm here.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use pageferry::transport::{DestinationLink, SourceLink};
use pageferry_iouring::{IoUringOptions, Rings};
use pageferry_tcp::{TcpAcceptor, TcpOptions, connect as connect_tcp};

use crate::args::{Transport, ZeroCopyChoice};
use crate::outcome::Failure;

const HERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Where a destination listens.
#[derive(Debug)]
pub(crate) struct Listener {
    transport: Transport,
    acceptor: TcpAcceptor,
}

impl Listener {
    pub(crate) fn bind(transport: Transport) -> Result<Self, Failure> {
        Ok(Self { transport, acceptor: TcpAcceptor::bind(HERE, TcpOptions::default())? })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.acceptor.local_addr()
    }

    /// Waits for a source.
    pub(crate) fn accept(self) -> Result<Box<dyn DestinationLink>, Failure> {
        let link = self.acceptor.accept(None)?;
        Ok(match self.transport {
            Transport::Tcp => Box::new(link),
            Transport::IoUring => {
                Box::new(Rings::new(IoUringOptions::default())?.destination_link(link))
            }
        })
    }
}

/// Connects to where a destination listens.
pub(crate) fn connect(
    transport: Transport,
    zero_copy: ZeroCopyChoice,
    address: SocketAddr,
) -> Result<Box<dyn SourceLink>, Failure> {
    let zero_copy = zero_copy.into();
    let link = connect_tcp(address, TcpOptions { zero_copy, ..TcpOptions::default() })?;
    Ok(match transport {
        Transport::Tcp => Box::new(link),
        Transport::IoUring => {
            let options = IoUringOptions { zero_copy, ..IoUringOptions::default() };
            Box::new(Rings::new(options)?.source_link(link))
        }
    })
}
