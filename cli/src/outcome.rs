//! How a program ended, for scripts.

use std::fmt;
use std::process::ExitCode;

use pageferry::protocol::FailureReason;
use pageferry::{Blame, Error};
use serde::{Deserialize, Serialize};

/// What any part of a program fails with.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// How it ended. The names are a contract: `outcome` in the JSON report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// All was done, and every check that was made passed: of a migration, the guest runs at the destination.
    Completed,
    /// Someone cancelled; a guest that was to move runs at the source.
    Cancelled,
    /// It failed.
    Failed,
    /// It is open which side owns the guest.
    Uncertain,
}

impl fmt::Display for Outcome {
    /// As in the report.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl Outcome {
    /// Of a migration that ended by an error, and whether somebody here had cancelled it. That wins:
    /// what the link and the other side do at that moment may be seen first. A fault of this host or
    /// of the guest's memory is one all the same.
    pub fn of(error: &Error, cancelled: bool) -> Self {
        match error {
            error if error.is_uncertain() => Self::Uncertain,
            // By someone at the other side.
            Error::PeerFailed { reason: FailureReason::Cancelled, .. } => Self::Cancelled,
            error => match error.blame() {
                Blame::Cancelled => Self::Cancelled,
                Blame::GuestMemory | Blame::Machine | Blame::Host | Blame::Configuration => {
                    Self::Failed
                }
                _ if cancelled => Self::Cancelled,
                _ => Self::Failed,
            },
        }
    }

    /// What the process ends with: a contract too.
    pub fn exit_code(self) -> ExitCode {
        ExitCode::from(match self {
            Self::Completed => 0,
            Self::Failed => 1,
            // 2 is clap's, for a command line that makes no sense.
            Self::Cancelled => 3,
            Self::Uncertain => 4,
        })
    }
}

#[cfg(test)]
mod tests {
    use pageferry::transport::TransportError;

    use super::*;

    #[test]
    fn who_cancelled_is_told_so_whatever_was_seen_first() {
        let closed = || Error::Transport(TransportError::Closed);
        assert_eq!(Outcome::of(&closed(), false), Outcome::Failed);
        assert_eq!(Outcome::of(&closed(), true), Outcome::Cancelled);
        assert_eq!(Outcome::of(&Error::Cancelled, false), Outcome::Cancelled);
        assert_eq!(Outcome::of(&Error::Internal("a defect"), true), Outcome::Failed);
        for cancelled in [false, true] {
            let uncertain = Error::Uncertain(Box::new(closed()));
            assert_eq!(Outcome::of(&uncertain, cancelled), Outcome::Uncertain);
        }
    }
}
