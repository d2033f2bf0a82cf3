//! The two ends of a link, by the transport that was asked for.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use pageferry::transport::{DestinationLink, SourceLink};
use pageferry_iouring::{IoUringOptions, Rings};
#[cfg(feature = "rdma")]
use pageferry_rdma::{RdmaAcceptor, RdmaOptions, RegistrationMode};
use pageferry_tcp::{TcpAcceptor, TcpOptions, TcpSourceLink};

use super::wire::Setup;
#[cfg(feature = "rdma")]
use crate::args::RdmaRegistration;
use crate::args::{RdmaArgs, Transport};
use crate::outcome::Failure;

/// Where both sides of the bare loop, and those over sockets, are.
pub(super) const HERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Where a destination listens.
pub(super) enum Acceptor {
    Tcp(TcpAcceptor),
    #[cfg(feature = "rdma")]
    Rdma(RdmaAcceptor),
}

impl Acceptor {
    pub(super) fn bind(setup: &Setup) -> Result<Self, Failure> {
        Ok(match setup.transport {
            Transport::Tcp | Transport::IoUring => {
                Self::Tcp(TcpAcceptor::bind(HERE, TcpOptions::default())?)
            }
            #[cfg(feature = "rdma")]
            Transport::Rdma => {
                let address = setup.rdma.rdma_address.unwrap_or(HERE.ip());
                Self::Rdma(RdmaAcceptor::bind((address, 0), rdma_options(&setup.rdma))?)
            }
            #[cfg(not(feature = "rdma"))]
            Transport::Rdma => return Err(no_rdma()),
        })
    }

    pub(super) fn local_addr(&self) -> SocketAddr {
        match self {
            Self::Tcp(acceptor) => acceptor.local_addr(),
            #[cfg(feature = "rdma")]
            Self::Rdma(acceptor) => acceptor.local_addr(),
        }
    }

    pub(super) fn accept(self, setup: &Setup) -> Result<Box<dyn DestinationLink>, Failure> {
        Ok(match self {
            Self::Tcp(acceptor) if setup.transport == Transport::IoUring => {
                let rings = Rings::new(IoUringOptions::default())?;
                Box::new(rings.destination_link(acceptor.accept(None)?))
            }
            Self::Tcp(acceptor) => Box::new(acceptor.accept(None)?),
            #[cfg(feature = "rdma")]
            Self::Rdma(acceptor) => Box::new(acceptor.accept(None)?),
        })
    }
}

pub(super) fn connect(setup: &Setup, address: SocketAddr) -> Result<Box<dyn SourceLink>, Failure> {
    let zero_copy = setup.zero_copy.into();
    let by_tcp = || -> Result<TcpSourceLink, Failure> {
        Ok(pageferry_tcp::connect(address, TcpOptions { zero_copy, ..TcpOptions::default() })?)
    };
    Ok(match setup.transport {
        Transport::Tcp => Box::new(by_tcp()?),
        Transport::IoUring => {
            let options = IoUringOptions { zero_copy, ..IoUringOptions::default() };
            Box::new(Rings::new(options)?.source_link(by_tcp()?))
        }
        #[cfg(feature = "rdma")]
        Transport::Rdma => Box::new(pageferry_rdma::connect(address, rdma_options(&setup.rdma))?),
        #[cfg(not(feature = "rdma"))]
        Transport::Rdma => return Err(no_rdma()),
    })
}

/// Most bytes of one write.
#[cfg(feature = "rdma")]
pub(super) fn slice_bytes(args: &RdmaArgs) -> u32 {
    rdma_options(args).slice_bytes
}

/// Most bytes of one write; where there is no RDMA nobody gets that far.
#[cfg(not(feature = "rdma"))]
pub(super) fn slice_bytes(args: &RdmaArgs) -> u32 {
    args.rdma_slice.unwrap_or(1)
}

#[cfg(feature = "rdma")]
pub(crate) fn rdma_options(args: &RdmaArgs) -> RdmaOptions {
    let defaults = RdmaOptions::default();
    RdmaOptions {
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
