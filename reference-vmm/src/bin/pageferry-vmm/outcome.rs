//! How a migration ended, for scripts.

use std::process::ExitCode;

use pageferry::protocol::FailureReason;
use pageferry::{Blame, Error};
use serde::{Deserialize, Serialize};

/// How it ended. The names are a contract: `outcome` in the JSON report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    /// The guest runs at the destination, and every check that was made passed.
    Completed,
    /// Someone cancelled; the guest runs at the source.
    Cancelled,
    /// It failed.
    Failed,
    /// It is open which side owns the guest.
    Uncertain,
}

impl Outcome {
    pub(crate) fn of(error: &Error) -> Self {
        match error {
            error if error.is_uncertain() => Self::Uncertain,
            // By someone at the other side.
            Error::PeerFailed { reason: FailureReason::Cancelled, .. } => Self::Cancelled,
            error if error.blame() == Blame::Cancelled => Self::Cancelled,
            _ => Self::Failed,
        }
    }

    pub(crate) fn exit_code(self) -> ExitCode {
        ExitCode::from(match self {
            Self::Completed => 0,
            Self::Failed => 1,
            // 2 is clap's, for a command line that makes no sense.
            Self::Cancelled => 3,
            Self::Uncertain => 4,
        })
    }
}
