//! The transport that was chosen, and links by it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use pageferry::transport::{Connector, DestinationLink, Interrupt, Rendezvous, TransportError};
use pageferry_iouring::{IoUringOptions, Rings};
#[cfg(feature = "rdma")]
use pageferry_rdma::{Mtu, RdmaAcceptor, RdmaDialler, RdmaOptions, RegistrationMode};
use pageferry_tcp::{KernelTls, Security, TcpAcceptor, TcpDialler, TcpOptions, Tls};

#[cfg(feature = "rdma")]
use super::RdmaRegistration;
#[cfg(not(feature = "rdma"))]
use super::WITHOUT_RDMA;
use super::{RdmaArgs, Transport};

/// The transport that was chosen, ready to make links.
#[derive(Debug)]
pub enum Chosen {
    /// TCP.
    Tcp(TcpOptions),
    /// TCP by io_uring.
    IoUring(Rings, TcpOptions),
    /// RDMA.
    #[cfg(feature = "rdma")]
    Rdma(RdmaOptions),
}

/// Where a destination listens.
#[derive(Debug)]
pub enum Acceptor {
    /// For TCP, by io_uring or without.
    Tcp(TcpAcceptor),
    /// For RDMA.
    #[cfg(feature = "rdma")]
    Rdma(RdmaAcceptor),
}

/// Somebody who connected, and from where.
pub type Caller = (SocketAddr, Box<dyn DestinationLink>);

impl Transport {
    /// Where a destination on this host can be reached from this host; a port of its choice.
    pub fn address_here(self, rdma: &RdmaArgs) -> Result<String, TransportError> {
        match self.meant(rdma) {
            Self::Rdma => rdma_address(rdma),
            Self::Auto | Self::Tcp | Self::IoUring => Ok("127.0.0.1:0".to_owned()),
        }
    }

    /// Decides; if that is up to this kernel and it has no io_uring, says so on stderr.
    pub fn choose(self, tcp: TcpOptions, rdma: &RdmaArgs) -> Result<Chosen, TransportError> {
        let meant = self.meant(rdma);
        check_security(&tcp)?;
        let in_process = meant != Self::Rdma && encrypts_in_process(&tcp)?;
        let asked_for = match meant {
            Self::Tcp => return Ok(Chosen::Tcp(tcp)),
            Self::Rdma => {
                let TcpOptions { interface, dscp, congestion_control, .. } = &tcp;
                if interface.is_some() || dscp.is_some() || congestion_control.is_some() {
                    return Err(TransportError::Unsupported(
                        "--interface, --dscp or --congestion-control; it has --rdma-device, --rdma-port and \
                         --rdma-traffic-class",
                    ));
                }
                return with_rdma(rdma, tcp.security, tcp.source_addresses);
            }
            Self::IoUring if in_process => {
                return Err(TransportError::Unsupported(
                    "use for io_uring where TLS is in this process: modprobe tls, or --transport tcp",
                ));
            }
            Self::IoUring => true,
            Self::Auto if in_process => return Ok(Chosen::Tcp(tcp)),
            Self::Auto => false,
        };
        // Who did not ask for io_uring goes on without it where there is no room for all channels.
        let options = IoUringOptions {
            zero_copy: tcp.zero_copy,
            require_rings: asked_for,
            ..IoUringOptions::default()
        };
        match Rings::new(options) {
            Ok(rings) => Ok(Chosen::IoUring(rings, tcp)),
            Err(unavailable) if asked_for => Err(unavailable.into()),
            Err(unavailable) => {
                say!("no io_uring: {unavailable}; tcp instead");
                Ok(Chosen::Tcp(tcp))
            }
        }
    }
}

fn unusable(reason: String) -> TransportError {
    TransportError::Security { address: "the other side".to_owned(), reason }
}

