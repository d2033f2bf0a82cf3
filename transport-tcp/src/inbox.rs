//! What comes over the control connection, whichever half of the channel reads it.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::sync::{Arc, Mutex};

use pageferry::transport::stream::{FRAME_HEADER_BYTES, FrameHeader, StreamError};
use pageferry::transport::{Ending, TransportError};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::connection::Connection;
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
    header: [u8; FRAME_HEADER_BYTES],
    /// Once the header is whole.
    announced: Option<FrameHeader>,
    /// As long as the header says once that is known, empty before.
    frame: Vec<u8>,
    /// Bytes there of header and frame together.
    filled: usize,
    /// Why nothing more is read: what came is no frame, or not as it was sent. This side can still say so.
    broken: Option<StreamError>,
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
        if let Some(error) = arriving.broken {
            return Err(error.into());
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
            if arriving.filled == FRAME_HEADER_BYTES {
                arriving.prepare(self.side).map_err(|error| arriving.break_off(error))?;
            }
            if arriving.filled == FRAME_HEADER_BYTES + arriving.frame.len() {
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
        let header = arriving.announced.take();
        if let Some(header) = header {
            header.check(&frame).map_err(|error| arriving.break_off(error))?;
        }
        let length = header.map_or(0, |header| header.length);
        if length != 0 {
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
            _ => Err(arriving.break_off(StreamError::FrameLength(length))),
        }
    }
}

impl Arriving {
    /// Where the next bytes go; never empty.
    fn room(&mut self) -> &mut [u8] {
        if self.filled < FRAME_HEADER_BYTES {
            &mut self.header[self.filled..]
        } else {
            &mut self.frame[self.filled - FRAME_HEADER_BYTES..]
        }
    }

    /// Makes room for the frame once its header is whole.
    fn prepare(&mut self, side: Side) -> Result<(), StreamError> {
        let header = FrameHeader::decode(&self.header)?;
        let length = match header.length {
            0 if side == Side::Source => ANSWER_BYTES,
            _ => header.frame_bytes()?,
        };
        self.announced = Some(header);
        self.frame = vec![0; length];
        Ok(())
    }

    fn break_off(&mut self, error: StreamError) -> TransportError {
        self.broken = Some(error);
        error.into()
    }
}
