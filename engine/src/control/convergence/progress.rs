//! Whether rounds still get anywhere.

use std::time::Duration;

use super::estimate::NEVER;

/// Rounds in a row in which the downtime to expect does not shrink by a tenth.
const STALE_ROUNDS: u32 = 3;
const PROGRESS: f64 = 0.9;

#[derive(Debug, Clone)]
pub(super) struct Progress {
    /// The least downtime that was expected after a round, and rounds since.
    best: Duration,
    stale_rounds: u32,
}

impl Default for Progress {
    fn default() -> Self {
        Self { best: NEVER, stale_rounds: 0 }
    }
}

impl Progress {
    /// After a round a switchover was expected to take that long.
    pub(super) fn note(&mut self, expected: Duration) {
        if expected.as_secs_f64() <= self.best.as_secs_f64() * PROGRESS {
            (self.best, self.stale_rounds) = (expected, 0);
        } else {
            self.stale_rounds += 1;
        }
    }

    /// Whether they get no shorter.
    pub(super) fn is_stale(&self) -> bool {
        self.stale_rounds >= STALE_ROUNDS
    }
}
