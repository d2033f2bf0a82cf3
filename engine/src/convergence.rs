//! When to stop copying and switch over: pure arithmetic on what was observed.

use std::time::Duration;

use crate::memory::PAGE_BYTES;

/// Page bytes a round must have moved for its bandwidth to mean something.
const TELLING_BYTES: u64 = 1 << 20;

/// Assumed cost of everything in the downtime that is not page bytes, until it is measured:
/// pausing, harvesting, device state, two round trips, resuming. 1 to 3 ms between two processes
/// of one host.
const FIXED_COST: Duration = Duration::from_millis(3);

/// What a round looked like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// Page bytes that landed during the round.
    pub landed_bytes: u64,
    /// How long the round took.
    pub took: Duration,
    /// Pages the guest dirtied meanwhile, by the harvest after it.
    pub dirty_pages: u64,
}

/// What to do after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Another round.
    Iterate {
        /// Downtime to expect if one switched over now; `None` before anything was measured.
        expected: Option<Duration>,
    },
    /// The remaining pages fit into the downtime limit.
    SwitchOver {
        /// Downtime to expect.
        expected: Duration,
    },
    /// The rounds are used up.
    GiveUp {
        /// Downtime to expect if one switched over now.
        expected: Duration,
    },
}

/// Decides after each round.
#[derive(Debug, Clone, Copy)]
pub struct Convergence {
    downtime_limit: Duration,
    max_rounds: u32,
    rounds: u32,
    bytes_per_second: Option<f64>,
}

impl Convergence {
    /// With the limit to keep and the number of rounds to try.
    pub fn new(downtime_limit: Duration, max_rounds: u32) -> Self {
        Self { downtime_limit, max_rounds, rounds: 0, bytes_per_second: None }
    }

    /// Bandwidth of page bytes, as measured in the last round that moved enough.
    pub fn bytes_per_second(&self) -> Option<f64> {
        self.bytes_per_second
    }

    /// Takes a finished round and decides.
    pub fn observe(&mut self, round: Round) -> Verdict {
        self.rounds += 1;
        let seconds = round.took.as_secs_f64();
        if seconds > 0.0 && (round.landed_bytes >= TELLING_BYTES || self.bytes_per_second.is_none())
        {
            self.bytes_per_second = Some(round.landed_bytes as f64 / seconds);
        }
        let remaining_bytes = round.dirty_pages * PAGE_BYTES;
        let expected = match self.bytes_per_second {
            // Another round could not make it shorter.
            _ if remaining_bytes == 0 => return Verdict::SwitchOver { expected: FIXED_COST },
            Some(bandwidth) if bandwidth > 0.0 => {
                // A day stands for "never", so that the sum cannot overflow.
                let seconds = (remaining_bytes as f64 / bandwidth).min(86_400.0);
                FIXED_COST + Duration::from_secs_f64(seconds)
            }
            // Nothing has landed yet.
            _ if self.rounds < self.max_rounds => return Verdict::Iterate { expected: None },
            _ => Duration::from_secs(86_400),
        };
        if expected <= self.downtime_limit {
            Verdict::SwitchOver { expected }
        } else if self.rounds >= self.max_rounds {
            Verdict::GiveUp { expected }
        } else {
            Verdict::Iterate { expected: Some(expected) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(landed_mib: u64, ms: u64, dirty_pages: u64) -> Round {
        Round { landed_bytes: landed_mib << 20, took: Duration::from_millis(ms), dirty_pages }
    }

    #[test]
    fn switches_over_when_what_remains_fits() {
        let mut convergence = Convergence::new(Duration::from_millis(300), 30);
        // 1 GiB/s; 512 MiB remain: 500 ms.
        let verdict = convergence.observe(round(1024, 1000, 131_072));
        assert!(matches!(verdict, Verdict::Iterate { expected: Some(e) } if e.as_millis() == 503));
        // 128 MiB remain: 125 ms.
        let verdict = convergence.observe(round(512, 500, 32_768));
        assert!(matches!(verdict, Verdict::SwitchOver { expected } if expected.as_millis() == 128));
    }

    #[test]
    fn a_quiet_guest_is_moved_after_the_first_round() {
        let mut convergence = Convergence::new(Duration::from_millis(1), 30);
        let verdict = convergence.observe(round(0, 5, 0));
        assert_eq!(verdict, Verdict::SwitchOver { expected: FIXED_COST });
    }

    #[test]
    fn a_small_round_does_not_spoil_the_estimate() {
        let mut convergence = Convergence::new(Duration::from_millis(50), 30);
        convergence.observe(round(1024, 1000, 100_000));
        let before = convergence.bytes_per_second();
        convergence.observe(round(0, 400, 100_000));
        assert_eq!(convergence.bytes_per_second(), before);
    }

    #[test]
    fn gives_up_after_the_last_round_with_the_figure() {
        let mut convergence = Convergence::new(Duration::from_millis(50), 2);
        assert!(matches!(convergence.observe(round(64, 100, 99_999)), Verdict::Iterate { .. }));
        assert!(matches!(convergence.observe(round(64, 100, 99_999)), Verdict::GiveUp { .. }));
    }
}
