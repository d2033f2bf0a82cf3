//! Errors by who is to blame.

use std::fmt;
use std::io;
use std::time::Duration;

use thiserror::Error;

use crate::control::convergence::{Forecast, NEVER, Term};
use crate::control::protocol::{DecodeError, FailureReason, Incompatibility, Message, Refusal};
use crate::machine::{MachineError, MachineOperation};
use crate::pages::dirty::DirtyError;
use crate::pages::memory::{LayoutError, OutOfRange};
use crate::transport::{TransportError, rounded};

/// What an operator does about [`Error::Uncertain`]. These are the words, here and everywhere: a
/// guest that is resumed for a weaker reason may run twice.
pub const UNCERTAIN_AT_SOURCE: &str = "Look at the destination: if it runs the guest, destroy this \
    copy; if it gave the guest back, or its copy is destroyed, or its host is fenced off for good, \
    resume this one. No answer proves nothing";

/// What an operator does about [`Error::UncertainDestination`]; see [`UNCERTAIN_AT_SOURCE`].
pub const UNCERTAIN_AT_DESTINATION: &str = "Look at the source: if it has the guest, running or \
    paused, destroy this copy; if it is uncertain too and its copy is destroyed, or its host is \
    fenced off for good, resume this one. No answer proves nothing";

