//! The control channel over its connection.

use std::io::IoSlice;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::transport::stream::{FRAME_HEADER_BYTES, FrameHeader};
use pageferry::transport::{
    ControlChannel, ControlReceiver, ControlSender, TransportError, check_frame,
};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::SendFlags;

use crate::connection::Connection;
use crate::inbox::{Inbox, RECEIVING};
use crate::waiting::deadline_after;

const SENDING: &str = "send a control frame";

/// Both halves.
pub(crate) fn channel(inbox: Arc<Inbox>) -> ControlChannel {
    let connection = Arc::clone(inbox.connection());
    let sender = TcpControlSender { connection, inbox: Arc::clone(&inbox), broken: false };
    ControlChannel { sender: Box::new(sender), receiver: Box::new(TcpControlReceiver { inbox }) }
}

#[derive(Debug)]
struct TcpControlSender {
    connection: Arc<Connection>,
    inbox: Arc<Inbox>,
    /// Half a frame may be out: nothing sensible can follow it.
    broken: bool,
}

impl TcpControlSender {
    /// Sends header and frame; false if the deadline comes first.
    fn put(&self, frame: &[u8], deadline: Option<Instant>) -> Result<bool, TransportError> {
        let header = FrameHeader::of(frame).encode();
        let total = FRAME_HEADER_BYTES + frame.len();
        let mut sent = 0;
        while sent < total {
            let left_of_header = &header[sent.min(FRAME_HEADER_BYTES)..];
            let left_of_frame = &frame[sent.saturating_sub(FRAME_HEADER_BYTES)..];
            let pieces = [IoSlice::new(left_of_header), IoSlice::new(left_of_frame)];
            match self.connection.send_pieces(&pieces, SendFlags::DONTWAIT) {
                Ok(more) => sent += more,
                Err(Errno::AGAIN) => {
                    if self.connection.wait(PollFlags::OUT, deadline)?.is_empty() {
                        self.connection.check()?;
                        return Ok(false);
                    }
                }
                Err(errno) => {
                    self.inbox.look_for_the_end();
                    return Err(self.connection.failed(SENDING, errno.into()));
                }
            }
        }
        let flushed = self.connection.flush(deadline);
        let flushed = flushed.map_err(|errno| {
            self.inbox.look_for_the_end();
            self.connection.failed(SENDING, errno.into())
        })?;
        if !flushed {
            self.connection.check()?;
        }
        Ok(flushed)
    }
}

impl ControlSender for TcpControlSender {
    fn send(&mut self, frame: &[u8], timeout: Duration) -> Result<(), TransportError> {
        self.connection.check()?;
        check_frame(frame)?;
        if self.broken {
            return Err(self.connection.failed(SENDING, Errno::NOTCONN.into()));
        }
        // Before the answer can come.
        self.connection.fate().note_told();
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

#[derive(Debug)]
struct TcpControlReceiver {
    inbox: Arc<Inbox>,
}

impl ControlReceiver for TcpControlReceiver {
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Vec<u8>, TransportError> {
        let deadline = deadline_after(timeout);
        loop {
            if let Some(frame) = self.inbox.next()? {
                return Ok(frame);
            }
            if self.inbox.connection().wait(PollFlags::IN, deadline)?.is_empty() {
                let after = timeout.unwrap_or_default();
                return Err(TransportError::TimedOut { operation: RECEIVING, after });
            }
        }
    }
}
