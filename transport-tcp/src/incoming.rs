//! A connection from outside, before it is part of a link; and one that never will be.

use std::io;
use std::net::SocketAddr;

use pageferry::transport::reception::TurnedAway;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use socket2::Socket;

use crate::framing::refusal;
use crate::preamble::{Answer, Status};

/// A connection from outside.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) socket: Socket,
    pub(crate) peer: SocketAddr,
    /// Whether its preamble was answered.
    answered: bool,
}

impl Incoming {
    pub(crate) fn new(socket: Socket, peer: SocketAddr) -> Self {
        Self { socket, peer, answered: false }
    }

    /// Takes some of what has come, without waiting.
    pub(crate) fn receive(&self, into: &mut [u8]) -> Result<usize, Errno> {
        let flags = RecvFlags::DONTWAIT;
        rustix::io::retry_on_intr(|| rustix::net::recv(&self.socket, &mut *into, flags))
            .map(|(_, received)| received)
    }

    /// Whether its other side has hung up, as far as is known.
    pub(crate) fn has_left(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let mut byte = [0];
        let peeked =
            rustix::io::retry_on_intr(|| rustix::net::recv(&self.socket, &mut byte, flags));
        !matches!(peeked, Ok((_, 1..)) | Err(Errno::AGAIN))
    }

    /// Whether its other side has shut its half, whatever of that is unread.
    pub(crate) fn has_hung_up(&self) -> bool {
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut polled = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let looked = rustix::io::retry_on_intr(|| poll(&mut polled, Some(&Timespec::default())));
        looked.is_ok() && polled[0].revents().intersects(gone)
    }

    pub(crate) fn is_answered(&self) -> bool {
        self.answered
    }

    /// Answers a good preamble.
    pub(crate) fn let_in(&mut self) -> io::Result<()> {
        self.say(&Answer { status: Status::Ok, reason: String::new() }.encode())?;
        self.answered = true;
        Ok(())
    }

    /// Says why it is turned away.
    pub(crate) fn refuse(&self, status: Status, reason: &str) -> io::Result<()> {
        let answer = Answer { status, reason: reason.to_owned() };
        if self.answered { self.say(&refusal(&answer)) } else { self.say(&answer.encode()) }
    }

    /// The few bytes always fit in the buffer of a fresh socket, so this never waits.
    fn say(&self, bytes: &[u8]) -> io::Result<()> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = rustix::io::retry_on_intr(|| rustix::net::send(&self.socket, bytes, flags))?;
        if sent < bytes.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }
}

/// A connection that was not taken, for somebody to turn away.
#[derive(Debug)]
pub(crate) struct Unwanted {
    pub(crate) incoming: Incoming,
    pub(crate) status: Status,
    pub(crate) reason: String,
}

impl Unwanted {
    /// It said what no peer says, or not enough.
    pub(crate) fn malformed(incoming: Incoming, reason: String) -> Self {
        Self { incoming, status: Status::Malformed, reason }
    }

    /// Its migration is not served here.
    pub(crate) fn unknown(incoming: Incoming) -> Self {
        let reason = TurnedAway::Unknown.to_string();
        Self { incoming, status: Status::UnknownMigration, reason }
    }

    /// There is no room for more that wait.
    pub(crate) fn crowded(incoming: Incoming) -> Self {
        Self { incoming, status: Status::Busy, reason: TurnedAway::Crowded.to_string() }
    }

    /// Another one keeps its place.
    pub(crate) fn busy(incoming: Incoming) -> Self {
        Self { incoming, status: Status::Busy, reason: TurnedAway::Busy.to_string() }
    }
}
