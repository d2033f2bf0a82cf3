//! One TLS session over a socket, without waiting: a handshake in steps, then bytes either way.

use std::fmt;
use std::io::{self, BufRead, ErrorKind, IoSlice, Read, Write};
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use rustls::{Connection, Error, ExtractedSecrets};

use crate::preamble::Answer;

/// What stands for a failure of TLS among those of system calls: the socket has bytes, and they are of no use.
pub(crate) const FAILED: Errno = Errno::BADMSG;

/// Read from a socket at once: a few records. A stranger gets the first figure.
const STRANGER_BYTES: usize = 4 << 10;
const READ_BYTES: usize = 256 << 10;
/// Type, version and length of a record (RFC 8446, section 5.1).
const HEADER_BYTES: usize = 5;
/// Most that is encrypted before the socket has taken it.
const MOST_UNSENT_BYTES: usize = 256 << 10;

/// How far a handshake is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Waits for the other side.
    Hears,
    /// Waits for room.
    Says,
    Done,
}

/// Why a session is over.
#[derive(Debug)]
pub(crate) enum Broken {
    /// TLS says so.
    Tls {
        /// Why.
        error: Error,
        /// What the other side has said in plain text instead, if that is what it speaks.
        plainly: Option<String>,
    },
    /// The socket.
    Socket(Errno),
    /// The other side hung up.
    Ended,
}

pub(crate) struct Session {
    tls: Connection,
    /// What came and is not taken apart yet: `raw[taken..filled]`.
    raw: Vec<u8>,
    taken: usize,
    filled: usize,
    /// Of the record that is being taken apart, what is still to come: rustls gets one at a time, so that it holds nothing
    /// of the next one.
    record_left: usize,
    /// Why it failed: the first time, which is told ever after.
    failure: Option<Error>,
    /// Nothing more goes out: the other side, or this one, has ended that direction.
    mute: bool,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("failure", &self.failure).finish_non_exhaustive()
    }
}

impl Session {
    pub(crate) fn new(mut tls: Connection) -> Self {
        tls.set_buffer_limit(Some(MOST_UNSENT_BYTES));
        Self {
            tls,
            raw: Vec::new(),
            taken: 0,
            filled: 0,
            record_left: 0,
            failure: None,
            mute: false,
        }
    }

    /// Goes on with the handshake.
    pub(crate) fn shake_hands(&mut self, socket: BorrowedFd<'_>) -> Result<Stage, Broken> {
        loop {
            match self.flush(socket) {
                Ok(()) => {}
                Err(Errno::AGAIN) => return Ok(Stage::Says),
                Err(errno) => return Err(self.broken(errno)),
            }
            if !self.tls.is_handshaking() {
                return Ok(Stage::Done);
            }
            match self.feed(socket).and_then(|fed| if fed { Ok(1) } else { self.fill(socket) }) {
                Ok(1..) => {}
                Ok(0) => return Err(Broken::Ended),
                Err(Errno::AGAIN) => return Ok(Stage::Hears),
                Err(errno) => return Err(self.broken(errno)),
            }
        }
    }

