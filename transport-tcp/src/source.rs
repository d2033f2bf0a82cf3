//! The source's end of a link: it connects.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Instant;

use pageferry::memory::GuestMemory;
use pageferry::transport::{
    Capabilities, ControlChannel, Interrupt, Link, MigrationId, PageSender, Registration,
    SourceLink, TransportError,
};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::connection::{Connection, LinkState, close_all, deadline_after};
use crate::connector::TcpConnector;
use crate::data_socket::DataSocket;
use crate::options::{TcpOptions, ZeroCopy};
use crate::preamble::{ANSWER_BYTES, Answer, Kind, Preamble, Status};
use crate::sender::TcpPageSender;
use crate::{CAPABILITIES, NAME, control};

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

/// The source's end of a link over TCP. Made by [`connect()`].
///
/// # Resource cleanup
///
/// Dropping it closes all connections, and ends zero-copy sends that are still under way. If data channels were finished and dropped before all
/// their batches were acknowledged, it first waits for the other side to take them, at most two
/// seconds in all.
#[derive(Debug)]
pub struct TcpSourceLink {
    id: MigrationId,
    options: TcpOptions,
    state: Arc<LinkState>,
    /// Control first, then data. Held open here, so that dropping a channel sends no reset
    /// after what was sent last.
    connections: Vec<Arc<Connection>>,
    control_taken: bool,
    memory: Option<Arc<GuestMemory>>,
    opened: bool,
}

impl TcpSourceLink {
    pub(crate) fn new(
        id: MigrationId,
        options: TcpOptions,
        state: Arc<LinkState>,
        control: Arc<Connection>,
    ) -> Self {
        Self {
            id,
            options,
            state,
            connections: vec![control],
            control_taken: false,
            memory: None,
            opened: false,
        }
    }

    /// The migration, as the destination's logs call it.
    pub fn migration_id(&self) -> MigrationId {
        self.id
    }

    /// The destination's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.connections[0].peer()
    }

    /// Fails once the link was interrupted.
    pub fn check(&self) -> Result<(), TransportError> {
        self.state.check()
    }

    /// Opens the connections of `channels` data channels for a transport that moves bytes in a
    /// way of its own. In place of [`SourceLink::open_senders`], and with the destination's
    /// counterpart meanwhile.
    pub fn open_sockets(&mut self, channels: u16) -> Result<Vec<DataSocket>, TransportError> {
        Ok(self.open(channels)?.into_iter().map(DataSocket::new).collect())
    }

    fn open(&mut self, channels: u16) -> Result<Vec<Arc<Connection>>, TransportError> {
        self.state.check()?;
        crate::check_channels(channels)?;
        if self.opened {
            return Err(TransportError::OutOfOrder("data channels are open"));
        }
        let peer = self.peer_addr();
        // All preambles go out before the first answer is waited for.
        let dialled = (0..channels)
            .map(|channel| {
                let preamble = Preamble { id: self.id, kind: Kind::Data { channel } };
                Dialled::begin(peer, &preamble, &self.options, &self.state)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let connections =
            dialled.into_iter().map(Dialled::await_answer).collect::<Result<Vec<_>, _>>()?;
        self.opened = true;
        self.connections.extend(connections.iter().cloned());
        Ok(connections)
    }
}

impl Link for TcpSourceLink {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { zero_copy: self.options.zero_copy != ZeroCopy::Off, ..CAPABILITIES }
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.state.check()?;
        if std::mem::replace(&mut self.control_taken, true) {
            return Err(TransportError::OutOfOrder("the control channel is taken"));
        }
        Ok(control::at_source(&self.connections[0]))
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        self.state.check()?;
        self.memory = Some(Arc::clone(memory));
        Ok(Registration::default())
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.state) as Arc<dyn Interrupt>
    }
}

impl SourceLink for TcpSourceLink {
    fn open_senders(&mut self, channels: u16) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
        self.state.check()?;
        let Some(memory) = self.memory.clone() else {
            return Err(TransportError::OutOfOrder("data channels before registration"));
        };
        let connections = self.open(channels)?;
        connections
            .into_iter()
            .map(|connection| {
                let memory = Arc::clone(&memory);
                let sender = TcpPageSender::new(connection, memory, &self.options)?;
                Ok(Box::new(sender) as Box<dyn PageSender>)
            })
            .collect()
    }
}

impl Drop for TcpSourceLink {
    fn drop(&mut self) {
        close_all(&self.connections);
    }
}

/// A connection that is being made.
pub(crate) struct Attempt {
    pub(crate) connection: Arc<Connection>,
    pub(crate) deadline: Option<Instant>,
}

