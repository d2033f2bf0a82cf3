//! Control frames over two pipes, one each way.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use pageferry::transport::reception::TurnedAway;
use pageferry::transport::{
    ControlChannel, ControlReceiver, ControlSender, TransportError, check_frame,
};

use crate::dial::LINGER;
use crate::frames::{END, PIECE, PIECE_BYTES, REFUSED, shown};
use crate::inbox::Inbox;
use crate::pipe::{Inlet, KEEPALIVE, Message, Outlet};
use crate::seal::Seal;

/// How long a source has to be told that it is turned away: its NIC, which needs nobody for that.
const FAREWELL: Duration = Duration::from_millis(100);

/// Tells a source that it is turned away. If it is gone, nobody misses it.
pub(crate) fn refuse(outlet: &mut Outlet, seal: Option<&Seal>, reason: &str) {
    let mut message = vec![REFUSED];
    message.extend(reason.bytes().take(PIECE_BYTES));
    let said = match seal {
        // TLS has its own words for what it says no to, mostly.
        Some(seal) if seal.has_failed() => match seal.due() {
            due if due.is_empty() && seal.is_shaking_hands() => Ok(vec![message]),
            due => Ok(due),
        },
        // It may be done at the source, which takes this for what anybody may have said.
        Some(seal) if seal.is_shaking_hands() => Ok(vec![message]),
        Some(seal) => seal.seal(&message),
        None => Ok(vec![message]),
    };
    if let Err(error) = said.and_then(|said| say_last(outlet, &said)) {
        tracing::debug!("failed to tell a source that it is turned away: {error}");
    }
}

/// The last messages of a link, as far as there is room and time for them.
fn say_last(outlet: &mut Outlet, messages: &[Vec<u8>]) -> Result<(), TransportError> {
    let deadline = Instant::now() + FAREWELL;
    messages.iter().try_for_each(|message| {
        outlet.last_word(message, deadline.saturating_duration_since(Instant::now()))
    })
}

/// The source's half of a handshake. What follows from it proves whose the link's other connections are.
pub(crate) fn shake_hands(
    seal: &Seal,
    outlet: &mut Outlet,
    inlet: &mut Inlet,
    deadline: Instant,
) -> Result<(), TransportError> {
    loop {
        let due = seal.due();
        let said = due
            .iter()
            .try_for_each(|message| outlet.message(message, Some(deadline)).map(drop))
            .and_then(|()| outlet.pump(None));
        if let Err(error) = said {
            // The destination may have said why.
            while let Ok(Some(message)) = inlet.next(Some(Instant::now())) {
                hear(seal, outlet, &message)?;
            }
            return Err(error);
        }
        if !seal.is_shaking_hands() {
            return Ok(());
        }
        let message = match inlet.next(Some(deadline))? {
            Some(message) if Instant::now() < deadline => message,
            _ => {
                let reason = "its TLS handshake was not answered in time".to_owned();
                let address = seal.peer().to_string();
                return Err(TransportError::Security { address, reason });
            }
        };
        hear(seal, outlet, &message)?;
    }
}

/// Takes in what the destination says in a handshake.
fn hear(seal: &Seal, outlet: &mut Outlet, message: &Message) -> Result<(), TransportError> {
    // A mark says that somebody is there.
    let Message::Bytes(message) = message else { return Ok(()) };
    match seal.open(message) {
        Ok(said) => match &said[..] {
            [] => Ok(()),
            [REFUSED, reason @ ..] => {
                Err(outlet.connection.state.link.refuse(seal.peer(), shown(reason)))
            }
            _ => Err(TransportError::Violation("a frame before it was greeted")),
        },
        Err(unopened) => {
            // The destination is to know why, if it is there.
            if let Err(error) = say_last(outlet, &seal.due()) {
                tracing::debug!("failed to say what is wrong with a TLS handshake: {error}");
            }
            Err(seal.explain(&unopened))
        }
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

/// Sends a message. Where that fails nothing can be said behind it: a record may be missing.
fn say(
    outlet: &mut Outlet,
    seal: Option<&Seal>,
    message: &[u8],
    deadline: Option<Instant>,
) -> Result<(), TransportError> {
    match seal {
        None => outlet.message(message, deadline).map(drop),
        Some(seal) => {
            seal.seal(message)?.iter().try_for_each(|it| outlet.message(it, deadline).map(drop))
        }
    }
}

/// Sends a frame in pieces, at most until `deadline`.
fn put(
    outlet: &mut Outlet,
    seal: Option<&Seal>,
    frame: &[u8],
    deadline: Option<Instant>,
) -> Result<(), TransportError> {
    let mut left = frame;
    while !left.is_empty() {
        let (now, later) = left.split_at(left.len().min(PIECE_BYTES));
        let mut message = vec![PIECE];
        message.extend(u32::try_from(left.len()).unwrap_or(u32::MAX).to_le_bytes());
        message.extend(now);
        say(outlet, seal, &message, deadline)?;
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
        let result = put(&mut outlet, self.inbox.seal(), frame, deadline);
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
        // A record may be missing before it, where there is TLS.
        let mute = self.broken && self.inbox.seal().is_some();
        if outlet.connection.state.link.fate.was_displaced() && !mute {
            let displaced = TurnedAway::Displaced.to_string();
            return refuse(&mut outlet, self.inbox.seal(), &displaced);
        }
        if self.broken || outlet.check().is_err() {
            return;
        }
        let ended = match say(&mut outlet, self.inbox.seal(), &[END], Some(Instant::now())) {
            Ok(()) => outlet.flush(LINGER),
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