    /// Takes some of what has come; 0 is the end.
    pub(crate) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        into: &mut [u8],
    ) -> Result<usize, Errno> {
        loop {
            match self.tls.reader().read(into) {
                Ok(received) => return Ok(received),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return Err(self.failed(Error::DecryptError)),
            }
            if !self.feed(socket)? && self.fill(socket)? == 0 {
                return Ok(0);
            }
        }
    }

    /// Whether there is something to take that the socket does not know of.
    pub(crate) fn has_more(&mut self) -> bool {
        self.next_bytes() > 0 || self.tls.reader().fill_buf().is_ok()
    }

    /// Encrypts some, and sends what there is room for; how many were taken.
    pub(crate) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Result<usize, Errno> {
        self.flush(socket)?;
        if self.mute {
            return Err(Errno::PIPE);
        }
        let taken = self.tls.writer().write_vectored(pieces).map_err(|_| FAILED)?;
        match self.flush(socket) {
            Ok(()) | Err(Errno::AGAIN) => Ok(taken),
            Err(errno) => Err(errno),
        }
    }

    /// Whether something was taken and is not sent.
    pub(crate) fn is_unsent(&self) -> bool {
        !self.mute && self.tls.wants_write()
    }

    /// Gives up what is unsent, and what would follow; what comes in still does.
    pub(crate) fn mute(&mut self) {
        self.mute = true;
    }

    /// What somebody has said who does not speak TLS. Anybody on the way may have.
    pub(crate) fn plain_answer(&self) -> Option<String> {
        let bytes = self.raw.get(..self.filled)?.first_chunk()?;
        Answer::decode(bytes).ok().map(|answer| answer.reason).filter(|reason| !reason.is_empty())
    }

    /// Sends what was taken.
    pub(crate) fn flush(&mut self, socket: BorrowedFd<'_>) -> Result<(), Errno> {
        while self.tls.wants_write() {
            if self.mute {
                return Err(Errno::PIPE);
            }
            self.tls.write_tls(&mut Outgoing(socket)).map_err(|error| errno_of(&error))?;
        }
        Ok(())
    }

    pub(crate) fn failure(&self) -> Option<&Error> {
        self.failure.as_ref()
    }

    /// The keys, for who goes on without this. Nothing may be under way, which no peer brings about: the first record
    /// behind a preamble and its answer is for who goes on.
    pub(crate) fn into_secrets(mut self) -> Result<ExtractedSecrets, Error> {
        let under_way = self.taken < self.filled || self.record_left > 0 || self.has_more();
        if under_way || self.is_unsent() {
            return Err(Error::General("something came before it was due".to_owned()));
        }
        match self.tls {
            Connection::Client(client) => client.dangerous_extract_secrets(),
            Connection::Server(server) => server.dangerous_extract_secrets(),
        }
    }

    /// Reads from the socket what is there.
    fn fill(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        self.raw.copy_within(self.taken..self.filled, 0);
        (self.taken, self.filled) = (0, self.filled - self.taken);
        let room = if self.tls.is_handshaking() { STRANGER_BYTES } else { READ_BYTES };
        if self.raw.len() < room {
            self.raw.resize(room, 0);
        }
        let received = rustix::io::retry_on_intr(|| {
            rustix::net::recv(socket, &mut self.raw[self.filled..], RecvFlags::DONTWAIT)
        });
        let (_, received) = received?;
        self.filled += received;
        Ok(received)
    }

    /// How much of what came can be taken apart: of one record, whose header is there.
    fn next_bytes(&self) -> usize {
        let came = &self.raw[self.taken..self.filled];
        let record = match (self.record_left, came.first_chunk::<HEADER_BYTES>()) {
            (0, None) => 0,
            (0, Some(&[_, _, _, high, low])) => {
                HEADER_BYTES + usize::from(u16::from_be_bytes([high, low]))
            }
            (left, _) => left,
        };
        record.min(came.len())
    }

    /// Takes some of that apart; whether there was any. Where it fails the other side is told why, as far as there
    /// is room.
    fn feed(&mut self, socket: BorrowedFd<'_>) -> Result<bool, Errno> {
        let bytes = self.next_bytes();
        if bytes == 0 {
            return Ok(false);
        }
        if self.record_left == 0 {
            let length = [self.raw[self.taken + 3], self.raw[self.taken + 4]];
            self.record_left = HEADER_BYTES + usize::from(u16::from_be_bytes(length));
        }
        let mut left = &self.raw[self.taken..self.taken + bytes];
        // Fails only where what it has decrypted is not taken, which `receive` does first.
        let read = self.tls.read_tls(&mut left);
        let taken = bytes - left.len();
        self.taken += taken;
        self.record_left -= taken;
        let processed = read
            .map_err(|error| Error::General(error.to_string()))
            .and_then(|_| self.tls.process_new_packets());
        match processed {
            Ok(_) => Ok(true),
            Err(error) => {
                let _ = self.flush(socket);
                Err(self.failed(error))
            }
        }
    }

    fn failed(&mut self, error: Error) -> Errno {
        self.failure.get_or_insert(error);
        FAILED
    }

    /// Of a handshake.
    fn broken(&mut self, errno: Errno) -> Broken {
        match &self.failure {
            Some(error) => Broken::Tls { error: error.clone(), plainly: self.plain_answer() },
            None => Broken::Socket(errno),
        }
    }
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(FAILED, Errno::from_raw_os_error)
}

/// What goes out, without waiting.
struct Outgoing<'a>(BorrowedFd<'a>);

impl Write for Outgoing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(self.0, pieces, &mut SendAncillaryBuffer::default(), flags)
        });
        Ok(sent?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
