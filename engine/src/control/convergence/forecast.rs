//! Where rounds lead that get shorter.

use std::time::Duration;

use super::Convergence;
use super::estimate::from_seconds;
use crate::pages::memory::PAGE_BYTES;

/// Rounds before it can be said whether it will converge: two lengths tell how fast pages are
/// dirtied and how many there are.
const TELLING_ROUNDS: u32 = 2;

/// Turns at which a guess at the least downtime has settled.
const TURNS: u32 = 40;

/// Whether pre-copy can meet the downtime limit, as far as is known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Forecast {
    /// Whether it can.
    pub meets_limit: bool,
    /// The least downtime to expect, however many rounds are made.
    pub least: Duration,
    /// The limit.
    pub limit: Duration,
    /// Page bytes that land a second.
    pub bytes_per_second: f64,
    /// Unique pages the guest dirtied a second, in the last round or the last quarter of a second.
    pub dirty_pages_per_second: f64,
    /// Rounds that it is told from.
    pub rounds: u32,
}

impl Convergence {
    /// Follows rounds that get shorter to where they no longer do.
    pub(super) fn forecast(&self, now: Duration, pages: u64) -> Option<Forecast> {
        let bytes_per_second = self.bandwidth().bytes_per_second().filter(|rate| *rate > 0.0)?;
        if self.dirty.rounds() < TELLING_ROUNDS {
            return None;
        }
        // While all lands and is harvested the guest runs on.
        let between =
            self.terms.round_trip.estimate().expected + self.terms.harvest.estimate().expected;
        let time = |pages: f64| from_seconds(pages * PAGE_BYTES as f64 / bytes_per_second);
        let mut sending = time(pages as f64);
        for _ in 0..TURNS {
            sending = time(self.dirty.pages_after(sending + between)).min(sending);
        }
        // What is left then goes out while the guest stands still.
        let (at_last, _) = self.switchover_bandwidth(now)?;
        let sending = from_seconds(sending.as_secs_f64() * bytes_per_second / at_last);
        let rest = self.predict(now, 0)?.total().expected;
        let least = rest.saturating_add(sending);
        let limit = self.settings.downtime_limit;
        Some(Forecast {
            meets_limit: least <= limit,
            least,
            limit,
            bytes_per_second,
            dirty_pages_per_second: self.dirty.pages_per_second().unwrap_or(0.0),
            rounds: self.rounds,
        })
    }
}