/// Before a key is in it. What is left of a core dump is where the threads were and which files are mapped where: bit 4
/// alone (core(5)).
fn keep_memory_out_of_core_dumps() {
    if let Err(error) = std::fs::write("/proc/self/coredump_filter", "0x10") {
        tracing::warn!(%error, "a core dump of this process would have its keys in it");
    }
}

/// Fails where what TLS needs is not there.
fn check_security(tcp: &TcpOptions) -> Result<(), TransportError> {
    let Security::Tls(tls) = &tcp.security else { return Ok(()) };
    keep_memory_out_of_core_dumps();
    tls.check().map_err(unusable)
}

/// Whether TLS of sockets will be in this process, which is said on stderr if it is for want of something.
fn encrypts_in_process(tcp: &TcpOptions) -> Result<bool, TransportError> {
    let Security::Tls(Tls { kernel, .. }) = &tcp.security else { return Ok(false) };
    match (kernel, pageferry_tcp::kernel_tls_unavailable()) {
        (KernelTls::On, Some(why)) => Err(unusable(why.to_owned())),
        (KernelTls::Auto, Some(why)) => {
            say!("{why}; pages are encrypted in this process, with a copy of each");
            Ok(true)
        }
        (kernel, _) => Ok(*kernel == KernelTls::Off),
    }
}

#[cfg(feature = "rdma")]
fn with_rdma(
    args: &RdmaArgs,
    security: Security,
    source_addresses: Vec<IpAddr>,
) -> Result<Chosen, TransportError> {
    match &security {
        Security::Tls(tls) if tls.kernel != KernelTls::Auto => {
            return Err(TransportError::Unsupported("use for --kernel-tls: it encrypts no pages"));
        }
        Security::Tls(_) if args.plaintext_data => {
            say!(
                "rdma encrypts no pages: whoever is on the way can read the guest's memory, and change it"
            );
        }
        Security::WithinHost | Security::PlainText if args.plaintext_data => {
            return Err(TransportError::Unsupported(
                "use for --plaintext-data without --shared-key or certificates; --insecure does without both",
            ));
        }
        _ => {}
    }
    pageferry_rdma::available().map_err(|unavailable| TransportError::Io {
        operation: "use RDMA",
        cause: unavailable.into(),
    })?;
    let mtu = args
        .rdma_mtu
        .as_ref()
        .and_then(|wanted| Mtu::ALL.into_iter().find(|mtu| mtu.bytes().to_string() == *wanted));
    let defaults = RdmaOptions::default();
    let registration = args.rdma_registration.map_or(defaults.registration, |mode| match mode {
        RdmaRegistration::AtStart => RegistrationMode::AtStart,
        RdmaRegistration::Ahead => RegistrationMode::Ahead,
    });
    Ok(Chosen::Rdma(RdmaOptions {
        device: args.rdma_device.clone(),
        port: args.rdma_port,
        source_addresses,
        gid_index: args.rdma_gid_index,
        mtu,
        traffic_class: args.rdma_traffic_class,
        registration,
        ack_timeout: args.rdma_ack_timeout.unwrap_or(defaults.ack_timeout),
        retries: args.rdma_retries.unwrap_or(defaults.retries),
        security,
        plain_text_pages: args.plaintext_data,
        ..defaults
    }))
}

/// The first address of an RDMA device that is as asked for.
#[cfg(feature = "rdma")]
fn rdma_address(args: &RdmaArgs) -> Result<String, TransportError> {
    let failed = |cause| TransportError::Io { operation: "use RDMA", cause };
    let found = pageferry_rdma::addresses().map_err(|unavailable| failed(unavailable.into()))?;
    let fits = |found: &&pageferry_rdma::DeviceAddress| {
        args.rdma_device.as_ref().is_none_or(|device| *device == found.device)
            && args.rdma_port.is_none_or(|port| port == found.port)
    };
    if let Some(found) = found.iter().find(fits) {
        return Ok(SocketAddr::new(found.address, 0).to_string());
    }
    let list = found.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let there = if found.is_empty() { String::new() } else { format!("; there are: {list}") };
    let what = format!("no RDMA device that is asked for has an address{there}");
    Err(failed(std::io::Error::other(what)))
}

