//! How much room a prediction must leave for what is uncertain about it.
//!
//! A switchover that is called off makes more careful. Waiting makes bolder: a prediction that would fit without
//! its uncertainties gives up a fifth of the caution, and no more than that in a tenth of a second.

use std::time::Duration;

/// How many uncertainties a prediction must be below the limit, at first.
pub(super) const CAUTION: f64 = 2.0;
/// And at most, after switchovers that were called off.
const MOST_CAUTION: f64 = 4.0;
/// Deviations that are reserved for what follows the commit, as TCP's timeout has it; less as
/// caution sinks.
pub(super) const RESERVE: f64 = 4.0;
const LEAST_RESERVE: f64 = 1.0;
/// What is left of caution after each round whose prediction would fit without. What is waited for may
/// never come, and the bound holds anyway.
const COURAGE: f64 = 0.8;
/// But rounds may be short, and a host busy for longer.
const BOLDER_EVERY: Duration = Duration::from_millis(100);

#[derive(Debug, Clone)]
pub(super) struct Caution {
    uncertainties: f64,
    /// When some of it may be given up again.
    bolder_from: Duration,
}

impl Default for Caution {
    fn default() -> Self {
        Self { uncertainties: CAUTION, bolder_from: Duration::ZERO }
    }
}

impl Caution {
    /// How many uncertainties count.
    pub(super) fn uncertainties(&self) -> f64 {
        self.uncertainties
    }

    /// Deviations to reserve for what follows the commit.
    pub(super) fn reserve(&self) -> f64 {
        (RESERVE * (self.uncertainties / CAUTION).min(1.0)).max(LEAST_RESERVE)
    }

    /// A switchover was called off.
    pub(super) fn called_off(&mut self) {
        self.uncertainties = (self.uncertainties * 1.5 + 0.5).min(MOST_CAUTION);
    }

    /// A prediction would have fitted without.
    pub(super) fn embolden(&mut self, now: Duration) {
        if now >= self.bolder_from {
            self.uncertainties *= COURAGE;
            self.bolder_from = now.saturating_add(BOLDER_EVERY);
        }
    }
}
