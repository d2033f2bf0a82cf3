//! A connection of a source's, from the first packet to the destination's answer.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use pageferry::transport::TransportError;
use pageferry::transport::race::{Attempt, Progress};
use pageferry::transport::ways::Way;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::connection::{Connection, LinkState};
use crate::hearing::Given;
use crate::options::TcpOptions;
use crate::preamble::{ANSWER_BYTES, Answer, Kind, Preamble, Status};
use crate::trust::Trust;
use crate::waiting::{deadline_after, is_past};

/// A connection that is being made.
#[derive(Debug)]
pub(crate) struct Dialling {
    pub(crate) connection: Arc<Connection>,
    deadline: Option<Instant>,
}

impl Dialling {
    pub(crate) fn begin(
        way: Way,
        options: &TcpOptions,
        trust: &Trust,
        state: &Arc<LinkState>,
    ) -> Result<Self, TransportError> {
        let peer = way.to;
        let failed = |cause| TransportError::Connect { address: peer.to_string(), cause };
        let deadline = deadline_after(Some(options.connect_timeout));
        let socket = start(way, options).map_err(failed)?;
        // Part of the link while it still connects, so that an interrupt ends that too: shutting
        // down a socket in SYN_SENT aborts the attempt.
        let connection = state.adopt(trust.wire(socket, peer)?, peer)?;
        Ok(Self { connection, deadline })
    }

    fn failed(&self, cause: io::Error) -> TransportError {
        TransportError::Connect { address: self.connection.peer().to_string(), cause }
    }
}

impl Attempt for Dialling {
    type Connected = Connected;

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    fn go_on(self) -> Result<Progress<Self>, TransportError> {
        self.connection.check()?;
        if self.connection.wait(PollFlags::OUT, Some(Instant::now()))?.is_empty() {
            if is_past(self.deadline) {
                return Err(self.failed(io::ErrorKind::TimedOut.into()));
            }
            return Ok(Progress::NotYet(self));
        }
        self.connection.check()?;
        match self.connection.socket().take_error().map_err(|cause| self.failed(cause))? {
            Some(cause) => Err(self.failed(cause)),
            None => Ok(Progress::Connected(Connected(self))),
        }
    }
}

/// A connection on which nothing was said yet.
#[derive(Debug)]
pub(crate) struct Connected(Dialling);

impl Connected {
    /// Waits until a connection is made.
    fn after(mut dialling: Dialling) -> Result<Self, TransportError> {
        loop {
            dialling.connection.wait(PollFlags::OUT, dialling.deadline)?;
            match dialling.go_on()? {
                Progress::NotYet(goes_on) => dialling = goes_on,
                Progress::Connected(connected) => return Ok(connected),
            }
        }
    }

    /// Shakes hands, and says what the connection is for.
    pub(crate) fn greet(
        self,
        preamble: &Preamble,
        options: &TcpOptions,
        trust: &Trust,
    ) -> Result<Dialled, TransportError> {
        let Self(dialling) = self;
        let socket = dialling.connection.socket();
        options.apply_to_path(socket).map_err(|cause| dialling.failed(cause))?;
        socket.set_nonblocking(false).map_err(|cause| dialling.failed(cause))?;
        trust.check_path(socket, dialling.connection.peer())?;
        let (kind, preamble) = (preamble.kind, preamble.encode());
        match dialling.connection.secure("make a secure connection", dialling.deadline) {
            Ok(true) => {}
            Ok(false) => {
                let what =
                    format!("{}, its TLS handshake not answered: timed out", connected(kind));
                return Err(dialling.failed(io::Error::new(io::ErrorKind::TimedOut, what)));
            }
            // Another address may be another host.
            Err(TransportError::Lost { cause, .. } | TransportError::Io { cause, .. }) => {
                return Err(dialling.failed(cause));
            }
            Err(error) => return Err(error),
        }
        // A fresh socket has room for these few bytes, always.
        match dialling.connection.send(&preamble, SendFlags::DONTWAIT) {
            Ok(sent) if sent == preamble.len() => {
                let Dialling { connection, deadline } = dialling;
                Ok(Dialled { connection, kind, deadline })
            }
            Ok(_) => Err(dialling.failed(io::ErrorKind::WriteZero.into())),
            Err(errno) => {
                dialling.connection.check()?;
                let distrust = dialling.connection.distrust();
                Err(distrust.unwrap_or_else(|| dialling.failed(errno.into())))
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
    pub(crate) fn begin(
        way: Way,
        preamble: &Preamble,
        options: &TcpOptions,
        trust: &Trust,
        state: &Arc<LinkState>,
    ) -> Result<Self, TransportError> {
        let dialling = Dialling::begin(way, options, trust, state)?;
        Connected::after(dialling)?.greet(preamble, options, trust)
    }

    /// On a connection that there is.
    pub(crate) fn over(
        given: Given,
        preamble: &Preamble,
        options: &TcpOptions,
        trust: &Trust,
        state: &Arc<LinkState>,
    ) -> Result<Self, TransportError> {
        let Given { socket, peer } = given;
        let connection = state.adopt(trust.wire(socket, peer)?, peer)?;
        let deadline = deadline_after(Some(options.connect_timeout));
        Connected(Dialling { connection, deadline }).greet(preamble, options, trust)
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
                        let what =
                            format!("{}, its preamble not answered: timed out", connected(kind));
                        return Err(failed(io::Error::new(io::ErrorKind::TimedOut, what)));
                    }
                }
                Err(errno) => {
                    connection.check()?;
                    return Err(connection.distrust().unwrap_or_else(|| failed(errno.into())));
                }
            }
        }
        match Answer::decode(&bytes) {
            Ok(Answer { status: Status::Ok, .. }) => {
                if kind != Kind::Control {
                    connection.leave_to_kernel()?;
                }
                Ok(connection)
            }
            Ok(Answer { status: Status::Insecure, reason }) => {
                let reason = format!("it says: {reason}");
                Err(TransportError::Security { address: address(), reason })
            }
            Ok(Answer { reason, .. }) => {
                let reason = match kind {
                    Kind::Control => reason,
                    Kind::Data { .. } | Kind::Lane { .. } => {
                        format!("{}, and then: {reason}", connected(kind))
                    }
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
        Kind::Lane { lane } => format!("lane {lane} is connected"),
    }
}

/// Starts to connect; the socket is left in non-blocking mode.
fn start(way: Way, options: &TcpOptions) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(way.to), Type::STREAM, Some(Protocol::TCP))?;
    options.apply_buffers(&socket)?;
    options.apply(&socket)?;
    options.apply_source(&socket, way)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::from(way.to)) {
        Err(error) if error.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error()) => Err(error),
        _ => Ok(socket),
    }
}
