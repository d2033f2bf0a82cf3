//! Whose turn it is to send control messages: the driver's, or that of a thread which has more to send than
//! the driver may wait for.
//!
//! ```text
//!   Here ── lend ──▶ Lent ── all is sent, or could not be ──▶ Here
//!                     │
//!                     └───── the thread panicked ───────────▶ Gone
//! ```
//!
//! Nothing overtakes: who wants to send waits until it is here. What is lent may be *recalled*: the thread
//! then sends no more than it has begun with.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crossbeam_channel::{Receiver, Sender, bounded, select_biased};

use super::Patience;
use crate::control::protocol::Message;
use crate::error::Error;
use crate::transport::TransportError;

pub(super) enum Outlet {
    Here,
    Lent {
        /// Whether all was sent.
        returned: Receiver<Result<bool, Error>>,
        recalled: Arc<AtomicBool>,
    },
    Gone,
}

/// The outlet in the hands of a thread.
pub(super) struct Lent {
    give_back: Sender<Result<bool, Error>>,
    recalled: Arc<AtomicBool>,
}

impl Outlet {
    /// Lends it, which must be here.
    pub(super) fn lend(&mut self) -> Lent {
        let (give_back, returned) = bounded(1);
        let recalled = Arc::new(AtomicBool::new(false));
        *self = Self::Lent { returned, recalled: Arc::clone(&recalled) };
        Lent { give_back, recalled }
    }

    /// Waits until it is back, if it was lent. Whether all that it was lent for was sent. An error is one of
    /// that, or of `check`, which is made when `wake` says so.
    pub(super) fn wait(
        &mut self,
        patience: Patience,
        wake: &Receiver<()>,
        check: impl Fn() -> Result<(), Error>,
    ) -> Result<bool, Error> {
        let Self::Lent { returned: lent, .. } = self else { return Ok(true) };
        let returned = loop {
            select_biased! {
                recv(lent) -> returned => break returned,
                recv(wake) -> _ => check()?,
                default(patience.left()) => return Err(patience.error()),
            }
        };
        *self = if returned.is_ok() { Self::Here } else { Self::Gone };
        returned.unwrap_or(Ok(true))
    }

    /// Fails unless it is here.
    pub(super) fn check(&self) -> Result<(), Error> {
        if let Self::Here = self { Ok(()) } else { Err(TransportError::Closed.into()) }
    }

    /// Whether a thread still has to send what it was given.
    pub(super) fn is_lent(&self) -> bool {
        matches!(self, Self::Lent { returned, .. } if returned.is_empty())
    }

    /// What a thread is to send and has not begun with is sent no more.
    pub(super) fn recall(&self) {
        if let Self::Lent { recalled, .. } = self {
            recalled.store(true, Relaxed);
        }
    }
}

impl Lent {
    /// Sends all of them, until it is recalled or one fails, and gives the outlet back.
    pub(super) fn send(
        self,
        messages: impl Iterator<Item = Message>,
        put: impl Fn(&Message) -> Result<(), Error>,
    ) {
        let send = || {
            for message in messages {
                if self.recalled.load(Relaxed) {
                    return Ok(false);
                }
                put(&message)?;
            }
            Ok(true)
        };
        // The session may be over.
        let _ = self.give_back.send(send());
    }
}