/// Why a migration failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The peer sent bytes that are no message of the protocol.
    #[error("the peer misbehaved")]
    PeerMisbehaved(#[from] DecodeError),
    /// The peer sent a message that has no place in the conversation.
    #[error("the peer misbehaved: it sent {0}")]
    UnexpectedMessage(Refusal),
    /// The two sides cannot work together; found before the first page moved.
    #[error("the two sides do not fit")]
    Incompatible(#[from] Incompatibility),
    /// The peer failed and told why.
    #[error("the other side failed ({reason}): {text}")]
    PeerFailed {
        /// Its own classification.
        reason: FailureReason,
        /// Its own words.
        text: String,
    },
    /// The link broke or could not be set up.
    #[error("the transport failed")]
    Transport(#[from] TransportError),
    /// The link was lost, and did not come back.
    #[error("the link was lost ({why}) and did not come back within {after:?}")]
    LinkLost {
        /// How it was lost: an error and its causes.
        why: String,
        /// For how long it was tried.
        after: Duration,
        /// What the last attempt failed with.
        #[source]
        cause: Box<Error>,
    },
    /// Tracking of dirty pages failed.
    #[error("dirty tracking failed")]
    Dirty(#[from] DirtyError),
    /// Guest memory is not what it was described as.
    #[error("guest memory is not as described")]
    Layout(#[from] LayoutError),
    /// A page range outside guest memory.
    #[error("guest memory was left")]
    OutOfRange(#[from] OutOfRange),
    /// The VMM's own [`crate::Machine`] refused.
    #[error("failed to {operation}")]
    Machine {
        /// Which call.
        operation: MachineOperation,
        /// The cause.
        #[source]
        cause: MachineError,
    },
    /// Code that the host gave panicked (the machine, an event sink, a dirty source, the hook that
    /// starts threads, the transport), or the engine itself. What it was doing counts as failed.
    #[error("{place} panicked: {message}")]
    Panicked {
        /// Who it was.
        place: String,
        /// What the panic said.
        message: String,
    },
    /// The guest was given back, and the destination may still hold what only one host may.
    #[error("{why}; and what only one host may hold may still be held here")]
    StillHeld {
        /// Why it was given back: an error and its causes.
        why: String,
        /// Why it could not be released.
        #[source]
        cause: Box<Error>,
    },
    /// A thread could not be started.
    #[error("failed to start a thread")]
    Thread(#[source] io::Error),
    /// The operating system gave no randomness or the like.
    #[error("failed to {operation}")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// The engine contradicts itself: a defect of its own, worth a report.
    #[error("internal error: {0}")]
    Internal(&'static str),
    /// The configuration makes no sense.
    #[error("bad configuration: {0}")]
    Configuration(String),
    /// Something that this engine is to do one day.
    #[error("unsupported yet: {0}")]
    Unsupported(&'static str),
    /// [`crate::MigrationHandle::cancel`] was called in time.
    #[error("cancelled")]
    Cancelled,
    /// The migration was a trial ([`crate::Source::try_out`]) and has come to its end: the guest stays.
    #[error("this was a trial")]
    Trial(Option<Forecast>),
    /// The other side made no progress.
    #[error("timed out after {} while waiting for {what}", rounded(*after))]
    TimedOut {
        /// What did not come.
        what: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// A switchover takes longer than the downtime limit allows.
    #[error(
        "not converging after {rounds} rounds: {at_fault} takes {}, all of a switchover \
         with the {dirty_pages} pages of the last round {}{} against a downtime limit of \
         {limit:?}; raise the limit, or {}",
        about(*takes), about(*expected),
        if expected < limit { ", and it varies by more than is left," } else { "" },
        at_fault.advice()
    )]
    NotConverging {
        /// Rounds made.
        rounds: u32,
        /// Pages dirty at the end.
        dirty_pages: u64,
        /// Downtime to expect, by what each part of it took last.
        expected: Duration,
        /// Downtime allowed.
        limit: Duration,
        /// The part of the downtime that takes longest.
        at_fault: Term,
        /// How long that is.
        takes: Duration,
    },
    /// With verification: memory at the destination differs from memory at the source.
    #[error(
        "memory differs: digest {source_digest} at the source, {destination_digest} at the \
         destination"
    )]
    MemoryDiffers {
        /// Digest of the paused source.
        source_digest: crate::pages::digest::Digest,
        /// Digest of what arrived.
        destination_digest: crate::pages::digest::Digest,
    },
    /// Pages arrived otherwise than they were sent, and that was no passing trouble.
    #[error(
        "pages arrived otherwise than they were sent at {times} switchovers, the last time in parts of memory of {pages} \
         pages: something between the two hosts changes them (a NIC or its offloads, a cable, a switch); with TLS it \
         is found at once"
    )]
    PagesDamaged {
        /// How many in those parts the last time.
        pages: u64,
        /// How often it was found.
        times: u32,
    },
    /// Of some pages that were compared, over a transport by which the destination sees no page land.
    #[error(
        "{pages} of {of} pages that were compared are not as they are at the source: they were changed on the way, or \
         something wrote to them that dirty tracking does not see"
    )]
    SamplesDiffer {
        /// How many.
        pages: usize,
        /// How many were compared.
        of: usize,
    },
    /// The migration broke off, by whatever it was, after the commit was sent and before its answer came.
    #[error(
        "uncertain: the commit was sent and not answered, so the destination may be running the \
         guest. It stays paused here. {UNCERTAIN_AT_SOURCE}"
    )]
    Uncertain(#[source] Box<Error>),
    /// The destination declared itself ready, and the migration broke off, by whatever it was, before the
    /// commit came.
    #[error(
        "uncertain: ready to run the guest when the migration broke off, so the source may have \
         committed. The copy here stays paused. {UNCERTAIN_AT_DESTINATION}"
    )]
    UncertainDestination(#[source] Box<Error>),
    /// The destination could not run the guest after all and gave it back.
    #[error("the destination gave the guest back: {text}")]
    GivenBack {
        /// Its own words.
        text: String,
    },
}

/// Who is to blame for an [`enum@Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Blame {
    /// The other side broke the protocol.
    PeerMisbehaved,
    /// The other side is sound and does not fit.
    PeerIncompatible,
    /// The other side failed by its own account.
    PeerFailed,
    /// The link.
    Transport,
    /// Guest memory or its tracking.
    GuestMemory,
    /// The VMM.
    Machine,
    /// This host.
    Host,
    /// This side's configuration.
    Configuration,
    /// The one who cancelled.
    Cancelled,
    /// Time.
    TimedOut,
    /// The guest's workload.
    Guest,
}

