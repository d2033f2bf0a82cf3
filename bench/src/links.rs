//! Links between processes of this host.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use pageferry::transport::{
    Admission, Capabilities, DestinationLink, Interrupt, LinkPurpose, MAX_BATCH_RUNS, SourceLink,
};
use pageferry_cli::outcome::Failure;
#[cfg(not(feature = "rdma"))]
use pageferry_cli::transport::WITHOUT_RDMA;
use pageferry_cli::transport::{self, Acceptor, Chosen, ZeroCopyChoice};
#[cfg(feature = "rdma")]
use pageferry_rdma::{RdmaOptions, RegistrationMode};
use pageferry_tcp::{Identity, Material, Security, TcpOptions, Tls};
use serde::{Deserialize, Serialize};

#[cfg(feature = "rdma")]
use crate::words::RdmaRegistration;
use crate::words::{RdmaArgs, Transport};

/// Where both sides are, but for RDMA.
pub(crate) const HERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// What both sides have where they encrypt: nothing that is measured is secret.
const KEY: [u8; 32] = [b'k'; 32];

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

impl Way {
    /// Ready to make links: any source is a destination's, whatever it says first.
    fn choose(self, zero_copy: ZeroCopyChoice) -> Result<Chosen, Failure> {
        if self.transport == Transport::Rdma {
            return rdma(self.rdma);
        }
        let (admission, zero_copy) = (Admission::Anyone, zero_copy.into());
        let security = self.transport.kernel_tls().map_or_else(Security::default, |kernel| {
            Security::Tls(Tls { kernel, ..Tls::new(Identity::SharedKey(Material::bytes(KEY))) })
        });
        let tcp = TcpOptions { admission, zero_copy, security, ..TcpOptions::default() };
        let transport = transport::Transport::from(self.transport);
        Ok(transport.choose(tcp, &transport::RdmaArgs::default())?)
    }
}

/// Where a destination listens.
#[derive(Debug)]
pub(crate) struct Listener {
    chosen: Chosen,
    acceptor: Acceptor,
}

impl Listener {
    pub(crate) fn bind(way: Way) -> Result<Self, Failure> {
        let chosen = way.choose(ZeroCopyChoice::Auto)?;
        let address = match way.transport {
            Transport::Rdma => SocketAddr::new(rdma_address(way.rdma)?, 0),
            _ => HERE,
        };
        let acceptor = chosen.listen(&address.to_string())?;
        Ok(Self { chosen, acceptor })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.acceptor.local_addr()
    }

    /// Waits for a source.
    pub(crate) fn accept(self) -> Result<Box<dyn DestinationLink>, Failure> {
        let (_, link) = self.chosen.accept(&self.acceptor)?;
        Ok(link)
    }
}

/// Connects to where a destination listens.
pub(crate) fn connect(
    way: Way,
    zero_copy: ZeroCopyChoice,
    address: SocketAddr,
) -> Result<Box<dyn SourceLink>, Failure> {
    Ok(way.choose(zero_copy)?.dialler(&address.to_string()).connect(LinkPurpose::Begin)?)
}

#[cfg(feature = "rdma")]
#[expect(clippy::unnecessary_wraps, reason = "without RDMA it fails")]
fn rdma(args: RdmaArgs) -> Result<Chosen, Failure> {
    Ok(Chosen::Rdma(rdma_options(args)))
}

#[cfg(not(feature = "rdma"))]
fn rdma(_: RdmaArgs) -> Result<Chosen, Failure> {
    Err(WITHOUT_RDMA.into())
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
pub(crate) fn rdma_address(args: RdmaArgs) -> Result<IpAddr, Failure> {
    if let Some(address) = args.rdma_address {
        return Ok(address);
    }
    let any = transport::RdmaArgs::default();
    let first = transport::Transport::Rdma.address_here(&any)?;
    Ok(first.parse::<SocketAddr>()?.ip())
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

/// Of a sender that moves nothing; batches as the engine has them.
pub(crate) const NOWHERE: Capabilities = Capabilities {
    one_sided_write: false,
    one_sided_read: false,
    zero_copy: false,
    needs_registration: false,
    protects_pages: true,
    tells_landings: false,
    max_batch_bytes: 4 << 20,
    max_batch_runs: MAX_BATCH_RUNS,
};

/// What interrupts a sender that never waits.
pub(crate) struct Nobody;

impl Interrupt for Nobody {
    fn interrupt(&self) {}
}
