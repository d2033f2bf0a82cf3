//! A data connection for another transport.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use pageferry::transport::{Interrupt, TransportError};

use crate::connection::Connection;
use crate::wire::Seal;

/// A data connection of a link, for a transport that finds its connections as TCP does and moves
/// bytes in a way of its own ([`TcpSourceLink::open_sockets`](crate::TcpSourceLink::open_sockets),
/// [`TcpDestinationLink::open_sockets`](crate::TcpDestinationLink::open_sockets)). In blocking
/// mode, with its preambles done.
///
/// # Resource cleanup
///
/// The link holds the socket too: it is closed when the link and all clones are dropped, and the
/// link ends the connection when it is dropped. An interrupt of the link shuts it down, which
/// ends whatever the kernel does with it.
#[derive(Debug, Clone)]
pub struct DataSocket(Arc<Connection>);

impl DataSocket {
    pub(crate) fn new(connection: Arc<Connection>) -> Self {
        Self(connection)
    }

    /// The other side's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.0.peer()
    }

    /// Whether this is a connection from an address to itself. The kernel copies zero-copy sends
    /// there, always.
    pub fn is_within_host(&self) -> bool {
        self.0.is_within_host()
    }

    /// Whether the kernel encrypts what passes.
    pub fn is_encrypted(&self) -> bool {
        self.0.seal() != Seal::Plain
    }

    /// So much was sent by one request, which is a record or more where the kernel encrypts.
    pub fn note_sent(&self, bytes: usize) {
        self.0.note_sent(bytes);
    }

    /// Fails with [`TransportError::Lost`] once a key of the kernel's has protected as much as one may: it cannot be
    /// changed under way.
    pub fn check_key(&self, operation: &'static str) -> Result<(), TransportError> {
        self.0.check_key(operation)
    }

    /// Fails once the link or this channel was interrupted.
    pub fn check(&self) -> Result<(), TransportError> {
        self.0.check()
    }

    /// A handle that ends this channel alone, as
    /// [`PageSender::interrupter`](pageferry::transport::PageSender::interrupter) promises.
    pub fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.0.interrupter()
    }

    /// What a failed system call or request means: an interrupt, a lost link, or a machine that
    /// refuses.
    pub fn failed(&self, operation: &'static str, cause: io::Error) -> TransportError {
        self.0.failed(operation, cause)
    }

    /// What the end of the stream means where more was due.
    pub fn ended(&self, operation: &'static str) -> TransportError {
        self.0.ended(operation)
    }

    /// Ends this direction, in order.
    pub fn finish(&self) {
        self.0.shutdown(Shutdown::Write);
    }

    /// Ends both directions where something went wrong; whoever waits for the socket wakes up, and
    /// closing it resets the connection, so that the other side learns of it in any case.
    pub fn break_off(&self) {
        self.0.break_off();
    }

    /// Has the link, when it is dropped, wait a little until the other side has taken what was
    /// sent.
    pub fn ask_to_linger(&self) {
        self.0.ask_to_linger();
    }
}

impl AsFd for DataSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
