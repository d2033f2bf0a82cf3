//! Control frames over two pipes, one each way.
//!
//! A frame goes as one message or several:
//!
//! ```text
//! 0  1     5
//! +--+-----+----------------
//! |1 |left | bytes of the frame
//! +--+-----+----------------
//! |2 |  the sender dropped its half in order
//! +--+
//! ```
//!
//! left: bytes of the frame from this message on, little-endian; so the first message of a frame
//! has its length.

use std::io;
use std::time::{Duration, Instant};

use pageferry::transport::{ControlReceiver, ControlSender, MAX_FRAME_BYTES, TransportError};

use crate::dial::LINGER;
use crate::pipe::{Inlet, Message, Outlet, SLOT_BYTES};

const PIECE: u8 = 1;
const END: u8 = 2;
const HEAD_BYTES: usize = 5;

#[derive(Debug)]
pub(crate) struct RdmaControlSender {
    outlet: Outlet,
    broken: bool,
}

impl RdmaControlSender {
    pub(crate) fn new(outlet: Outlet) -> Self {
        Self { outlet, broken: false }
    }

    /// Sends a frame; false if the deadline comes first.
    fn put(&mut self, frame: &[u8], deadline: Option<Instant>) -> Result<bool, TransportError> {
        let mut left = frame;
        while !left.is_empty() {
            let (now, later) = left.split_at(left.len().min(SLOT_BYTES - HEAD_BYTES));
            let mut message = vec![PIECE];
            message.extend(u32::try_from(left.len()).unwrap_or(u32::MAX).to_le_bytes());
            message.extend(now);
            if !self.outlet.message_until(&message, deadline)? {
                return Ok(false);
            }
            left = later;
        }
        // What is known by now.
        self.outlet.pump(None).map(|()| true)
    }
}

impl ControlSender for RdmaControlSender {
    fn send(&mut self, frame: &[u8], timeout: Duration) -> Result<(), TransportError> {
        if frame.is_empty() || frame.len() > MAX_FRAME_BYTES {
            return Err(TransportError::TooLarge {
                what: "control frame",
                size: frame.len() as u64,
                limit: MAX_FRAME_BYTES as u64,
            });
        }
        self.outlet.check()?;
        let operation = "send a control frame";
        if self.broken {
            let cause = io::ErrorKind::NotConnected.into();
            return Err(TransportError::Lost { operation, cause });
        }
        let sent = self.put(frame, Instant::now().checked_add(timeout));
        self.broken = !matches!(sent, Ok(true));
        if sent? {
            return Ok(());
        }
        Err(TransportError::TimedOut { operation, after: timeout })
    }
}

impl Drop for RdmaControlSender {
    fn drop(&mut self) {
        if self.broken || self.outlet.check().is_err() {
            return;
        }
        let ended = match self.outlet.try_message(&[END]) {
            Ok(_) => self.outlet.flush(LINGER),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            tracing::debug!("failed to end the control channel in order: {error}");
        }
    }
}

#[derive(Debug)]
pub(crate) struct RdmaControlReceiver {
    inlet: Inlet,
    frame: Vec<u8>,
    /// Bytes of the frame that are yet to come.
    left: usize,
    ended: bool,
}

impl RdmaControlReceiver {
    pub(crate) fn new(inlet: Inlet) -> Self {
        Self { inlet, frame: Vec::new(), left: 0, ended: false }
    }

    /// Takes a message in; true if it completes a frame.
    fn take_in(&mut self, message: &[u8]) -> Result<bool, TransportError> {
        const OUT_OF_STEP: TransportError =
            TransportError::Violation("pieces of control frames that do not fit together");
        match message {
            [PIECE, rest @ ..] => {
                let (left, bytes) = rest.split_first_chunk::<4>().ok_or(OUT_OF_STEP)?;
                let left = usize::try_from(u32::from_le_bytes(*left)).unwrap_or(usize::MAX);
                let due = if self.frame.is_empty() { left } else { self.left };
                if left != due || left > MAX_FRAME_BYTES || bytes.is_empty() || bytes.len() > left {
                    return Err(OUT_OF_STEP);
                }
                self.frame.extend(bytes);
                self.left = left - bytes.len();
                Ok(self.left == 0)
            }
            [END] if self.frame.is_empty() => {
                self.ended = true;
                Ok(false)
            }
            _ => Err(OUT_OF_STEP),
        }
    }
}

impl ControlReceiver for RdmaControlReceiver {
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Vec<u8>, TransportError> {
        self.inlet.connection.check()?;
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        while !self.ended {
            match self.inlet.next(deadline)? {
                Some(Message::Bytes(message)) => {
                    if self.take_in(&message)? {
                        self.inlet.settle()?;
                        return Ok(std::mem::take(&mut self.frame));
                    }
                }
                Some(Message::Mark) => {
                    return Err(TransportError::Violation("a mark on the control channel"));
                }
                None => {
                    return Err(TransportError::TimedOut {
                        operation: "receive a control frame",
                        after: timeout.unwrap_or_default(),
                    });
                }
            }
        }
        Err(TransportError::Closed)
    }
}
