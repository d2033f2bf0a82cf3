//! io_uring transport of [pageferry]: the connections, preambles and stream codec of
//! [pageferry-tcp](pageferry_tcp), moved by chains of requests instead of one system call each.
//! Either end of a link may use either transport.
//!
//! A source queues batches and hands many of them to the kernel with one system call; long runs
//! go out zero-copy where that pays ([`ZeroCopy`]). A destination
//! receives each batch, however long, and the header after it with one request straight into
//! guest memory. No page byte is copied in user space.
//!
//! Ask for [`Rings`] first: they tell whether this process may use io_uring, and why not. They
//! make the links; the destination listens with [`pageferry_tcp::TcpAcceptor`].
//!
//! ```
//! use std::time::Duration;
//!
//! use pageferry::transport::{Admission, Link};
//! use pageferry_iouring::{IoUringOptions, Rings};
//! use pageferry_tcp::{TcpAcceptor, TcpOptions, connect};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let rings = match Rings::new(IoUringOptions::default()) {
//!     Ok(rings) => rings,
//!     Err(unavailable) => {
//!         eprintln!("no io_uring: {unavailable}");
//!         return Ok(());
//!     }
//! };
//! // Nobody greets here.
//! let options = TcpOptions { admission: Admission::Anyone, ..TcpOptions::default() };
//! let acceptor = TcpAcceptor::bind("127.0.0.1:0", options)?;
//! let source = rings.source_link(connect(acceptor.local_addr(), TcpOptions::default())?);
//! let destination = rings.destination_link(acceptor.accept(Some(Duration::from_secs(10)))?);
//! assert_eq!((source.name(), destination.name()), ("iouring", "iouring"));
//! # Ok(())
//! # }
//! ```
//!
//! # Guest memory
//!
//! Nothing is registered unless it is asked for, by [`ZeroCopy::On`] at the source or
//! [`IoUringOptions::register_destination`]: registration allocates, zeroes and pins all of guest
//! memory, also what is zero at the source and would never be touched.
//!
//! Registered memory must not be discarded (`MADV_DONTNEED`, `madvise` of a balloon, holes punched
//! into a memfd) until the link is dropped, or sends would read pages that the guest has no more.
//! It counts against `RLIMIT_MEMLOCK` unless the process has `CAP_IPC_LOCK`. So does, without
//! registration, what zero-copy sends have under way; where there is no room for it the kernel
//! copies.
//!
//! # Thread safety
//!
//! Links and channels are [`Send`] and driven by one thread at a time. Where the kernel binds
//! rings to threads ([`Feature::SingleIssuer`]) a channel that another thread goes on with gets a
//! new ring there, so it is best left to one thread. The crate starts no thread and installs no
//! signal handler; with [`IoUringOptions::sq_poll`] the kernel starts one a channel.
//!
//! # Resource cleanup
//!
//! No request outlives the call that made it: every call waits until the kernel is done with all
//! of its requests, which a lost link and an interrupt bring about too. Only zero-copy sends may
//! read guest memory for longer. `finish` waits for the end of that, at most two seconds; a
//! channel that is dropped while there are some resets its connection, so that the kernel forgets
//! what it has queued, and waits for a fifth of a second more. A page that a NIC still reads then
//! is kept by the kernel's own reference, whatever becomes of the mapping.

#[cfg(not(target_os = "linux"))]
compile_error!("this crate needs Linux: io_uring is Linux's");

mod chain;
mod destination;
mod end;
mod features;
mod huge;
mod landings;
mod limits;
mod options;
mod probe;
mod queue;
mod receiver;
mod ring;
mod rings;
mod sender;
mod setup;
mod several;
mod source;
mod table;
mod trial;
mod vectors;

use pageferry::memory::PAGE_BYTES;
use pageferry::transport::{Capabilities, MAX_BATCH_RUNS};

pub use destination::IoUringDestinationLink;
pub use features::{Feature, Features, Unavailable};
pub use options::IoUringOptions;
pub use pageferry_tcp::ZeroCopy;
pub use rings::Rings;
pub use several::{IoUringDialler, IoUringRendezvous};
pub use source::{IoUringSourceLink, connect};

const NAME: &str = "iouring";

/// Of both ends; zero-copy and registration depend on the options, and what protects pages on the connection.
const CAPABILITIES: Capabilities = Capabilities {
    one_sided_write: false,
    one_sided_read: false,
    zero_copy: false,
    needs_registration: false,
    protects_pages: false,
    tells_landings: true,
    // As many as tcp takes, which goes on where there are no rings.
    max_batch_bytes: pageferry_tcp::MAX_BATCH_BYTES,
    max_batch_runs: MAX_BATCH_RUNS,
};

/// The queue's size, within what an engine lets be under way.
fn queue_bytes(options: &IoUringOptions) -> u64 {
    options.queue_bytes.clamp(PAGE_BYTES, 32 << 20)
}