#[cfg(not(feature = "rdma"))]
fn rdma_address(args: &RdmaArgs) -> Result<String, TransportError> {
    with_rdma(args, Security::default(), Vec::new()).map(|_| String::new())
}

#[cfg(not(feature = "rdma"))]
fn with_rdma(_: &RdmaArgs, _: Security, _: Vec<IpAddr>) -> Result<Chosen, TransportError> {
    let cause = std::io::Error::other(WITHOUT_RDMA);
    Err(TransportError::Io { operation: "use RDMA", cause })
}

impl Chosen {
    /// As the command line has it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Tcp(_) => "tcp",
            Self::IoUring(..) => "iouring",
            #[cfg(feature = "rdma")]
            Self::Rdma(_) => "rdma",
        }
    }

    /// What makes links to a destination, as often as its migration needs one.
    pub fn dialler(&self, address: &str) -> Box<dyn Connector> {
        match self {
            Self::Tcp(options) => Box::new(TcpDialler::new(address, options.clone())),
            Self::IoUring(rings, options) => {
                Box::new(rings.dialler(TcpDialler::new(address, options.clone())))
            }
            #[cfg(feature = "rdma")]
            Self::Rdma(options) => Box::new(RdmaDialler::new(address, options.clone())),
        }
    }

    /// What waits for the links of one migration.
    pub fn rendezvous(&self, acceptor: &Acceptor) -> Box<dyn Rendezvous> {
        match acceptor {
            Acceptor::Tcp(acceptor) => {
                if let Self::IoUring(rings, _) = self {
                    Box::new(rings.rendezvous(acceptor.rendezvous()))
                } else {
                    Box::new(acceptor.rendezvous())
                }
            }
            #[cfg(feature = "rdma")]
            Acceptor::Rdma(acceptor) => Box::new(acceptor.rendezvous()),
        }
    }

    /// Listens for sources.
    pub fn listen(&self, address: &str) -> Result<Acceptor, TransportError> {
        Ok(match self {
            Self::Tcp(options) | Self::IoUring(_, options) => {
                Acceptor::Tcp(TcpAcceptor::bind(address, options.clone())?)
            }
            #[cfg(feature = "rdma")]
            Self::Rdma(options) => Acceptor::Rdma(RdmaAcceptor::bind(address, options.clone())?),
        })
    }

    /// Waits for a source; says where it is.
    pub fn accept(&self, acceptor: &Acceptor) -> Result<Caller, TransportError> {
        Ok(match acceptor {
            Acceptor::Tcp(acceptor) => {
                let link = acceptor.accept(None)?;
                let peer = link.peer_addr();
                if let Self::IoUring(rings, _) = self {
                    (peer, Box::new(rings.destination_link(link)))
                } else {
                    (peer, Box::new(link))
                }
            }
            #[cfg(feature = "rdma")]
            Acceptor::Rdma(acceptor) => {
                let link = acceptor.accept(None)?;
                (link.peer_addr(), Box::new(link))
            }
        })
    }
}

impl Acceptor {
    /// Where.
    pub fn local_addr(&self) -> SocketAddr {
        match self {
            Self::Tcp(acceptor) => acceptor.local_addr(),
            #[cfg(feature = "rdma")]
            Self::Rdma(acceptor) => acceptor.local_addr(),
        }
    }

    /// Ends the wait for a source.
    pub fn interrupter(&self) -> Arc<dyn Interrupt> {
        match self {
            Self::Tcp(acceptor) => acceptor.interrupter(),
            #[cfg(feature = "rdma")]
            Self::Rdma(acceptor) => acceptor.interrupter(),
        }
    }
}