impl Error {
    /// Who is to blame.
    pub fn blame(&self) -> Blame {
        match self {
            Self::PeerMisbehaved(_)
            | Self::UnexpectedMessage(_)
            | Self::Transport(TransportError::Malformed(_) | TransportError::Violation(_)) => {
                Blame::PeerMisbehaved
            }
            Self::Incompatible(_) => Blame::PeerIncompatible,
            Self::PeerFailed { .. } | Self::GivenBack { .. } => Blame::PeerFailed,
            Self::Transport(_) | Self::LinkLost { .. } | Self::PagesDamaged { .. } => {
                Blame::Transport
            }
            Self::Dirty(_)
            | Self::Layout(_)
            | Self::OutOfRange(_)
            | Self::MemoryDiffers { .. }
            | Self::SamplesDiffer { .. } => Blame::GuestMemory,
            Self::Machine { .. } | Self::StillHeld { .. } => Blame::Machine,
            Self::Thread(_) | Self::Host { .. } | Self::Internal(_) | Self::Panicked { .. } => {
                Blame::Host
            }
            Self::Configuration(_) | Self::Unsupported(_) => Blame::Configuration,
            Self::Cancelled | Self::Trial(_) => Blame::Cancelled,
            Self::TimedOut { .. } => Blame::TimedOut,
            Self::NotConverging { .. } => Blame::Guest,
            Self::Uncertain(cause) | Self::UncertainDestination(cause) => cause.blame(),
        }
    }

    /// Whether it is open which side owns the guest.
    pub fn is_uncertain(&self) -> bool {
        matches!(self, Self::Uncertain(_) | Self::UncertainDestination(_))
    }

    /// The error and its causes on one line.
    pub fn chain(&self) -> Chain<'_> {
        Chain(self)
    }

    /// What this side says last because of it; nothing to a peer that has said so itself.
    pub(crate) fn last_word(&self) -> Option<Message> {
        let known = matches!(self, Self::PeerFailed { .. } | Self::GivenBack { .. });
        let text = || self.chain().to_string();
        (!known).then(|| Message::Failed { reason: self.reason(), text: text() })
    }

    fn reason(&self) -> FailureReason {
        match self.blame() {
            Blame::PeerMisbehaved => FailureReason::PeerMisbehaved,
            Blame::PeerIncompatible => FailureReason::Incompatible,
            Blame::PeerFailed | Blame::Transport => FailureReason::Transport,
            Blame::GuestMemory => FailureReason::GuestMemory,
            Blame::Machine => FailureReason::Machine,
            Blame::Host | Blame::Configuration => FailureReason::Host,
            Blame::Cancelled => FailureReason::Cancelled,
            Blame::TimedOut => FailureReason::TimedOut,
            Blame::Guest => FailureReason::NotConverging,
        }
    }
}

/// A time to expect, of which more than [`NEVER`] is not told apart.
fn about(time: Duration) -> String {
    if time < NEVER { format!("about {time:?}") } else { "more than a day".to_owned() }
}

/// Shows an error with its causes: "failed to …: cause: cause".
#[derive(Debug)]
pub struct Chain<'a>(&'a (dyn std::error::Error + 'static));

impl<'a> Chain<'a> {
    /// For any error.
    pub fn of(error: &'a (dyn std::error::Error + 'static)) -> Self {
        Self(error)
    }
}

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_time_that_is_no_estimate_is_not_told_as_one() {
        let not_converging = |takes| Error::NotConverging {
            rounds: 3,
            dirty_pages: 7,
            expected: takes + Duration::from_millis(2),
            limit: Duration::from_millis(1),
            at_fault: Term::FinalPages,
            takes,
        };
        let day = not_converging(NEVER).to_string();
        assert!(day.contains("takes more than a day, ") && !day.contains("86400"), "{day}");
        assert_eq!(day.matches("more than a day").count(), 2, "{day}");
        let second = not_converging(Duration::from_secs(1)).to_string();
        assert!(second.contains("takes about 1s, ") && second.contains("about 1.002s"), "{second}");
    }

    #[test]
    fn errors_and_documentation_say_the_same_of_an_uncertain_guest() {
        let document = include_str!("../../docs/embedding.md");
        let words: Vec<_> = document.split_whitespace().filter(|word| *word != ">").collect();
        let document = words.join(" ");
        let cause = || Box::new(Error::Cancelled);
        for (error, advice) in [
            (Error::Uncertain(cause()), UNCERTAIN_AT_SOURCE),
            (Error::UncertainDestination(cause()), UNCERTAIN_AT_DESTINATION),
        ] {
            assert!(error.to_string().ends_with(advice), "{error}");
            // It may be for a link, a peer or the time, which its cause tells.
            assert!(
                !["link", "lost"].iter().any(|word| error.to_string().contains(word)),
                "{error}"
            );
            assert!(document.contains(advice), "docs/embedding.md lacks: {advice}");
        }
    }
}
