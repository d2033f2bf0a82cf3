//! The destination's listener.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use pageferry::transport::reception::{Desk, spawn_named};
use pageferry::transport::{Interrupt, TransportError, addresses};

use crate::addresses::advise;
use crate::check_libraries;
use crate::cm::Id;
use crate::destination::RdmaDestinationLink;
use crate::dial::{Request, check_device};
use crate::options::RdmaOptions;
use crate::reception::{Arrival, Reception};
use crate::requests::Requests;

/// Requests that the kernel keeps for the acceptor's thread.
const BACKLOG: i32 = 64;

/// Waits for sources at an RDMA device's address. Serves one migration at a time: of a source that
/// has greeted ([`RdmaOptions::admission`]). A second one that has waited a second is told to come later. One
/// that does not answer its *welcome* soon is told so too where another one waits: its link is over,
/// and the other one is next ([`Standing`](pageferry::transport::Standing)).
///
/// Strangers (other programs' requests, sources that leave half-way) are turned away with a warning in
/// the log that names their address ([`Warnings`](pageferry::transport::Warnings): not one for each if they
/// are many), and disturb nobody.
///
/// # Thread safety
///
/// All methods take `&self`; a link that was accepted lives on its own.
///
/// # Resource cleanup
///
/// A thread owns the listener. Dropping the acceptor and the links that came from it ends the thread
/// and frees the port.
#[derive(Debug)]
pub struct RdmaAcceptor {
    pub(crate) desk: Arc<Desk<Arrival, Requests<Request>>>,
    local_addr: SocketAddr,
}

impl RdmaAcceptor {
    /// Listens on the first of the addresses that can be had. Port 0 lets the kernel choose one, see
    /// [`RdmaAcceptor::local_addr`].
    pub fn bind(
        address: impl ToSocketAddrs + fmt::Debug,
        options: RdmaOptions,
    ) -> Result<Self, TransportError> {
        Self::bind_with(address, options, spawn_named)
    }

    /// As [`RdmaAcceptor::bind`], for a host that wants to start the acceptor's thread itself (to put a
    /// seccomp filter on it first, say). The thread must run what it is given to its end.
    pub fn bind_with(
        address: impl ToSocketAddrs + fmt::Debug,
        options: RdmaOptions,
        spawn: impl FnOnce(Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>,
    ) -> Result<Self, TransportError> {
        let text = addresses::text(&address);
        let failed =
            |address: &str, cause| TransportError::Listen { address: address.to_owned(), cause };
        let found = addresses::resolve(&address).map_err(|cause| failed(&text, cause))?;
        check_libraries().map_err(|unavailable| failed(&text, unavailable.into()))?;
        let mut last_error = failed(&text, io::ErrorKind::NotFound.into());
        for address in found {
            check_device(&options, &address.to_string())?;
            match listen(address) {
                Ok((listener, local_addr)) => {
                    let works = |board, bell| {
                        let reception = Reception::new(listener, local_addr, bell, board, options);
                        move || reception.run()
                    };
                    let desk = Desk::open(works, spawn).map_err(|cause| TransportError::Io {
                        operation: "start the acceptor's thread",
                        cause,
                    })?;
                    return Ok(Self { desk: Arc::new(desk), local_addr });
                }
                Err(cause) => last_error = failed(&address.to_string(), advise(cause)),
            }
        }
        Err(last_error)
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Ends [`Self::accept`], now and later. Links that were accepted go on.
    pub fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(self.desk.board()) as Arc<dyn Interrupt>
    }

    /// Waits for a source, at most `timeout` (`None`: for as long as it takes). While the link of the
    /// migration before lives, no source is let in.
    pub fn accept(&self, timeout: Option<Duration>) -> Result<RdmaDestinationLink, TransportError> {
        let (arrival, seat) = self.desk.accept(timeout)?;
        RdmaDestinationLink::new(arrival, seat)
    }
}

fn listen(mut address: SocketAddr) -> io::Result<(Id, SocketAddr)> {
    let id = Id::new()?;
    address.set_port(id.listen(address, BACKLOG)?);
    if !address.ip().is_unspecified() && id.context().is_none() {
        // Nobody would ever get here: so it is with loopback addresses.
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    Ok((id, address))
}
