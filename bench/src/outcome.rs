//! How a run ended, for scripts.

use std::process::ExitCode;

/// What any part of the program fails with.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Everything was measured.
    Completed,
    /// Something failed; stderr says what.
    Failed,
    /// Someone pressed Ctrl-C.
    Cancelled,
}

impl Outcome {
    pub(crate) fn exit_code(self) -> ExitCode {
        ExitCode::from(match self {
            Self::Completed => 0,
            Self::Failed => 1,
            // 2 is clap's, for a command line that makes no sense.
            Self::Cancelled => 3,
        })
    }
}
