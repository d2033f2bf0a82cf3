//! The control channel over its connection.

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::transport::stream::StreamError;
use pageferry::transport::{
    ControlChannel, ControlReceiver, ControlSender, MAX_FRAME_BYTES, TransportError,
};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};

use crate::connection::{Connection, deadline_after};
use crate::framing::LENGTH_BYTES;
use crate::preamble::{ANSWER_BYTES, Answer, Status};

const SENDING: &str = "send a control frame";
const RECEIVING: &str = "receive a control frame";

pub(crate) fn at_source(connection: &Arc<Connection>) -> ControlChannel {
    channel(connection, true, None)
}

/// With the first frame, if that has come.
pub(crate) fn at_destination(
    connection: &Arc<Connection>,
    first: Option<Vec<u8>>,
) -> ControlChannel {
    channel(connection, false, first)
}

fn channel(
    connection: &Arc<Connection>,
    may_be_refused: bool,
    first: Option<Vec<u8>>,
) -> ControlChannel {
    ControlChannel {
        sender: Box::new(TcpControlSender { connection: Arc::clone(connection), broken: false }),
        receiver: Box::new(TcpControlReceiver {
            connection: Arc::clone(connection),
            first,
            may_be_refused,
            length: [0; LENGTH_BYTES],
            frame: Vec::new(),
            filled: 0,
            broken: None,
        }),
    }
}

#[derive(Debug)]
struct TcpControlSender {
    connection: Arc<Connection>,
    /// Half a frame may be out: nothing sensible can follow it.
    broken: bool,
}

impl TcpControlSender {
    /// Sends length and frame; false if the deadline comes first.
    fn put(&self, frame: &[u8], deadline: Option<Instant>) -> Result<bool, TransportError> {
        // Cannot fail: the length was checked.
        let length = u32::try_from(frame.len()).unwrap_or(u32::MAX).to_le_bytes();
        let total = LENGTH_BYTES + frame.len();
        let mut sent = 0;
        while sent < total {
            let left_of_length = &length[sent.min(LENGTH_BYTES)..];
            let left_of_frame = &frame[sent.saturating_sub(LENGTH_BYTES)..];
            let result = rustix::net::sendmsg(
                &self.connection,
                &[IoSlice::new(left_of_length), IoSlice::new(left_of_frame)],
                &mut SendAncillaryBuffer::default(),
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            );
            match result {
                Ok(more) => sent += more,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if self.connection.wait(PollFlags::OUT, deadline)?.is_empty() {
                        self.connection.check()?;
                        return Ok(false);
                    }
                }
                Err(errno) => return Err(self.connection.failed(SENDING, errno.into())),
            }
        }
        Ok(true)
    }
}

impl ControlSender for TcpControlSender {
    fn send(&mut self, frame: &[u8], timeout: Duration) -> Result<(), TransportError> {
        self.connection.check()?;
        if frame.is_empty() {
            let cause = io::Error::new(io::ErrorKind::InvalidInput, "the frame is empty");
            return Err(TransportError::Io { operation: SENDING, cause });
        }
        if frame.len() > MAX_FRAME_BYTES {
            return Err(TransportError::TooLarge {
                what: "control frame",
                size: frame.len() as u64,
                limit: MAX_FRAME_BYTES as u64,
            });
        }
        if self.broken {
            return Err(self.connection.failed(SENDING, Errno::NOTCONN.into()));
        }
        // Before the answer can come.
        self.connection.note_told();
        let sent = self.put(frame, deadline_after(Some(timeout)));
        self.broken = !matches!(sent, Ok(true));
        if self.broken {
            self.connection.shutdown(Shutdown::Write);
        }
        if sent? {
            return Ok(());
        }
        Err(TransportError::TimedOut { operation: SENDING, after: timeout })
    }
}

impl Drop for TcpControlSender {
    fn drop(&mut self) {
        // The other side reads the end of the stream, and so `Closed`.
        self.connection.shutdown(Shutdown::Write);
    }
}

