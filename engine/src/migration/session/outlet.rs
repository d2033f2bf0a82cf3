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
//!
//! What each question finds, and where the outlet is then; a wait for a thread at work takes as long as that
//! works, or as the caller is patient:
//!
//! | the outlet, or the thread that has it | `wait` | `check` | `is_lent` |
//! |---|---|---|---|
//! | here | all, here | ok | no |
//! | at work | late, at work | closed | yes |
//! | sent all | all, here | closed | no |
//! | recalled | part, here | closed | no |
//! | failed | error, here | closed | no |
//! | panicked | all, gone | closed | yes |
//! | gone | all, gone | closed | no |
//!
//! That a thread panicked is no error here: the session hears it from whoever watches the thread.

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

#[cfg(all(test, not(loom)))]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use crossbeam_channel::never;

    use super::*;

    /// An outlet in the state that a row of the table begins with, and the thread's end if that is at work.
    fn outlet(state: &str) -> (Outlet, Option<Lent>) {
        let mut outlet = Outlet::Here;
        if state == "here" {
            return (outlet, None);
        }
        let lent = outlet.lend();
        let messages = || [Message::Registered, Message::Registered].into_iter();
        match state {
            "at work" => return (outlet, Some(lent)),
            "sent all" => lent.send(messages(), |_| Ok(())),
            "recalled" => {
                outlet.recall();
                lent.send(messages(), |_| panic!("this was recalled"));
            }
            "failed" => lent.send(messages(), |_| Err(TransportError::Interrupted.into())),
            "panicked" => drop(lent),
            "gone" => outlet = Outlet::Gone,
            other => panic!("there is no state {other:?}"),
        }
        (outlet, None)
    }

    fn wait(outlet: &mut Outlet) -> Result<bool, Error> {
        outlet.wait(Patience::now("a test", Duration::ZERO), &never(), || Ok(()))
    }

    #[test]
    fn every_cell_is_as_the_table_says() {
        let documented =
            include_str!("outlet.rs").lines().filter_map(|line| line.strip_prefix("//! | "));
        let mut rows = 0;
        for row in documented.skip(1) {
            let cells: Vec<_> = row.trim_end_matches(" |").split(" | ").collect();
            let (mut outlet, _thread) = outlet(cells[0]);

            let check = match outlet.check() {
                Ok(()) => "ok",
                Err(Error::Transport(TransportError::Closed)) => "closed",
                Err(error) => panic!("{error}"),
            };
            let is_lent = if outlet.is_lent() { "yes" } else { "no" };
            let waited = match wait(&mut outlet) {
                Ok(true) => "all",
                Ok(false) => "part",
                Err(Error::Transport(TransportError::Interrupted)) => "error",
                Err(Error::TimedOut { .. }) => "late",
                Err(error) => panic!("{error}"),
            };
            let state = match outlet {
                Outlet::Here => "here",
                Outlet::Lent { .. } => "at work",
                Outlet::Gone => "gone",
            };
            assert_eq!(cells[1..], [&[waited, state].join(", "), check, is_lent], "{}", cells[0]);
            rows += 1;
        }
        assert_eq!(rows, 7);
    }

    #[test]
    fn what_was_begun_with_is_sent_before_it_is_back() {
        let (mut outlet, thread) = outlet("at work");
        let sent = Cell::new(0);
        thread.unwrap().send([Message::Registered, Message::Registered].into_iter(), |_| {
            outlet.recall();
            sent.set(sent.get() + 1);
            Ok(())
        });
        assert_eq!(sent.get(), 1);
        assert!(!wait(&mut outlet).unwrap());
        outlet.check().unwrap();
    }

    #[test]
    fn a_wait_ends_by_what_wakes_it() {
        let (mut outlet, _thread) = outlet("at work");
        let (waker, wake) = bounded(1);
        waker.send(()).unwrap();
        let patience = Patience::now("a test", Duration::from_secs(60));
        let error = outlet.wait(patience, &wake, || Err(TransportError::Interrupted.into()));
        assert!(matches!(error, Err(Error::Transport(TransportError::Interrupted))), "{error:?}");
        assert!(outlet.is_lent());
    }
}
