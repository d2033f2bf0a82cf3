//! A connection from outside, before it is part of a link; and one that never will be.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;

use crate::framing::refusal;
use crate::preamble::{Answer, Status};
use crate::tls::{Broken, HANDSHAKE_BYTE, Stage};
use crate::wire::{Seal, Wire};
use pageferry::transport::reception::TurnedAway;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

/// A connection from outside.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) wire: Wire,
    pub(crate) peer: SocketAddr,
    /// Whether its preamble was answered.
    answered: bool,
    /// Whether its other side understands what is said to it: not before a handshake is done.
    hears: bool,
}

impl Incoming {
    pub(crate) fn new(wire: Wire, peer: SocketAddr) -> Self {
        let hears = wire.seal() == Seal::Plain;
        Self { wire, peer, answered: false, hears }
    }

    /// Takes some of what has come, without waiting.
    pub(crate) fn receive(&self, into: &mut [u8]) -> Result<usize, Errno> {
        self.wire.receive(into, RecvFlags::DONTWAIT)
    }

    /// Takes what has come and throws it away, as it came.
    pub(crate) fn discard(&self) -> Result<usize, Errno> {
        let mut unwanted = [0; 4096];
        let flags = RecvFlags::DONTWAIT;
        rustix::io::retry_on_intr(|| rustix::net::recv(&self.wire, &mut unwanted, flags))
            .map(|(_, received)| received)
    }

    /// Goes on with a handshake.
    pub(crate) fn shake_hands(&mut self) -> Result<Stage, Broken> {
        let stage = self.wire.shake_hands();
        self.hears |= matches!(stage, Ok(Stage::Done));
        stage
    }

    /// Whether its first byte is one of TLS; it stays where it is.
    pub(crate) fn speaks_tls(&self) -> Result<bool, Errno> {
        let mut byte = [0];
        match self.peek(&mut byte)? {
            0 => Err(Errno::PIPE),
            _ => Ok(byte[0] == HANDSHAKE_BYTE),
        }
    }

    fn peek(&self, into: &mut [u8]) -> Result<usize, Errno> {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        rustix::io::retry_on_intr(|| rustix::net::recv(&self.wire, &mut *into, flags))
            .map(|(_, received)| received)
    }

    /// Whether its other side has hung up, as far as is known.
    pub(crate) fn has_left(&self) -> bool {
        !matches!(self.peek(&mut [0]), Ok(1..) | Err(Errno::AGAIN))
    }

    /// Whether its other side has shut its half, whatever of that is unread.
    pub(crate) fn has_hung_up(&self) -> bool {
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut polled = [PollFd::new(&self.wire, PollFlags::RDHUP)];
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
        match (self.answered, self.hears) {
            (true, _) => self.say(&refusal(&answer)),
            (false, true) => self.say(&answer.encode()),
            // An alert was sent, or it has to do without.
            (false, false) => Ok(()),
        }
    }

    /// Says why it is turned away to somebody who speaks no TLS.
    pub(crate) fn refuse_plainly(&self, status: Status, reason: &str) -> io::Result<()> {
        let answer = Answer { status, reason: reason.to_owned() }.encode();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        rustix::net::send(self.wire.as_fd(), &answer, flags)?;
        Ok(())
    }

    /// The few bytes always fit in the buffer of a fresh socket, so this never waits.
    fn say(&self, bytes: &[u8]) -> io::Result<()> {
        if self.wire.send(bytes, SendFlags::DONTWAIT)? < bytes.len() {
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

    /// This side does not speak TLS.
    pub(crate) fn speaks_tls(incoming: Incoming) -> Self {
        let reason =
            "the source speaks TLS, and the destination has neither certificate nor key".to_owned();
        Self { incoming, status: Status::Insecure, reason }
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