/// Keeps what it has of a frame over calls, so a timeout in the middle of one loses nothing.
#[derive(Debug)]
struct TcpControlReceiver {
    connection: Arc<Connection>,
    /// Came before anybody asked for it.
    first: Option<Vec<u8>>,
    may_be_refused: bool,
    length: [u8; LENGTH_BYTES],
    /// As long as the length says once that is known, empty before.
    frame: Vec<u8>,
    /// Bytes there of length and frame together.
    filled: usize,
    broken: Option<Broken>,
}

/// Why nothing more is received.
#[derive(Debug, Clone)]
enum Broken {
    Malformed(StreamError),
    Refused(String),
}

impl TcpControlReceiver {
    /// Where the next bytes go; empty when the frame is complete.
    fn room(&mut self) -> &mut [u8] {
        if self.filled < LENGTH_BYTES {
            &mut self.length[self.filled..]
        } else {
            &mut self.frame[self.filled - LENGTH_BYTES..]
        }
    }

    /// Makes room for the frame once its length is known.
    fn prepare(&mut self) -> Result<(), Broken> {
        let announced = u32::from_le_bytes(self.length);
        let length = match usize::try_from(announced) {
            Ok(0) if self.may_be_refused => ANSWER_BYTES,
            Ok(length @ 1..=MAX_FRAME_BYTES) => length,
            _ => return Err(Broken::Malformed(StreamError::FrameLength(announced))),
        };
        self.frame = vec![0; length];
        Ok(())
    }

    /// The frame that is whole; or why it is none, but the end.
    fn take(&mut self) -> Result<Vec<u8>, Broken> {
        self.filled = 0;
        let frame = std::mem::take(&mut self.frame);
        if self.length != [0; LENGTH_BYTES] {
            self.connection.note_heard();
            return Ok(frame);
        }
        let answer = frame.first_chunk().map(Answer::decode);
        match answer {
            Some(Ok(Answer { status, reason })) if status != Status::Ok => {
                Err(Broken::Refused(reason))
            }
            _ => Err(Broken::Malformed(StreamError::FrameLength(0))),
        }
    }

    /// Nothing more is received.
    fn break_off(&mut self, why: Broken) -> TransportError {
        self.connection.shutdown(Shutdown::Both);
        let error = self.error(&why);
        self.broken = Some(why);
        error
    }

    fn error(&self, why: &Broken) -> TransportError {
        match why {
            Broken::Malformed(error) => (*error).into(),
            Broken::Refused(reason) => TransportError::Refused {
                address: self.connection.peer().to_string(),
                reason: reason.clone(),
            },
        }
    }
}

impl ControlReceiver for TcpControlReceiver {
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Vec<u8>, TransportError> {
        let connection = Arc::clone(&self.connection);
        connection.check()?;
        if let Some(why) = &self.broken {
            return Err(self.error(why));
        }
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        let deadline = deadline_after(timeout);
        let mut flags = RecvFlags::DONTWAIT;
        loop {
            match connection.receive(self.room(), flags) {
                Ok(0) if self.filled == 0 && !connection.is_lost() => {
                    connection.check()?;
                    return Err(TransportError::Closed);
                }
                Ok(0) => return Err(connection.ended(RECEIVING)),
                Ok(received) => {
                    self.filled += received;
                    if self.filled == LENGTH_BYTES
                        && let Err(why) = self.prepare()
                    {
                        return Err(self.break_off(why));
                    }
                    if self.filled == LENGTH_BYTES + self.frame.len() {
                        return self.take().map_err(|why| self.break_off(why));
                    }
                }
                // Without a deadline the next `recv` may as well do the waiting.
                Err(Errno::AGAIN) if deadline.is_none() => flags = RecvFlags::empty(),
                Err(Errno::AGAIN) => {
                    if connection.wait(PollFlags::IN, deadline)?.is_empty() {
                        let after = timeout.unwrap_or_default();
                        return Err(TransportError::TimedOut { operation: RECEIVING, after });
                    }
                }
                Err(errno) => return Err(connection.failed(RECEIVING, errno.into())),
            }
        }
    }
}
