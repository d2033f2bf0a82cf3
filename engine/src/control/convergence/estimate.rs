//! Figures that are learned, with how far off they may be.

use std::collections::VecDeque;
use std::time::Duration;

/// A duration that is expected, and how far off it may be: about a standard deviation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Estimate {
    /// What to expect.
    pub expected: Duration,
    /// How far off that may be.
    pub uncertainty: Duration,
}

impl Estimate {
    /// With so many uncertainties on top.
    pub fn upper(&self, uncertainties: f64) -> Duration {
        self.expected.saturating_add(from_seconds(self.uncertainty.as_secs_f64() * uncertainties))
    }
}

/// A day stands for "never", so that sums cannot overflow.
pub(crate) const NEVER: Duration = Duration::from_secs(86_400);

/// A duration from arithmetic: what is negative or no number is nothing, what is endless is
/// [`NEVER`].
pub(crate) fn from_seconds(seconds: f64) -> Duration {
    if seconds.is_nan() {
        return Duration::ZERO;
    }
    Duration::from_secs_f64(seconds.clamp(0.0, NEVER.as_secs_f64()))
}

/// What is looked back on.
const RECENT: usize = 16;

/// A duration that is seen again and again: what it was lately, and its mean and deviation, as TCP
/// learns its round trip (RFC 6298). Before it was seen for the first time it is what was assumed.
#[derive(Debug, Clone)]
pub struct Learned {
    mean: f64,
    deviation: f64,
    recent: VecDeque<f64>,
    /// What was seen last, whatever is hoped.
    seen: Option<f64>,
}

impl Learned {
    /// With what is assumed for the time being.
    pub fn assumed(expected: Duration, uncertainty: Duration) -> Self {
        Self {
            mean: expected.as_secs_f64(),
            deviation: uncertainty.as_secs_f64(),
            recent: VecDeque::new(),
            seen: None,
        }
    }

    /// Takes what was seen.
    pub fn learn(&mut self, seen: Duration) {
        let seen = seen.as_secs_f64();
        self.seen = Some(seen);
        if self.recent.is_empty() {
            self.deviation = seen / 2.0;
            self.mean = seen;
        } else {
            self.deviation += ((seen - self.mean).abs() - self.deviation) / 4.0;
            self.mean += (seen - self.mean) / 8.0;
        }
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(seen);
    }

    /// It has taken so long and is not over: nothing to learn from, but it was seen to take that long.
    pub(super) fn goes_on(&mut self, so_far: Duration) {
        self.seen = Some(self.seen.unwrap_or(0.0).max(so_far.as_secs_f64()));
    }

    /// Hopes that it takes less than was seen, where nothing will be seen unless it is tried.
    pub(super) fn hope(&mut self, share: f64) {
        self.mean *= share;
        self.deviation *= share;
        self.recent.iter_mut().for_each(|seen| *seen *= share);
    }

    /// What it took last; before it was seen for the first time what was assumed.
    pub fn last(&self) -> Duration {
        self.seen().unwrap_or(from_seconds(self.mean))
    }

    /// What it took last, if it was seen.
    pub(super) fn seen(&self) -> Option<Duration> {
        self.seen.map(from_seconds)
    }

    /// Whether it was ever seen.
    pub fn is_known(&self) -> bool {
        !self.recent.is_empty()
    }

    /// Whether it was seen often enough that one that was out of the ordinary does not count.
    pub(super) fn is_settled(&self) -> bool {
        self.recent.len() >= 3
    }

    /// What to expect next time: the middle one of those seen lately, since a host that is busy for a
    /// moment says nothing about the next.
    pub fn estimate(&self) -> Estimate {
        let mut sorted: Vec<f64> = self.recent.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        // The smaller one of two.
        let middle = sorted.get(sorted.len().saturating_sub(1) / 2).copied();
        Estimate {
            expected: from_seconds(middle.unwrap_or(self.mean)),
            uncertainty: from_seconds(self.deviation),
        }
    }

    /// The same, where nothing else is going on: the least that was seen lately.
    pub fn undisturbed(&self) -> Estimate {
        let least = self.recent.iter().copied().reduce(f64::min).unwrap_or(self.mean);
        Estimate { expected: from_seconds(least), ..self.estimate() }
    }

    /// What it will hardly exceed, with so many deviations.
    pub fn guard(&self, deviations: f64) -> Duration {
        from_seconds(self.mean + deviations * self.deviation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn what_was_seen_takes_the_place_of_what_was_assumed() {
        let mut learned = Learned::assumed(100 * MS, 100 * MS);
        assert_eq!(learned.estimate().expected, 100 * MS);
        assert!(!learned.is_known());
        learned.learn(4 * MS);
        assert_eq!(learned.estimate(), Estimate { expected: 4 * MS, uncertainty: 2 * MS });
        (0..50).for_each(|_| learned.learn(4 * MS));
        assert!(learned.estimate().uncertainty < MS / 10);
        assert_eq!(learned.estimate().expected, 4 * MS);
    }

    #[test]
    fn a_spike_is_guarded_against_for_a_while() {
        let mut learned = Learned::assumed(MS, MS);
        (0..50).for_each(|_| learned.learn(MS));
        learned.learn(30 * MS);
        assert_eq!(learned.estimate().expected, MS);
        assert_eq!(learned.undisturbed().expected, MS);
        assert!(learned.guard(4.0) >= 30 * MS);
        (0..60).for_each(|_| learned.learn(MS));
        assert!(learned.guard(4.0) < 2 * MS, "{:?}", learned.guard(4.0));
    }

    #[test]
    fn arithmetic_that_goes_wrong_is_no_panic() {
        assert_eq!(from_seconds(f64::NAN), Duration::ZERO);
        assert_eq!(from_seconds(-1.0), Duration::ZERO);
        assert_eq!(from_seconds(f64::INFINITY), NEVER);
        let never = Estimate { expected: NEVER, uncertainty: NEVER };
        assert!(never.upper(f64::MAX) >= NEVER);
    }
}