impl Attempt {
    pub(crate) fn begin(
        peer: SocketAddr,
        options: &TcpOptions,
        state: &Arc<LinkState>,
    ) -> Result<Self, TransportError> {
        let failed = |cause| TransportError::Connect { address: peer.to_string(), cause };
        let deadline = deadline_after(Some(options.connect_timeout));
        let socket = start(peer, options).map_err(failed)?;
        // Part of the link while it still connects, so that an interrupt ends that too: shutting
        // down a socket in SYN_SENT aborts the attempt.
        Ok(Self { connection: state.adopt(socket, peer)?, deadline })
    }

    fn failed(&self, cause: io::Error) -> TransportError {
        TransportError::Connect { address: self.connection.peer().to_string(), cause }
    }

    /// Whether it is connected, once something has happened or its time is over.
    pub(crate) fn outcome(&self) -> Result<(), TransportError> {
        self.connection.check()?;
        if self.connection.wait(PollFlags::OUT, Some(Instant::now()))?.is_empty() {
            return Err(self.failed(io::ErrorKind::TimedOut.into()));
        }
        self.connection.check()?;
        match self.connection.socket().take_error().map_err(|cause| self.failed(cause))? {
            Some(cause) => Err(self.failed(cause)),
            None => Ok(()),
        }
    }

    /// Waits until it is connected.
    fn finish(self) -> Result<Self, TransportError> {
        self.connection.wait(PollFlags::OUT, self.deadline)?;
        self.outcome()?;
        Ok(self)
    }

    /// Says what the connection is for.
    pub(crate) fn greet(
        self,
        preamble: &Preamble,
        options: &TcpOptions,
    ) -> Result<Dialled, TransportError> {
        let socket = self.connection.socket();
        options.apply_to_path(socket).map_err(|cause| self.failed(cause))?;
        socket.set_nonblocking(false).map_err(|cause| self.failed(cause))?;
        // A fresh socket has room for these few bytes, always.
        let (kind, preamble) = (preamble.kind, preamble.encode());
        match self.connection.send(&preamble, SendFlags::DONTWAIT) {
            Ok(sent) if sent == preamble.len() => {
                Ok(Dialled { connection: self.connection, kind, deadline: self.deadline })
            }
            Ok(_) => Err(self.failed(io::ErrorKind::WriteZero.into())),
            Err(errno) => {
                self.connection.check()?;
                Err(self.failed(errno.into()))
            }
        }
    }
}

/// A connection whose preamble is out and whose answer is not there yet.
pub(crate) struct Dialled {
    connection: Arc<Connection>,
    kind: Kind,
    deadline: Option<Instant>,
}

impl Dialled {
    fn begin(
        peer: SocketAddr,
        preamble: &Preamble,
        options: &TcpOptions,
        state: &Arc<LinkState>,
    ) -> Result<Self, TransportError> {
        Attempt::begin(peer, options, state)?.finish()?.greet(preamble, options)
    }

    pub(crate) fn await_answer(self) -> Result<Arc<Connection>, TransportError> {
        let Self { connection, kind, deadline } = self;
        let address = || connection.peer().to_string();
        let failed = |cause| TransportError::Connect { address: address(), cause };
        let mut bytes = [0; ANSWER_BYTES];
        let mut filled = 0;
        while filled < bytes.len() {
            match connection.receive(&mut bytes[filled..], RecvFlags::DONTWAIT) {
                Ok(0) => {
                    connection.check()?;
                    return Err(failed(io::ErrorKind::UnexpectedEof.into()));
                }
                Ok(received) => filled += received,
                Err(Errno::AGAIN) => {
                    if connection.wait(PollFlags::IN, deadline)?.is_empty() {
                        let what = format!("{}, but its preamble is not answered", connected(kind));
                        return Err(failed(io::Error::new(io::ErrorKind::TimedOut, what)));
                    }
                }
                Err(errno) => {
                    connection.check()?;
                    return Err(failed(errno.into()));
                }
            }
        }
        match Answer::decode(&bytes) {
            Ok(Answer { status: Status::Ok, .. }) => Ok(connection),
            Ok(Answer { reason, .. }) => {
                let reason = match kind {
                    Kind::Control => reason,
                    Kind::Data { .. } => format!("{}, and then: {reason}", connected(kind)),
                };
                Err(TransportError::Refused { address: address(), reason })
            }
            // Something listens there, but it is no destination of ours.
            Err(error) => Err(failed(io::Error::new(io::ErrorKind::InvalidData, error))),
        }
    }
}

fn connected(kind: Kind) -> String {
    match kind {
        Kind::Control => "it is connected".to_owned(),
        Kind::Data { channel } => format!("data channel {channel} is connected"),
    }
}

/// Starts to connect; the socket is left in non-blocking mode.
fn start(peer: SocketAddr, options: &TcpOptions) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(peer), Type::STREAM, Some(Protocol::TCP))?;
    options.apply_buffers(&socket)?;
    options.apply(&socket)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::from(peer)) {
        Err(error) if error.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error()) => Err(error),
        _ => Ok(socket),
    }
}
