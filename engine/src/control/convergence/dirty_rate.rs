//! How fast the guest dirties pages, part by part of its memory.
//!
//! A page that is written twice between two harvests is dirty once. So pages grow slower the longer
//! a round takes, and how much slower differs: a part of memory that is hot is dirty all over in no
//! time, a cold one goes on for long. A part is taken to have so many pages that are written, at
//! even odds, at so many writes a second; both are learned from rounds of different lengths.

use std::collections::VecDeque;
use std::time::Duration;

/// How far a part's dirty pages may be from all it has before they say nothing about its rate.
const SATURATED: f64 = 0.95;

/// What the latest round counts, in the average over rounds.
const GAIN: f64 = 0.5;

/// Rounds that are looked back on for how many pages are written at all.
const ROUNDS: usize = 8;

/// What pages a second are told from at least. Rounds take a few milliseconds where a link is fast, and in one of
/// those a guest may not have had a CPU at all.
const TELLING: Duration = Duration::from_millis(250);

/// Learns from each harvest which pages of which part were dirty.
#[derive(Debug, Clone, Default)]
pub struct DirtyRate {
    parts: Vec<Part>,
    rounds: u32,
    /// Dirty pages of the latest rounds, and the time they were written in.
    latest: VecDeque<(u64, Duration)>,
}

#[derive(Debug, Clone, Default)]
struct Part {
    /// Dirty pages of the last rounds.
    seen: VecDeque<f64>,
    /// Pages a second at first, before any is written twice.
    rate: f64,
    /// Whether that is more than a lower bound.
    exact: bool,
}

impl Part {
    /// Pages that are written at all, as far as is known.
    fn pages(&self) -> f64 {
        self.seen.iter().copied().fold(0.0, f64::max)
    }

    fn learn(&mut self, pages: f64, seconds: f64) {
        let known = self.pages();
        // As dirty as it ever was says only how fast it is at least.
        let (rate, exact) = if pages > known {
            (pages / seconds, false)
        } else if pages >= known * SATURATED {
            (-known / seconds * (1.0 - SATURATED).ln(), false)
        } else {
            (-known / seconds * (1.0 - pages / known).ln(), true)
        };
        self.rate = match (self.exact, exact) {
            (true, true) => self.rate + (rate - self.rate) * GAIN,
            (false, true) => rate,
            (_, false) => self.rate.max(rate),
        };
        self.exact |= exact;
        if self.seen.len() == ROUNDS {
            self.seen.pop_front();
        }
        self.seen.push_back(pages);
    }

    fn after(&self, seconds: f64) -> f64 {
        let pages = self.pages();
        if pages > 0.0 { pages * -(-self.rate * seconds / pages).exp_m1() } else { 0.0 }
    }

    fn slow_down(&mut self, factor: f64) {
        self.rate *= factor;
    }
}

impl DirtyRate {
    /// Takes what a harvest found in each part of memory, written in the time `took`.
    pub fn learn(&mut self, took: Duration, pages: &[u64]) {
        let seconds = took.as_secs_f64();
        if seconds <= 0.0 {
            return;
        }
        self.parts.resize_with(pages.len(), Part::default);
        for (part, pages) in self.parts.iter_mut().zip(pages) {
            part.learn(*pages as f64, seconds);
        }
        self.rounds += 1;
        self.latest.push_back((pages.iter().sum(), took));
        while self.latest.iter().skip(1).map(|(_, took)| *took).sum::<Duration>() >= TELLING {
            self.latest.pop_front();
        }
    }

    /// Harvests it has learned from.
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// Unique pages a second as the last round had them, or as the last quarter of a second had them if it was
    /// shorter.
    pub fn pages_per_second(&self) -> Option<f64> {
        let (pages, time) =
            self.latest.iter().rev().fold((0.0, Duration::ZERO), |(pages, time), (dirty, took)| {
                let share = if time.is_zero() {
                    1.0
                } else {
                    TELLING.saturating_sub(time).div_duration_f64(*took).min(1.0)
                };
                (pages + *dirty as f64 * share, time + took.mul_f64(share))
            });
        (!time.is_zero()).then(|| pages / time.as_secs_f64())
    }

