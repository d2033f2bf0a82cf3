//! Control frames over two pipes, one each way.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use pageferry::transport::reception::TurnedAway;
use pageferry::transport::{
    ControlChannel, ControlReceiver, ControlSender, TransportError, check_frame,
};

use crate::dial::LINGER;
use crate::frames::{END, HEAD_BYTES, PIECE, REFUSED};
use crate::inbox::Inbox;
use crate::pipe::{KEEPALIVE, Outlet, SLOT_BYTES};

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

/// Both halves. Who receives looks after the outlet, too, for as long as it is there: a sender may have
/// nothing to send for minutes, and the other side asks meanwhile whether anybody is here.
pub(crate) fn channel(outlet: Outlet, inbox: &Arc<Inbox>) -> ControlChannel {
    let outlet = Arc::new(Mutex::new(outlet));
    let receiver =
        RdmaControlReceiver { inbox: Arc::clone(inbox), outlet: Arc::downgrade(&outlet) };
    let sender = RdmaControlSender { outlet, inbox: Arc::clone(inbox), broken: false };
    ControlChannel { sender: Box::new(sender), receiver: Box::new(receiver) }
}

#[derive(Debug)]
struct RdmaControlSender {
    outlet: Arc<Mutex<Outlet>>,
    /// Closed after the last word: closing it ends the other side's half.
    inbox: Arc<Inbox>,
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
        check_frame(frame)?;
        let deadline = Instant::now().checked_add(timeout);
        let mut outlet = locked(&self.outlet);
        outlet.check()?;
        if self.broken {
            let cause = io::ErrorKind::NotConnected.into();
            return Err(TransportError::Lost { operation: OPERATION, cause });
        }
        // Before the answer can come.
        outlet.connection.state.link.fate.note_told();
        let result = put(&mut outlet, frame, deadline);
        self.broken = result.is_err();
        result.map_err(|error| match self.inbox.explain(error) {
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
        if outlet.connection.state.link.fate.was_displaced() && !self.broken {
            return refuse(&mut outlet, &TurnedAway::Displaced.to_string());
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
    inbox: Arc<Inbox>,
    /// The other half's.
    outlet: Weak<Mutex<Outlet>>,
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
}

impl ControlReceiver for RdmaControlReceiver {
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Vec<u8>, TransportError> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            self.attend();
            if let Some(frame) = self.inbox.next()? {
                return Ok(frame);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(TransportError::TimedOut {
                    operation: "receive a control frame",
                    after: timeout.unwrap_or_default(),
                });
            }
            self.inbox.sleep(left.map_or(KEEPALIVE, |left| left.min(KEEPALIVE)))?;
        }
    }
}
