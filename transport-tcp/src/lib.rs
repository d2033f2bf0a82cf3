//! TCP transport of [pageferry]: pages go straight from guest memory into sockets by
//! `sendmsg`, and straight from sockets into guest memory by `recvmsg`. No page byte is copied in
//! user space, and where the NIC can do it none in the sending kernel either ([`ZeroCopy`]). Encrypted pages are not copied
//! either where the kernel does it ([`KernelTls`]).
//!
//! The destination [binds](TcpAcceptor::bind) and [accepts](TcpAcceptor::accept), the source
//! [connects](connect()). A link is one control connection and any number of data connections to
//! the same port, found by the random id of the link; how each begins is in [`preamble`]. Both ends
//! then speak pageferry's stream codec ([`pageferry::transport::stream`]). IPv4 and IPv6.
//!
//! ```
//! use std::time::Duration;
//!
//! use pageferry::transport::{Admission, Link, TransportError};
//! use pageferry_tcp::{TcpAcceptor, TcpOptions, connect};
//!
//! # fn main() -> Result<(), TransportError> {
//! // Not for a migration: the source does not greet.
//! let options = TcpOptions { admission: Admission::Anyone, ..TcpOptions::default() };
//! let acceptor = TcpAcceptor::bind("127.0.0.1:0", options)?;
//! let address = acceptor.local_addr();
//!
//! // On the other host.
//! let source = std::thread::spawn(move || -> Result<(), TransportError> {
//!     let mut link = connect(address, TcpOptions::default())?;
//!     link.control()?.sender.send(b"hello", Duration::from_secs(10))
//! });
//!
//! let mut link = acceptor.accept(Some(Duration::from_secs(10)))?;
//! let frame = link.control()?.receiver.receive(Some(Duration::from_secs(10)))?;
//! assert_eq!(frame, b"hello");
//! # source.join().unwrap()
//! # }
//! ```
//!
//! A host that has connected sockets already, of TCP, unix or vsock, makes a link of them: [`GivenSockets`].
//!
//! # Who is let in
//!
//! [`TcpOptions::security`] says. With [`Security::Tls`] it is who has the right certificate or the right key, and what
//! passes is encrypted. In plain text it is whoever reaches the port and speaks pageferry's protocol, and who knows the id
//! of a link may join it; so plain text goes no further than this host, unless told otherwise.
//!
//! # Thread safety
//!
//! Links and channels are [`Send`] and driven by one thread at a time. The two directions of the
//! control channel and all data channels may be used at once, each from its own thread.
//! [`Interrupt`](pageferry::transport::Interrupt) handles may be used from any thread at any
//! time. The crate starts one thread, the acceptor's ([`TcpAcceptor::bind_with`] lets the host
//! start it), and blocks no signal.
//!
//! # Resource cleanup
//!
//! Sockets belong to the link: a channel that is dropped ends its direction of the connection,
//! the descriptor is closed when the link is dropped. A data channel dropped without
//! [`finish`](pageferry::transport::PageSender::finish) is a lost one for the other side.
//! Guest memory is kept alive by an [`Arc`](std::sync::Arc) until link and channels are gone.
//!
//! Zero-copy sends are read from guest memory after they were sent, until the other side's kernel
//! has them. `finish` waits for that, at most two seconds. What is still under way when the link
//! is dropped is taken back: the connection is reset, so that its kernel forgets what it has
//! queued, and its last reads are waited for, a fifth of a second at most. A page that a NIC still
//! holds then is kept by the kernel's own reference, whatever happens to the mapping.

#[cfg(not(target_os = "linux"))]
compile_error!("this crate needs Linux: zero-copy sends and their notifications are Linux's");

mod acceptor;
mod channels;
mod connection;
mod connector;
mod control;
mod copies;
mod data_socket;
mod destination;
mod dial;
mod end;
mod framing;
mod given;
mod greeting;
mod half_open;
mod hearing;
mod inbox;
mod incoming;
mod lanes;
mod newcomer;
mod options;
mod outstanding;
pub mod preamble;
mod raw_io;
mod receiver;
mod reception;
mod sender;
mod several;
mod source;
#[cfg(feature = "test-support")]
pub mod testing;
mod tls;
mod trust;
mod waiting;
mod wire;
mod zero_copy;

use pageferry::transport::{Capabilities, MAX_BATCH_RUNS};

pub use acceptor::TcpAcceptor;
pub use connector::{TcpConnector, connect};
pub use data_socket::DataSocket;
pub use destination::TcpDestinationLink;
pub use given::GivenSockets;
pub use options::{Keepalive, LEAST_BUFFER_BYTES, TcpOptions, ZeroCopy};
pub use pageferry_identity::{Certificates, Identity, KernelTls, Material, Security, Tls};
pub use several::{TcpDialler, TcpRendezvous};
pub use source::TcpSourceLink;

/// Why the kernel does not encrypt what sockets carry; `None` if it can ([`KernelTls`]).
pub fn kernel_tls_unavailable() -> Option<&'static str> {
    tls::kernel::unavailable()
}

/// Most data channels of a link; bounds how many connections a peer can make us hold.
pub const MAX_CHANNELS: u16 = 256;

/// Most page bytes in one batch.
pub const MAX_BATCH_BYTES: u64 = 4 << 20;

const NAME: &str = "tcp";

/// Of both ends. The source's has `zero_copy` too, if the options ask for it; and `protects_pages` is a matter of the
/// connection.
const CAPABILITIES: Capabilities = Capabilities {
    one_sided_write: false,
    one_sided_read: false,
    zero_copy: false,
    needs_registration: false,
    protects_pages: false,
    tells_landings: true,
    max_batch_bytes: MAX_BATCH_BYTES,
    max_batch_runs: MAX_BATCH_RUNS,
};