    /// Pages a second before any is written twice, of each part: its heat.
    pub fn heat(&self) -> impl Iterator<Item = f64> + '_ {
        self.parts.iter().map(|part| part.rate)
    }

    /// Pages that will be dirty so long after all were clean.
    pub fn pages_after(&self, took: Duration) -> f64 {
        let seconds = took.as_secs_f64();
        self.parts.iter().map(|part| part.after(seconds)).sum()
    }

    /// The guest's speed has changed to `factor` of what it was.
    pub fn slow_down(&mut self, factor: f64) {
        self.parts.iter_mut().for_each(|part| part.slow_down(factor));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a guest dirties in `ms` that writes evenly to `pages` pages at `rate` a second.
    fn dirtied(pages: f64, rate: f64, ms: u64) -> u64 {
        let seconds = Duration::from_millis(ms).as_secs_f64();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a count of pages"
        )]
        {
            (pages * (1.0 - (-rate * seconds / pages).exp())).round() as u64
        }
    }

    #[test]
    fn two_rounds_tell_what_a_third_will_have() {
        let mut rate = DirtyRate::default();
        for ms in [4000, 300] {
            // A hot part of 10 000 pages, a cold one of a million, one that is never written.
            let pages = [dirtied(1e4, 1e5, ms), dirtied(1e6, 1e5, ms), 0];
            rate.learn(Duration::from_millis(ms), &pages);
        }
        let truth = (dirtied(1e4, 1e5, 100) + dirtied(1e6, 1e5, 100)) as f64;
        let told = rate.pages_after(Duration::from_millis(100));
        assert!((told / truth - 1.0).abs() < 0.3, "{told} for {truth}");
        assert_eq!(rate.rounds(), 2);
        let heat: Vec<_> = rate.heat().collect();
        assert!(heat[2] == 0.0 && heat[0] > 0.0 && heat[1] > 0.0, "{heat:?}");
    }

    #[test]
    fn a_throttled_guest_dirties_less() {
        let mut rate = DirtyRate::default();
        rate.learn(Duration::from_secs(1), &[1000]);
        rate.learn(Duration::from_millis(100), &[200]);
        let before = rate.pages_after(Duration::from_millis(10));
        rate.slow_down(0.5);
        let after = rate.pages_after(Duration::from_millis(10));
        assert!((after / before - 0.5).abs() < 0.02, "{after} {before}");
    }

    #[test]
    fn a_moment_without_a_cpu_is_no_guest_that_stands_still() {
        let mut rate = DirtyRate::default();
        rate.learn(Duration::from_secs(4), &[40_000]);
        for _ in 0..20 {
            rate.learn(Duration::from_millis(50), &[50]);
        }
        let told = rate.pages_per_second().expect("told");
        assert!((told - 1000.0).abs() < 1e-6, "{told}");
        rate.learn(Duration::from_millis(5), &[0]);
        let told = rate.pages_per_second().expect("told");
        assert!((told - 980.0).abs() < 1e-6, "{told}");
        // A round that takes longer stands for itself.
        rate.learn(Duration::from_millis(400), &[0]);
        assert_eq!(rate.pages_per_second(), Some(0.0));
    }

    #[test]
    fn a_guest_that_writes_nothing_has_no_rate() {
        let mut rate = DirtyRate::default();
        assert_eq!(rate.pages_per_second(), None);
        rate.learn(Duration::ZERO, &[1]);
        assert_eq!(rate.rounds(), 0);
        rate.learn(Duration::from_millis(1), &[0, 0]);
        rate.learn(Duration::from_millis(1), &[0, 0]);
        assert_eq!(rate.pages_per_second(), Some(0.0));
        assert!(rate.pages_after(Duration::from_secs(9)).abs() < f64::EPSILON);
    }
}
