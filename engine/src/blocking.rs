//! Calls of the driver that only an interrupt of its link can end, and how others end them.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::control::protocol::Message;
use crate::error::Error;
use crate::transport::Interrupt;

/// What a send is given to go out when somebody ends the call that the driver is in: nearly all do at
/// once.
const SEND_GRACE: Duration = Duration::from_millis(50);

/// Says this side's last word, unless that was said.
pub(crate) type SayLast = dyn Fn(&Message, Duration) -> Result<(), Error> + Send;

/// What the driver is in.
pub(crate) enum Blocked {
    /// A send. It is given the time to end by itself: then the link is there to say why.
    Sending(Arc<dyn Interrupt>),
    /// Another call, in which nobody sends and nothing is committed. The last word is said before the
    /// link is interrupted: afterwards there is none to say it on.
    Waiting(Arc<dyn Interrupt>, Box<SayLast>),
    /// Making a link. There is nobody to say anything to; a peer that ends has an older link, if any.
    Dialling(Arc<dyn Interrupt>),
}

/// Whether the driver is in such a call.
#[derive(Default)]
pub(crate) struct Blocking {
    blocked: Mutex<Option<Blocked>>,
    unblocked: Condvar,
}

impl Blocking {
    fn blocked(&self) -> MutexGuard<'_, Option<Blocked>> {
        self.blocked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the call. Once it has returned nobody is about to end it: who wants to has noted why before.
    pub(crate) fn during<T>(&self, blocked: Blocked, call: impl FnOnce() -> T) -> T {
        *self.blocked() = Some(blocked);
        let result = call();
        *self.blocked() = None;
        self.unblocked.notify_all();
        result
    }

    /// Ends the call that the driver is in, if it is in one that waits for the peer. The word is what the peer is told.
    pub(crate) fn end_wait(&self, word: Option<&Message>) {
        if !matches!(&*self.blocked(), Some(Blocked::Dialling(_))) {
            self.end(word);
        }
    }

    /// Ends the call that the driver is in, if it is in one. The word is what the peer is told.
    pub(crate) fn end(&self, word: Option<&Message>) {
        let blocked = self.blocked();
        match &*blocked {
            None => {}
            Some(Blocked::Dialling(interrupt)) => interrupt.interrupt(),
            Some(Blocked::Waiting(interrupt, say)) => {
                // The lock is held, so the driver does nothing until it is out.
                if let Some(word) = word
                    && let Err(unheard) = say(word, SEND_GRACE)
                {
                    tracing::debug!(error = %unheard.chain(), "the other side could not be told");
                }
                interrupt.interrupt();
            }
            Some(Blocked::Sending(_)) => {
                let is_sending = |blocked: &mut Option<Blocked>| blocked.is_some();
                let waited = self.unblocked.wait_timeout_while(blocked, SEND_GRACE, is_sending);
                let (blocked, _) = waited.unwrap_or_else(PoisonError::into_inner);
                if let Some(Blocked::Sending(interrupt)) = &*blocked {
                    interrupt.interrupt();
                }
            }
        }
    }
}
