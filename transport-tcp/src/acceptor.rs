//! The destination's listener.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use pageferry::transport::reception::{Desk, spawn_named};
use pageferry::transport::{Interrupt, TransportError, addresses};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::channels::Joined;
use crate::destination::TcpDestinationLink;
use crate::newcomer::Newcomer;
use crate::options::TcpOptions;
use crate::reception::Reception;

const BACKLOG: i32 = 128;

/// Waits for migrations on a port. Serves one migration at a time: of a source that has greeted
/// ([`TcpOptions::admission`]). A second one that has waited a second is told to come later. One that does
/// not answer its *welcome* soon is told so too where another one waits: its link is over, and the
/// other one is next ([`Standing`](pageferry::transport::Standing)).
///
/// Strangers on the port (scanners, health checks, garbage) are turned away in words, with a warning in
/// the log that names their address ([`Warnings`](pageferry::transport::Warnings): not one for each if they
/// are many), and disturb nobody.
///
/// # Thread safety
///
/// All methods take `&self`; a link that was accepted lives on its own.
///
/// # Resource cleanup
///
/// A thread owns the listener. Dropping the acceptor and the links that came from it ends the
/// thread and frees the port.
#[derive(Debug)]
pub struct TcpAcceptor {
    pub(crate) desk: Arc<Desk<Newcomer, Joined>>,
    local_addr: SocketAddr,
}

impl TcpAcceptor {
    /// Listens on the first of the addresses that can be had. Port 0 lets the kernel choose one,
    /// see [`TcpAcceptor::local_addr`].
    pub fn bind(
        addr: impl ToSocketAddrs + fmt::Debug,
        options: TcpOptions,
    ) -> Result<Self, TransportError> {
        Self::bind_with(addr, options, spawn_named)
    }

    /// As [`TcpAcceptor::bind`], for a host that wants to start the acceptor's thread itself (to
    /// put a seccomp filter on it first, say). The thread must run what it is given to its end.
    pub fn bind_with(
        addr: impl ToSocketAddrs + fmt::Debug,
        options: TcpOptions,
        spawn: impl FnOnce(Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>,
    ) -> Result<Self, TransportError> {
        let failed = |cause| TransportError::Listen { address: addresses::text(&addr), cause };
        let found = addresses::resolve(&addr).map_err(failed)?;
        let mut last_error = failed(io::ErrorKind::NotFound.into());
        for address in found {
            match listen(address, &options) {
                Ok((listener, local_addr)) => {
                    let works = |board, bell| {
                        let reception = Reception::new(listener, bell, board, options);
                        move || reception.run()
                    };
                    let desk = Desk::open(works, spawn).map_err(|cause| TransportError::Io {
                        operation: "start the acceptor's thread",
                        cause,
                    })?;
                    return Ok(Self { desk: Arc::new(desk), local_addr });
                }
                Err(cause) => {
                    last_error = TransportError::Listen { address: address.to_string(), cause };
                }
            }
        }
        Err(last_error)
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Waits for a source, at most `timeout` (`None`: until there is one). While the link of the
    /// migration before lives, no source is let in.
    pub fn accept(&self, timeout: Option<Duration>) -> Result<TcpDestinationLink, TransportError> {
        let (newcomer, seat) = self.desk.accept(timeout)?;
        TcpDestinationLink::new(newcomer, seat)
    }

    /// A handle that ends [`TcpAcceptor::accept`], now and later, with
    /// [`TransportError::Interrupted`]. Links that were accepted are not concerned.
    pub fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(self.desk.board()) as Arc<dyn Interrupt>
    }
}

fn listen(address: SocketAddr, options: &TcpOptions) -> io::Result<(Socket, SocketAddr)> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A port whose last migration has just ended can be had again at once.
    socket.set_reuse_address(true)?;
    // Accepted sockets inherit the sizes.
    options.apply_buffers(&socket)?;
    options.check_buffers(&socket)?;
    options.apply_interface(&socket)?;
    // Accepted sockets are set anew; what cannot be set is known before anybody comes.
    options.apply(&socket)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(BACKLOG)?;
    let local = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
    Ok((socket, local))
}
