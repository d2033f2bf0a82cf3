//! How a source reaches a destination: which of a name's addresses answers.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Instant;

use pageferry::transport::race::Race;
use pageferry::transport::ways::resolve_any;
use pageferry::transport::{Interrupt, LinkId, TransportError, addresses};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::connection::LinkState;
use crate::dial::{Dialled, Dialling};
use crate::options::TcpOptions;
use crate::preamble::{Kind, Preamble};
use crate::source::TcpSourceLink;
use crate::trust::Trust;
use crate::waiting;

/// Connects to a destination that accepts migrations ([`TcpAcceptor`](crate::TcpAcceptor)).
///
/// Tries the addresses of a name one after another, and the next one too when one is silent for a
/// quarter of a second (RFC 8305, "Happy Eyeballs"); the first that is connected is taken. Each is
/// given at most [`TcpOptions::connect_timeout`]. A refusal is an answer: it is returned as
/// [`TransportError::Refused`]. To be able to end it, use [`TcpConnector`].
pub fn connect(
    addr: impl ToSocketAddrs + fmt::Debug,
    options: TcpOptions,
) -> Result<TcpSourceLink, TransportError> {
    TcpConnector::new(options).connect(addr)
}

/// Connects, and can be told to stop.
///
/// ```
/// use pageferry::transport::{Interrupt, TransportError};
/// use pageferry_tcp::{TcpConnector, TcpOptions};
///
/// let connector = TcpConnector::new(TcpOptions::default());
/// let interrupter = connector.interrupter();
/// // From any thread, while `connect` runs or before.
/// interrupter.interrupt();
/// let result = connector.connect("127.0.0.1:7400");
/// assert!(matches!(result, Err(TransportError::Interrupted)));
/// ```
#[derive(Debug)]
pub struct TcpConnector {
    options: TcpOptions,
    state: Arc<LinkState>,
}

impl TcpConnector {
    /// For one connection.
    pub fn new(options: TcpOptions) -> Self {
        Self { options, state: LinkState::new(|| {}) }
    }

    /// A handle that ends [`connect`](Self::connect), now and later, with
    /// [`TransportError::Interrupted`]; and the link that came of it. A name that is being looked
    /// up is waited for.
    pub fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.state) as Arc<dyn Interrupt>
    }

    /// As [`connect()`].
    pub fn connect(
        self,
        addr: impl ToSocketAddrs + fmt::Debug,
    ) -> Result<TcpSourceLink, TransportError> {
        let address = addresses::text(&addr);
        let found = addresses::resolve(&addr).map_err(|cause| {
            let address = address.clone();
            TransportError::Connect { address, cause }
        })?;
        self.connect_to(&address, &[found])
    }

    /// As [`connect()`], to a destination that has several addresses, by networks of their own, say: the control
    /// connection goes to the first that answers, and data channels are dealt out over all of them. One that cannot be
    /// looked up or reached is done without.
    ///
    /// By certificates the destination's name is that of the first, unless [`Tls::peer_name`](crate::Tls::peer_name) says.
    pub fn connect_by_any(self, addrs: &[String]) -> Result<TcpSourceLink, TransportError> {
        let address = addrs.join(",");
        let found = resolve_any(addrs)
            .map_err(|cause| TransportError::Connect { address: address.clone(), cause })?;
        self.connect_to(&address, &found)
    }

    /// Each of `found` is what one way to the destination may go to.
    fn connect_to(
        self,
        address: &str,
        found: &[Vec<SocketAddr>],
    ) -> Result<TcpSourceLink, TransportError> {
        let Self { options, state } = self;
        let unreachable = |cause| TransportError::Connect { address: address.to_owned(), cause };
        let name = address.split(',').next().unwrap_or(address);
        let trust = Trust::new(&options, name)?;
        let id = LinkId::random()
            .map_err(|cause| TransportError::Io { operation: "make an id for a link", cause })?;
        let preamble = Preamble { id, kind: Kind::Control };
        let turns = options.source_addresses.len().max(1);
        let mut turn = 0;
        let control = loop {
            let is_last = turn + 1 == turns;
            let by = if is_last { options.clone() } else { options.for_one_of_several() };
            let begin = |to| Dialling::begin(by.way(to, turn), &by, &trust, &state);
            let mut race = Race::new(found.concat(), unreachable(io::ErrorKind::NotFound.into()));
            let connected = loop {
                let answer = race.winner(begin, wait).and_then(|winner| {
                    // What listens there may be no destination of ours; another address may be.
                    race.note(winner.greet(&preamble, &by, &trust).and_then(Dialled::await_answer))
                });
                match answer {
                    Ok(None) => {}
                    Ok(Some(control)) => break Ok(control),
                    Err(error) => break Err(error),
                }
            };
            match connected {
                Err(error @ TransportError::Connect { .. }) if !is_last => {
                    let from = options.source_addresses[turn];
                    let why = pageferry::Chain::of(&error).to_string();
                    tracing::warn!(%from, "the control connection comes from elsewhere: {why}");
                    turn += 1;
                }
                connected => break connected?,
            }
        };
        options.check_buffers(control.socket()).map_err(unreachable)?;
        let ways = options.way(control.peer(), turn).and_others(found, &options.source_addresses);
        Ok(TcpSourceLink::new(id, options, trust, state, &control, ways))
    }
}

/// Sleeps until something happens to one of them, of which an interrupt is some.
fn wait(attempts: &[Dialling], until: Option<Instant>) -> Result<(), TransportError> {
    let mut polled: Vec<_> =
        attempts.iter().map(|attempt| PollFd::new(&*attempt.connection, PollFlags::OUT)).collect();
    match poll(&mut polled, until.map(waiting::until).as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => {
            Err(TransportError::Io { operation: "wait for connections", cause: errno.into() })
        }
    }
}
