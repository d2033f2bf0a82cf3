//! When a channel lags, and what partition would make all channels end together.
//!
//! Pure: the driver asks it while a round is under way, and changes the partition by a fenced
//! epoch if it says so (see [`ledger`](crate::ledger)).

use std::time::Duration;

/// When a fence, at which every channel waits for what it has sent, is worth it.
struct Threshold {
    /// A round says nothing about its channels before.
    warm_up: Duration,
    /// How many times as long as all together the last channel must be expected to take.
    lag: f64,
    /// How much earlier the round must be expected to end.
    gain: Duration,
}

/// While all channels work: speeds go up and down, and usually make up for it.
const ALL_BUSY: Threshold =
    Threshold { warm_up: Duration::from_millis(500), lag: 1.5, gain: Duration::from_secs(1) };

/// Once a channel has nothing left to do: what it could take over is lost for certain.
const SOME_IDLE: Threshold =
    Threshold { warm_up: Duration::from_millis(100), lag: 1.1, gain: Duration::from_millis(100) };

/// How finely channels are weighted. One that moved nothing still gets a weight of 1, to be seen
/// to recover.
const FULL_WEIGHT: f64 = 64.0;

/// How far one channel has come since the partition took effect.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Lane {
    /// Stripes it has been through.
    pub(crate) done: u64,
    /// Stripes it has been given.
    pub(crate) given: u64,
}

/// The weights of a better partition, if there is one that is worth it. `lanes[c]` is `None` for
/// a channel that is lost.
pub(crate) fn rebalance(lanes: &[Option<Lane>], elapsed: Duration) -> Option<Vec<u32>> {
    let live = || lanes.iter().flatten();
    let idle = live().any(|lane| lane.done >= lane.given);
    let Threshold { warm_up, lag, gain } = if idle { SOME_IDLE } else { ALL_BUSY };
    if elapsed < warm_up {
        return None;
    }
    let seconds = elapsed.as_secs_f64();
    let speed = |lane: &Lane| lane.done as f64 / seconds;
    let all_speed: f64 = live().map(speed).sum();
    let all_left: f64 = live().map(|lane| lane.given.saturating_sub(lane.done) as f64).sum();
    if live().count() < 2 || all_speed <= 0.0 || all_left <= 0.0 {
        return None;
    }
    // A channel that has not finished a stripe yet is expected to do so just now.
    let alone =
        |lane: &Lane| lane.given.saturating_sub(lane.done) as f64 / speed(lane).max(1.0 / seconds);
    let last = live().map(alone).fold(0.0, f64::max);
    let together = all_left / all_speed;
    if last < together * lag || last - together < gain.as_secs_f64() {
        return None;
    }
    let fastest = live().map(speed).fold(0.0, f64::max);
    let weight = |lane: &Lane| {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "between 1 and FULL_WEIGHT"
        )]
        {
            (speed(lane) / fastest * FULL_WEIGHT).round().clamp(1.0, FULL_WEIGHT) as u32
        }
    };
    Some(lanes.iter().map(|lane| lane.as_ref().map_or(0, weight)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lanes(done: &[u64]) -> Vec<Option<Lane>> {
        done.iter().map(|&done| Some(Lane { done, given: 1000 })).collect()
    }

    #[test]
    fn channels_of_one_speed_are_left_alone() {
        assert_eq!(rebalance(&lanes(&[100, 100, 90]), Duration::from_secs(2)), None);
    }

    #[test]
    fn a_slow_channel_is_given_less_by_its_speed() {
        let weights = rebalance(&lanes(&[400, 100, 400]), Duration::from_secs(2));
        assert_eq!(weights, Some(vec![64, 16, 64]));
    }

    #[test]
    fn a_channel_that_stands_still_keeps_a_little() {
        let weights = rebalance(&lanes(&[400, 0]), Duration::from_secs(2));
        assert_eq!(weights, Some(vec![64, 1]));
    }

    #[test]
    fn channels_that_are_done_take_over() {
        let weights = rebalance(&lanes(&[1000, 100]), Duration::from_secs(2));
        assert_eq!(weights, Some(vec![64, 6]));
        // Sooner, and for less, than from channels that work.
        let weights = rebalance(&lanes(&[1000, 700]), Duration::from_secs(1));
        assert_eq!(weights, Some(vec![64, 45]));
        assert_eq!(rebalance(&lanes(&[999, 700]), Duration::from_secs(1)), None);
    }

    #[test]
    fn neither_early_nor_for_a_moment_nor_with_one_channel() {
        assert_eq!(rebalance(&lanes(&[400, 0]), Duration::from_millis(400)), None);
        let nearly_done =
            [Some(Lane { done: 1000, given: 1000 }), Some(Lane { done: 950, given: 1000 })];
        assert_eq!(rebalance(&nearly_done, Duration::from_secs(2)), None);
        assert_eq!(
            rebalance(&[Some(Lane { done: 1, given: 1000 }), None], Duration::from_secs(9)),
            None
        );
        assert_eq!(rebalance(&lanes(&[0, 0]), Duration::from_secs(9)), None);
    }
}
