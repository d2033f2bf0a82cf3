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
//! |3 |  text: the destination does not serve this source, or no longer
//! +--+
//! ```
//!
//! left: bytes of the frame from this message on, little-endian; so the first message of a frame
//! has its length. Marks say that somebody is there, and nothing else.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use pageferry::transport::{
    ControlChannel, ControlReceiver, ControlSender, MAX_FRAME_BYTES, TransportError,
};

use crate::dial::LINGER;
use crate::pipe::{Inlet, KEEPALIVE, Message, Outlet, SLOT_BYTES};

const PIECE: u8 = 1;
const END: u8 = 2;
const REFUSED: u8 = 3;
const HEAD_BYTES: usize = 5;

/// How long a source has to be told that it is turned away: its NIC, which needs nobody for that.
const FAREWELL: Duration = Duration::from_millis(100);

/// Tells a source that it is turned away. If it is gone, nobody misses it.
pub(crate) fn refuse(outlet: &mut Outlet, reason: &str) {
    let mut message = vec![REFUSED];
    message.extend(reason.bytes().take(SLOT_BYTES - 1));
    if let Err(error) = outlet.last_word(&message, FAREWELL) {
        tracing::debug!("failed to tell a source that it is turned away: {error}");
    }
}

/// Both halves at the source, of the control channel to `peer`.
pub(crate) fn at_source(outlet: Outlet, inlet: Inlet, peer: SocketAddr) -> ControlChannel {
    channel(outlet, inlet, Some(peer), None)
}

/// Both halves at the destination, and the first frame, if that has come.
pub(crate) fn at_destination(
    outlet: Outlet,
    inlet: Inlet,
    first: Option<Vec<u8>>,
) -> ControlChannel {
    channel(outlet, inlet, None, first)
}

/// Who receives looks after the outlet, too, for as long as it is there: a sender may have nothing to send
/// for minutes, and the other side asks meanwhile whether anybody is here.
fn channel(
    outlet: Outlet,
    inlet: Inlet,
    destination: Option<SocketAddr>,
    first: Option<Vec<u8>>,
) -> ControlChannel {
    let outlet = Arc::new(Mutex::new(outlet));
    let receiver = RdmaControlReceiver {
        inlet,
        outlet: Arc::downgrade(&outlet),
        destination,
        first,
        frame: Frame::default(),
        end: None,
    };
    let sender = RdmaControlSender { outlet, broken: false };
    ControlChannel { sender: Box::new(sender), receiver: Box::new(receiver) }
}

/// A frame as its pieces come.
#[derive(Debug, Default)]
pub(crate) struct Frame {
    bytes: Vec<u8>,
    left: usize,
}

impl Frame {
    /// What has come of it.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes that it will have.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() + self.left
    }

    /// Takes a piece of it; true if that completes it.
    pub(crate) fn take_in(&mut self, message: &[u8]) -> Result<bool, TransportError> {
        let [PIECE, rest @ ..] = message else { return Err(OUT_OF_STEP) };
        let (left, bytes) = rest.split_first_chunk::<4>().ok_or(OUT_OF_STEP)?;
        let left = usize::try_from(u32::from_le_bytes(*left)).unwrap_or(usize::MAX);
        let due = if self.bytes.is_empty() { left } else { self.left };
        if left != due || left > MAX_FRAME_BYTES || bytes.is_empty() || bytes.len() > left {
            return Err(OUT_OF_STEP);
        }
        self.bytes.extend(bytes);
        self.left = left - bytes.len();
        Ok(self.left == 0)
    }

    /// The frame that is whole. The next one may come.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

const OUT_OF_STEP: TransportError =
    TransportError::Violation("pieces of control frames that do not fit together");

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
        if outlet.connection.state.link.was_displaced() && !self.broken {
            return refuse(&mut outlet, "no answer to the welcome, and another source waits");
        }
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
    /// At the source: who may say that it is turned away.
    destination: Option<SocketAddr>,
    /// Came before anybody asked for it.
    first: Option<Vec<u8>>,
    frame: Frame,
    end: Option<End>,
}

/// Why nothing more comes.
#[derive(Debug, Clone)]
enum End {
    InOrder,
    Refused { address: String, reason: String },
}

impl From<&End> for TransportError {
    fn from(end: &End) -> Self {
        match end.clone() {
            End::InOrder => Self::Closed,
            End::Refused { address, reason } => Self::Refused { address, reason },
        }
    }
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
        let between_frames = self.frame.bytes().is_empty();
        self.end = match (message, self.destination) {
            ([END], _) if between_frames => Some(End::InOrder),
            ([REFUSED, reason @ ..], Some(destination)) => {
                let reason = String::from_utf8_lossy(reason);
                // It will be shown on a terminal.
                let reason = reason.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
                Some(End::Refused { address: destination.to_string(), reason })
            }
            _ => return self.frame.take_in(message),
        };
        Ok(false)
    }
}

impl ControlReceiver for RdmaControlReceiver {
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Vec<u8>, TransportError> {
        self.inlet.connection.check()?;
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            if let Some(end) = &self.end {
                return Err(end.into());
            }
            self.attend();
            let turn = Instant::now() + KEEPALIVE;
            let turn = deadline.map_or(turn, |deadline| deadline.min(turn));
            match self.inlet.next(Some(turn))? {
                Some(Message::Bytes(message)) if self.take_in(&message)? => {
                    self.inlet.settle()?;
                    self.inlet.connection.state.link.note_heard();
                    return Ok(self.frame.take());
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
    }
}
