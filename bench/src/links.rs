//! Links between processes of this host. A transport of another kind is one more arm here.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use pageferry::transport::{Admission, DestinationLink, Interrupt, SourceLink};
use pageferry_cli::outcome::Failure;
use pageferry_iouring::{IoUringOptions, Rings};
#[cfg(feature = "rdma")]
use pageferry_rdma::{RdmaAcceptor, RdmaOptions, RegistrationMode};
use pageferry_tcp::{TcpAcceptor, TcpOptions, TcpSourceLink};
use serde::{Deserialize, Serialize};

#[cfg(feature = "rdma")]
use crate::words::RdmaRegistration;
use crate::words::{RdmaArgs, Transport, ZeroCopyChoice};

/// Where both sides are, but for RDMA.
pub(crate) const HERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// What moves pages, with what both sides must know of it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Way {
    pub(crate) transport: Transport,
    /// For RDMA alone.
    pub(crate) rdma: RdmaArgs,
}

impl From<Transport> for Way {
    fn from(transport: Transport) -> Self {
        Self { transport, rdma: RdmaArgs::default() }
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.transport.fmt(f)
    }
}

/// Where a destination listens.
#[derive(Debug)]
pub(crate) struct Listener {
    transport: Transport,
    acceptor: Acceptor,
}

#[derive(Debug)]
enum Acceptor {
    Tcp(TcpAcceptor),
    #[cfg(feature = "rdma")]
    Rdma(RdmaAcceptor),
}

impl Listener {
    pub(crate) fn bind(way: Way) -> Result<Self, Failure> {
        let transport = way.transport;
        let acceptor = match transport {
            Transport::Tcp | Transport::IoUring => {
                let options = TcpOptions { admission: Admission::Anyone, ..TcpOptions::default() };
                Acceptor::Tcp(TcpAcceptor::bind(HERE, options)?)
            }
            #[cfg(feature = "rdma")]
            Transport::Rdma => {
                let address = rdma_address(way.rdma)?;
                Acceptor::Rdma(RdmaAcceptor::bind((address, 0), rdma_options(way.rdma))?)
            }
            #[cfg(not(feature = "rdma"))]
            Transport::Rdma => return Err(no_rdma()),
        };
        Ok(Self { transport, acceptor })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        match &self.acceptor {
            Acceptor::Tcp(acceptor) => acceptor.local_addr(),
            #[cfg(feature = "rdma")]
            Acceptor::Rdma(acceptor) => acceptor.local_addr(),
        }
    }

    /// Waits for a source.
    pub(crate) fn accept(self) -> Result<Box<dyn DestinationLink>, Failure> {
        Ok(match self.acceptor {
            Acceptor::Tcp(acceptor) if self.transport == Transport::IoUring => {
                let rings = Rings::new(IoUringOptions::default())?;
                Box::new(rings.destination_link(acceptor.accept(None)?))
            }
            Acceptor::Tcp(acceptor) => Box::new(acceptor.accept(None)?),
            #[cfg(feature = "rdma")]
            Acceptor::Rdma(acceptor) => Box::new(acceptor.accept(None)?),
        })
    }
}

/// Connects to where a destination listens.
pub(crate) fn connect(
    way: Way,
    zero_copy: ZeroCopyChoice,
    address: SocketAddr,
) -> Result<Box<dyn SourceLink>, Failure> {
    let zero_copy = zero_copy.into();
    let by_tcp = || -> Result<TcpSourceLink, Failure> {
        Ok(pageferry_tcp::connect(address, TcpOptions { zero_copy, ..TcpOptions::default() })?)
    };
    Ok(match way.transport {
        Transport::Tcp => Box::new(by_tcp()?),
        Transport::IoUring => {
            let options = IoUringOptions { zero_copy, ..IoUringOptions::default() };
            Box::new(Rings::new(options)?.source_link(by_tcp()?))
        }
        #[cfg(feature = "rdma")]
        Transport::Rdma => Box::new(pageferry_rdma::connect(address, rdma_options(way.rdma))?),
        #[cfg(not(feature = "rdma"))]
        Transport::Rdma => return Err(no_rdma()),
    })
}

/// Most bytes of one write.
#[cfg(feature = "rdma")]
pub(crate) fn slice_bytes(args: RdmaArgs) -> u32 {
    rdma_options(args).slice_bytes
}

/// Most bytes of one write; where there is no RDMA nobody gets that far.
#[cfg(not(feature = "rdma"))]
pub(crate) fn slice_bytes(args: RdmaArgs) -> u32 {
    args.rdma_slice.unwrap_or(1)
}

/// The address of an RDMA device where both sides are: the one that was named, or the first there is.
#[cfg(feature = "rdma")]
pub(crate) fn rdma_address(args: RdmaArgs) -> Result<IpAddr, Failure> {
    if let Some(address) = args.rdma_address {
        return Ok(address);
    }
    let first = pageferry_rdma::addresses()?.into_iter().next();
    first.map(|first| first.address).ok_or_else(|| "no RDMA device has an address".into())
}

#[cfg(not(feature = "rdma"))]
pub(crate) fn rdma_address(_: RdmaArgs) -> Result<IpAddr, Failure> {
    Err(no_rdma())
}

#[cfg(feature = "rdma")]
pub(crate) fn rdma_options(args: RdmaArgs) -> RdmaOptions {
    let defaults = RdmaOptions::default();
    RdmaOptions {
        admission: Admission::Anyone,
        slice_bytes: args.rdma_slice.unwrap_or(defaults.slice_bytes),
        registration: match args.rdma_registration {
            RdmaRegistration::AtStart => RegistrationMode::AtStart,
            RdmaRegistration::Ahead => RegistrationMode::Ahead,
        },
        ..defaults
    }
}

#[cfg(not(feature = "rdma"))]
fn no_rdma() -> Failure {
    "this program was built without RDMA".into()
}

/// What interrupts a sender that never waits.
pub(crate) struct Nobody;

impl Interrupt for Nobody {
    fn interrupt(&self) {}
}
