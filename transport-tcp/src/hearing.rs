//! Connections that are there already: what one is, and what the source says it is for.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::transport::{LinkId, TransportError};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use socket2::{Protocol, Socket, Type};

use crate::connection::{Connection, LinkState};
use crate::options::TcpOptions;
use crate::preamble::{Answer, Kind, PREAMBLE_BYTES, Preamble, Status, check_start};
use crate::trust::Doorkeeper;
use crate::waiting::deadline_after;

const HEARING: &str = "hear what a socket is for";
pub(crate) const TAKING: &str = "take a socket that was given";

/// What stands for the address of a socket that has none of this kind (unix, vsock).
const NAMELESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// One that was looked at.
#[derive(Debug)]
pub(crate) struct Given {
    pub(crate) socket: Socket,
    pub(crate) peer: SocketAddr,
}

impl Given {
    pub(crate) fn new(socket: OwnedFd, options: &TcpOptions) -> io::Result<Self> {
        let socket = Socket::from(socket);
        if socket.r#type()? != Type::STREAM {
            let why = "it is no stream (SOCK_STREAM)";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let peer = socket.peer_addr()?.as_socket().unwrap_or(NAMELESS);
        if socket.protocol()? == Some(Protocol::TCP) {
            options.apply(&socket)?;
        }
        Ok(Self { socket, peer })
    }
}

/// Fails where there are fewer sockets than data channels or lanes to be opened.
pub(crate) fn enough<T>(given: &[T], channels: u16) -> Result<(), TransportError> {
    let wanted = usize::from(channels);
    if given.len() < wanted {
        let why = format!("{} sockets are left, for {channels} data channels", given.len());
        let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
        return Err(TransportError::Io { operation: "open data channels", cause });
    }
    Ok(())
}

/// The destination's, of which some may have said what they are for.
#[derive(Debug)]
pub(crate) struct GivenChannels(pub(crate) Vec<Hearing>);

impl GivenChannels {
    /// Waits until the source has opened so many, in their order: first the data channels, and then lanes.
    pub(crate) fn open(
        &mut self,
        id: LinkId,
        kind: impl Fn(u16) -> Kind,
        count: u16,
        timeout: Duration,
    ) -> Result<Vec<Arc<Connection>>, TransportError> {
        enough(&self.0, count)?;
        let deadline = deadline_after(Some(timeout));
        for number in 0..count {
            let hearing = &mut self.0[usize::from(number)];
            if hearing.answered {
                continue;
            }
            let preamble = hearing.hear(deadline, timeout)?;
            if preamble != (Preamble { id, kind: kind(number) }) {
                return Err(self.refuse());
            }
            hearing.answer()?;
            hearing.connection.leave_to_kernel()?;
        }
        Ok(self.0.drain(..usize::from(count)).map(|hearing| hearing.connection).collect())
    }

    /// The source waits for one answer after the other.
    fn refuse(&self) -> TransportError {
        let what = "another channel's preamble: the sockets are in another order at the other end";
        for hearing in self.0.iter().filter(|hearing| !hearing.answered) {
            hearing.refuse(what);
        }
        TransportError::Violation(what)
    }
}

/// A socket on which the source says what it is for. What has come of that stays, however often it is waited for.
#[derive(Debug)]
pub(crate) struct Hearing {
    pub(crate) connection: Arc<Connection>,
    bytes: [u8; PREAMBLE_BYTES],
    filled: usize,
    answered: bool,
}

impl Hearing {
    pub(crate) fn new(
        given: Given,
        options: &TcpOptions,
        state: &Arc<LinkState>,
    ) -> Result<Self, TransportError> {
        let Given { socket, peer } = given;
        socket
            .set_nonblocking(false)
            .map_err(|cause| TransportError::Io { operation: TAKING, cause })?;
        let wire =
            Doorkeeper::new(options.security.clone()).wire(socket).map_err(|distrusted| {
                TransportError::Security { address: peer.to_string(), reason: distrusted.why }
            })?;
        let connection = state.adopt(wire, peer)?;
        Ok(Self { connection, bytes: [0; PREAMBLE_BYTES], filled: 0, answered: false })
    }

    pub(crate) fn hear(
        &mut self,
        deadline: Option<Instant>,
        after: Duration,
    ) -> Result<Preamble, TransportError> {
        if !self.connection.secure(HEARING, deadline)? {
            return Err(TransportError::TimedOut { operation: HEARING, after });
        }
        while self.filled < PREAMBLE_BYTES {
            match self.connection.receive(&mut self.bytes[self.filled..], RecvFlags::DONTWAIT) {
                Ok(0) => return Err(self.connection.ended(HEARING)),
                Ok(received) => self.filled += received,
                Err(Errno::AGAIN) => {
                    if self.connection.wait(PollFlags::IN, deadline)?.is_empty() {
                        self.connection.check()?;
                        return Err(TransportError::TimedOut { operation: HEARING, after });
                    }
                }
                Err(errno) => return Err(self.connection.failed(HEARING, errno.into())),
            }
            if check_start(&self.bytes[..self.filled]).is_err() {
                break;
            }
        }
        Preamble::decode(&self.bytes)
            .map_err(|_| self.refuse("no preamble of this transport, or of another version"))
    }

    pub(crate) fn answer(&mut self) -> Result<(), TransportError> {
        self.say(Status::Ok, "")?;
        self.answered = true;
        Ok(())
    }

    /// Tells the source, which waits for an answer.
    pub(crate) fn refuse(&self, what: &'static str) -> TransportError {
        // Should it be gone, nobody misses that.
        let _ = self.say(Status::Malformed, what);
        self.connection.check().err().unwrap_or(TransportError::Violation(what))
    }

    /// The few bytes fit in the buffer of a socket on which nothing was said.
    fn say(&self, status: Status, reason: &str) -> Result<(), TransportError> {
        const ANSWERING: &str = "answer on a socket that was given";
        let answer = Answer { status, reason: reason.to_owned() }.encode();
        match self.connection.send(&answer, SendFlags::DONTWAIT) {
            Ok(sent) if sent == answer.len() => Ok(()),
            Ok(_) => Err(self.connection.failed(ANSWERING, io::ErrorKind::WriteZero.into())),
            Err(errno) => Err(self.connection.failed(ANSWERING, errno.into())),
        }
    }
}
