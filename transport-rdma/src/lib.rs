//! RDMA transport of [pageferry]: the source's NIC writes pages straight from its guest memory
//! into the destination's, whose CPU does nothing for them.
//!
//! Connections are reliable connected queue pairs, found by rdma_cm from ordinary addresses: two
//! for control frames, one a data channel, one on which the destination says where its guest
//! memory is. Zero pages are mentions that the destination makes zero itself; the end of a round
//! is a write with immediate data (an empty send on iWARP), which arrives after all that was
//! written before it.
//!
//! libibverbs and librdmacm are loaded at run time. Where they are missing, or there is no RDMA
//! device, [`connect`] and [`RdmaAcceptor::bind`] say so; [`available`] asks beforehand.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use pageferry::transport::Admission;
//! use pageferry_rdma::{RdmaAcceptor, RdmaOptions, connect};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! pageferry_rdma::available()?;
//! // Nobody greets here.
//! let options = RdmaOptions { admission: Admission::Anyone, ..RdmaOptions::default() };
//! let acceptor = RdmaAcceptor::bind("10.78.0.1:0", options)?;
//! let address = acceptor.local_addr();
//! let source = std::thread::spawn(move || connect(address, RdmaOptions::default()));
//! let destination = acceptor.accept(Some(Duration::from_secs(10)))?;
//! # Ok(())
//! # }
//! ```
//!
//! # Guest memory
//!
//! All of it is registered on both sides before the first page goes out: pinned, and so allocated,
//! also where it is zero. It counts against `RLIMIT_MEMLOCK` unless the process has
//! `CAP_IPC_LOCK`. It must not be discarded (`MADV_DONTNEED`, a balloon, holes punched into a
//! memfd) until the link is dropped: the NIC would go on with pages that the guest has no more.
//! The destination's may be written by the source while the link is there, and no longer.
//!
//! # Thread safety
//!
//! Links and channels are [`Send`] and driven by one thread at a time. Registration uses two
//! threads while it lasts, and an acceptor has one of its own; otherwise the crate starts none, and
//! installs no signal handler.

#[cfg(not(target_os = "linux"))]
compile_error!("this crate needs Linux: rdma-core is for Linux");

mod acceptor;
mod addresses;
mod announce;
mod cm;
mod connection;
mod connector;
mod control;
mod destination;
mod dial;
mod end;
#[cfg(test)]
mod floods;
mod frames;
#[doc(hidden)]
pub mod hot;
mod inbox;
mod kept;
mod lanes;
mod memory;
mod options;
mod pipe;
mod port;
mod preamble;
mod proof;
mod rails;
mod receiver;
mod reception;
mod requests;
mod seal;
#[cfg(test)]
mod sealed;
mod sender;
mod several;
mod source;
mod state;
#[cfg(test)]
mod strangers;
mod table;
mod trust;
mod verbs;
mod zeros;

use std::io;
use std::time::{Duration, Instant};

use pageferry::transport::{Capabilities, MAX_BATCH_RUNS};
use thiserror::Error;

pub use acceptor::RdmaAcceptor;
pub use addresses::{DeviceAddress, addresses};
pub use connector::{RdmaConnector, connect};
pub use destination::RdmaDestinationLink;
pub use options::{Mtu, RdmaOptions, RegistrationMode};
pub use pageferry_identity::{Certificates, Identity, KernelTls, Material, Security, Tls};
pub use several::{RdmaDialler, RdmaRendezvous};
pub use source::RdmaSourceLink;

const NAME: &str = "rdma";

const CAPABILITIES: Capabilities = Capabilities {
    one_sided_write: true,
    one_sided_read: true,
    zero_copy: true,
    needs_registration: true,
    protects_pages: false,
    tells_landings: false,
    max_batch_bytes: 16 << 20,
    max_batch_runs: MAX_BATCH_RUNS,
};

/// Why there is no RDMA here.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// A library is not installed.
    #[error(
        "{library} is not there; install rdma-core's libraries (Debian: librdmacm1 and \
         ibverbs-providers)"
    )]
    Library {
        /// Which one.
        library: &'static str,
    },
    /// There is none, or its driver is not loaded.
    #[error(
        "this host has no RDMA device; load its driver, or add a software device (rdma link add)"
    )]
    NoDevice,
    /// The kernel does not say.
    #[error("failed to list RDMA devices")]
    List(#[source] io::Error),
}

impl From<Unavailable> for io::Error {
    fn from(unavailable: Unavailable) -> Self {
        Self::new(io::ErrorKind::Unsupported, unavailable)
    }
}

/// Whether RDMA can be used here, and why not.
pub fn available() -> Result<(), Unavailable> {
    check_libraries()?;
    match verbs::device_names() {
        Ok(names) if names.is_empty() => Err(Unavailable::NoDevice),
        Ok(_) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Err(Unavailable::NoDevice),
        Err(error) => Err(Unavailable::List(error)),
    }
}

/// When so much time will be over; at the latest when the clock still counts.
fn after(time: Duration) -> Instant {
    const VERY_LONG: Duration = Duration::from_secs(1 << 32);
    let now = Instant::now();
    now.checked_add(time).unwrap_or(now + VERY_LONG)
}

fn check_libraries() -> Result<(), Unavailable> {
    verbs::missing_library().map_or(Ok(()), |library| Err(Unavailable::Library { library }))
}
