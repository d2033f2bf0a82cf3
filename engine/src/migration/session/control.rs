//! The control channel of one side: what goes out and what comes in, in frames, and that both keep to the
//! protocol.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::is_of_the_link;
use crate::control::protocol::{Conversation, DecodeError, Incompatibility, Message, Side};
use crate::error::Error;
use crate::host::caught;
use crate::transport::{ControlSender, TransportError};

/// What those who send and those who hear share.
pub(super) struct Control {
    side: Side,
    /// Taken before the conversation is, so that messages go out as they were noted.
    /// `None` once the link is given up.
    sender: Mutex<Option<Box<dyn ControlSender>>>,
    conversation: Mutex<Conversation>,
    bytes: AtomicU64,
    /// Whether the driver is at something that may take long, and says nothing meanwhile.
    busy: AtomicBool,
    /// Whether the migration goes on when the link is lost.
    outlives_its_link: AtomicBool,
    send_timeout: Duration,
}

impl Control {
    pub(super) fn new(
        side: Side,
        sender: Box<dyn ControlSender>,
        conversation: Conversation,
        send_timeout: Duration,
    ) -> Self {
        Self {
            side,
            sender: Mutex::new(Some(sender)),
            conversation: Mutex::new(conversation),
            bytes: AtomicU64::new(0),
            busy: AtomicBool::new(false),
            outlives_its_link: AtomicBool::new(false),
            send_timeout,
        }
    }

    /// Bytes so far, both ways.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Nothing more is said: the other side is to see that. The bytes, which are counted anew then.
    pub(super) fn end(&self) -> u64 {
        let sender = self.sender().take();
        // It belongs to the link, whose code may panic.
        if let Err(panic) = caught("the transport", || drop(sender)) {
            tracing::error!(error = %panic.chain(), "the control channel was not closed");
        }
        self.bytes.swap(0, Ordering::Relaxed)
    }

    fn sender(&self) -> MutexGuard<'_, Option<Box<dyn ControlSender>>> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn conversation_on_next_link(&self) -> Conversation {
        self.conversation().on_next_link()
    }

    pub(super) fn outlives_its_link(&self) {
        self.outlives_its_link.store(true, Ordering::SeqCst);
    }

    /// Whether the migration may go on in spite of it.
    pub(super) fn is_survived(&self, error: &Error) -> bool {
        self.outlives_its_link.load(Ordering::SeqCst) && is_of_the_link(error)
    }

    pub(super) fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Ordering::SeqCst);
    }

    /// Says something.
    pub(super) fn put(&self, message: &Message, timeout: Duration) -> Result<(), Error> {
        self.put_if(|| true, message, timeout)
    }

    /// Says this side's last word, unless that was said.
    pub(super) fn put_last(&self, word: &Message, timeout: Duration) -> Result<(), Error> {
        self.put_if(|| !self.conversation().has_ended(self.side), word, timeout)
    }

    /// Says that this side lives, if its driver is busy.
    pub(super) fn show_life(&self) -> Result<(), Error> {
        let is_busy = || self.busy.load(Ordering::SeqCst);
        if is_busy() {
            self.put_if(is_busy, &Message::Releasing, self.send_timeout)
        } else {
            Ok(())
        }
    }

    /// Says something, if that holds when it is its turn.
    fn put_if(
        &self,
        holds: impl FnOnce() -> bool,
        message: &Message,
        timeout: Duration,
    ) -> Result<(), Error> {
        let mut sender = self.sender();
        if !holds() {
            return Ok(());
        }
        let sender = sender.as_mut().ok_or(TransportError::Closed)?;
        // Before it goes out: the answer may be quick.
        let frame = self.say(message)?;
        caught("the transport", || sender.send(&frame, timeout))??;
        self.bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn conversation(&self) -> MutexGuard<'_, Conversation> {
        self.conversation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what this side is about to say, and gives its bytes.
    fn say(&self, message: &Message) -> Result<Vec<u8>, Error> {
        if let Err(refusal) = self.conversation().take(self.side, message) {
            tracing::error!(%refusal, "this side was about to break the protocol");
            debug_assert!(false, "about to say {refusal}");
            return Err(Error::Internal("it was about to break the protocol"));
        }
        Ok(message.encode())
    }

    /// Reads and checks what the peer says.
    pub(super) fn hear(&self, frame: &[u8]) -> Result<Message, Error> {
        self.bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
        let message = Message::decode(frame).map_err(|error| match error {
            DecodeError::Version { oldest, newest } => {
                Error::Incompatible(Incompatibility::Version {
                    source_oldest: oldest,
                    source_newest: newest,
                })
            }
            error => Error::PeerMisbehaved(error),
        })?;
        let peer = match self.side {
            Side::Source => Side::Destination,
            Side::Destination => Side::Source,
        };
        self.conversation().take(peer, &message).map_err(Error::UnexpectedMessage)?;
        Ok(message)
    }
}
