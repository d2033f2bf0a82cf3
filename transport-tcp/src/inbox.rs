//! What comes over the control connection, whichever half of the channel reads it.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::sync::{Arc, Mutex};

use pageferry::transport::stream::StreamError::FrameLength;
use pageferry::transport::{Ending, MAX_FRAME_BYTES, TransportError};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::connection::Connection;
use crate::framing::LENGTH_BYTES;
use crate::preamble::{ANSWER_BYTES, Answer, Status};
use crate::waiting::lock;

pub(crate) const RECEIVING: &str = "receive a control frame";
/// Most frames that are read before anybody asks for them.
const MOST_AHEAD: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// May hear that it is turned away.
    Source,
    /// May say so.
    Destination,
}

/// Keeps what it has of a frame over calls, so a timeout in the middle of one loses nothing.
#[derive(Debug)]
pub(crate) struct Inbox {
    connection: Arc<Connection>,
    side: Side,
    arriving: Mutex<Arriving>,
}

#[derive(Debug, Default)]
struct Arriving {
    /// Came before anybody asked for them.
    ahead: VecDeque<Vec<u8>>,
    length: [u8; LENGTH_BYTES],
    /// As long as the length says once that is known, empty before.
    frame: Vec<u8>,
    /// Bytes there of length and frame together.
    filled: usize,
    /// The length of what is no frame: nothing more is read. This side can still say so.
    malformed: Option<u32>,
}

impl Inbox {
    /// With the first frame, if that has come.
    pub(crate) fn new(connection: &Arc<Connection>, side: Side, first: Option<Vec<u8>>) -> Self {
        let arriving = Arriving { ahead: first.into_iter().collect(), ..Arriving::default() };
        Self { connection: Arc::clone(connection), side, arriving: Mutex::new(arriving) }
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// The next frame; `None` if it is not there yet.
    pub(crate) fn next(&self) -> Result<Option<Vec<u8>>, TransportError> {
        // With the lock held nobody is about to find out why the connection ends.
        let mut arriving = lock(&self.arriving);
        self.connection.check()?;
        match arriving.ahead.pop_front() {
            Some(frame) => Ok(Some(frame)),
            None => self.read(&mut arriving),
        }
    }

    /// Looks why the connection has ended, for who cannot go on with it: what the other side said about
    /// that may be here, and not read yet. It is an [`Ending`] then, which every call tells.
    pub(crate) fn look_for_the_end(&self) {
        let mut arriving = lock(&self.arriving);
        while arriving.ahead.len() < MOST_AHEAD
            && self.connection.check().is_ok()
            && let Ok(Some(frame)) = self.read(&mut arriving)
        {
            arriving.ahead.push_back(frame);
        }
    }

    /// Reads the next frame, as far as it is there.
    fn read(&self, arriving: &mut Arriving) -> Result<Option<Vec<u8>>, TransportError> {
        let connection = &self.connection;
        if let Some(length) = arriving.malformed {
            return Err(FrameLength(length).into());
        }
        loop {
            match connection.receive(arriving.room(), RecvFlags::DONTWAIT) {
                Ok(0) if arriving.filled == 0 && !connection.is_lost() => {
                    connection.check()?;
                    return Err(TransportError::Closed);
                }
                Ok(0) => return Err(connection.ended(RECEIVING)),
                Ok(received) => arriving.filled += received,
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(connection.failed(RECEIVING, errno.into())),
            }
            if arriving.filled == LENGTH_BYTES {
                arriving.prepare(self.side)?;
            }
            if arriving.filled == LENGTH_BYTES + arriving.frame.len() {
                let frame = self.take(arriving)?;
                connection.fate().note_heard();
                return Ok(Some(frame));
            }
        }
    }

    /// The frame that is whole; or why it is none, but the end.
    fn take(&self, arriving: &mut Arriving) -> Result<Vec<u8>, TransportError> {
        arriving.filled = 0;
        let frame = std::mem::take(&mut arriving.frame);
        if arriving.length != [0; LENGTH_BYTES] {
            return Ok(frame);
        }
        let answer = frame.first_chunk().map(Answer::decode);
        match answer {
            Some(Ok(Answer { status, reason })) if status != Status::Ok => {
                let by = self.connection.peer();
                // Before the connection is shut: who sends meanwhile fails for this, and not for that.
                let refused = self.connection.fate().end(Ending::Refused { by, reason });
                self.connection.shutdown(Shutdown::Both);
                Err(refused)
            }
            _ => Err(arriving.break_off(0)),
        }
    }
}

impl Arriving {
    /// Where the next bytes go; never empty.
    fn room(&mut self) -> &mut [u8] {
        if self.filled < LENGTH_BYTES {
            &mut self.length[self.filled..]
        } else {
            &mut self.frame[self.filled - LENGTH_BYTES..]
        }
    }

    /// Makes room for the frame once its length is known.
    fn prepare(&mut self, side: Side) -> Result<(), TransportError> {
        let announced = u32::from_le_bytes(self.length);
        let length = match usize::try_from(announced) {
            Ok(0) if side == Side::Source => ANSWER_BYTES,
            Ok(length @ 1..=MAX_FRAME_BYTES) => length,
            _ => return Err(self.break_off(announced)),
        };
        self.frame = vec![0; length];
        Ok(())
    }

    fn break_off(&mut self, length: u32) -> TransportError {
        self.malformed = Some(length);
        FrameLength(length).into()
    }
}
