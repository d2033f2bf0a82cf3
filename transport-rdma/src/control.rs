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
//! has its length. Marks say that somebody is there, and nothing else.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use pageferry::transport::{
    ControlChannel, ControlReceiver, ControlSender, MAX_FRAME_BYTES, TransportError,
};

use crate::dial::LINGER;
use crate::pipe::{Inlet, KEEPALIVE, Message, Outlet, SLOT_BYTES};

const PIECE: u8 = 1;
const END: u8 = 2;
const HEAD_BYTES: usize = 5;

/// Both halves. Who receives looks after the outlet, too, for as long as it is there: a sender may have
/// nothing to send for minutes, and the other side asks meanwhile whether anybody is here.
pub(crate) fn channel(outlet: Outlet, inlet: Inlet) -> ControlChannel {
    let outlet = Arc::new(Mutex::new(outlet));
    let receiver = RdmaControlReceiver {
        inlet,
        outlet: Arc::downgrade(&outlet),
        frame: Vec::new(),
        left: 0,
        ended: false,
    };
    let sender = RdmaControlSender { outlet, broken: false };
    ControlChannel { sender: Box::new(sender), receiver: Box::new(receiver) }
}

#[derive(Debug)]
struct RdmaControlSender {
    outlet: Arc<Mutex<Outlet>>,
    broken: bool,
}

fn locked(outlet: &Mutex<Outlet>) -> MutexGuard<'_, Outlet> {
    // A thread that panicked in there has left the queue pair as it is; what it counted stays true.
    outlet.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends a frame in pieces, at most until `deadline`.
fn put(outlet: &mut Outlet, frame: &[u8], deadline: Option<Instant>) -> Result<(), TransportError> {
    let mut left = frame;
    while !left.is_empty() {
        let (now, later) = left.split_at(left.len().min(SLOT_BYTES - HEAD_BYTES));
        let mut message = vec![PIECE];
        message.extend(u32::try_from(left.len()).unwrap_or(u32::MAX).to_le_bytes());
        message.extend(now);
        outlet.message(&message, deadline)?;
        left = later;
    }
    // What is known by now.
    outlet.pump(None)
}

impl ControlSender for RdmaControlSender {
    fn send(&mut self, frame: &[u8], timeout: Duration) -> Result<(), TransportError> {
        const OPERATION: &str = "send a control frame";
        if frame.is_empty() || frame.len() > MAX_FRAME_BYTES {
            return Err(TransportError::TooLarge {
                what: "control frame",
                size: frame.len() as u64,
                limit: MAX_FRAME_BYTES as u64,
            });
        }
        let deadline = Instant::now().checked_add(timeout);
        let mut outlet = locked(&self.outlet);
        outlet.check()?;
        if self.broken {
            let cause = io::ErrorKind::NotConnected.into();
            return Err(TransportError::Lost { operation: OPERATION, cause });
        }
        // Before the answer can come.
        outlet.connection.state.link.note_told();
        let result = put(&mut outlet, frame, deadline);
        self.broken = result.is_err();
        result.map_err(|error| match error {
            TransportError::TimedOut { .. } => {
                TransportError::TimedOut { operation: OPERATION, after: timeout }
            }
            error => error,
        })
    }
}

impl Drop for RdmaControlSender {
    fn drop(&mut self) {
        let mut outlet = locked(&self.outlet);
        if self.broken || outlet.check().is_err() {
            return;
        }
        let ended = match outlet.message(&[END], Some(Instant::now())) {
            Ok(_) => outlet.flush(LINGER),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            tracing::debug!("failed to end the control channel in order: {error}");
        }
    }
}

#[derive(Debug)]
struct RdmaControlReceiver {
    inlet: Inlet,
    /// The other half's.
    outlet: Weak<Mutex<Outlet>>,
    frame: Vec<u8>,
    /// Bytes of the frame that are yet to come.
    left: usize,
    ended: bool,
}

impl RdmaControlReceiver {
    /// Looks after the outlet, unless somebody sends just now. Its failure is for who sends to tell:
    /// the other side may have ended that half in order, and say more in this one.
    fn attend(&self) {
        let Some(outlet) = self.outlet.upgrade() else { return };
        let attended = match outlet.try_lock() {
            Ok(mut outlet) => outlet.attend(),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().attend(),
            Err(TryLockError::WouldBlock) => return,
        };
        if let Err(error) = attended {
            tracing::debug!("the other half of the control channel: {error}");
        }
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
            self.attend();
            let turn = Instant::now() + KEEPALIVE;
            let turn = deadline.map_or(turn, |deadline| deadline.min(turn));
            match self.inlet.next(Some(turn))? {
                Some(Message::Bytes(message)) if self.take_in(&message)? => {
                    self.inlet.settle()?;
                    return Ok(std::mem::take(&mut self.frame));
                }
                Some(_) => {}
                None if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                    return Err(TransportError::TimedOut {
                        operation: "receive a control frame",
                        after: timeout.unwrap_or_default(),
                    });
                }
                None => {}
            }
        }
        Err(TransportError::Closed)
    }
}
