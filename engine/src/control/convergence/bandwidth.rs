//! How fast page bytes land, as it was seen over windows of time.

use std::collections::VecDeque;
use std::time::Duration;

/// How the rates of windows become one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Averaging {
    /// The last window's, as QEMU has it.
    Last,
    /// All bytes by all time, from the beginning.
    Mean,
    /// What came later counts more: each window three tenths, and what came before it the rest. It
    /// predicts best (`docs/convergence.md`).
    #[default]
    Ewma,
    /// The harmonic mean of the last windows: slow ones count more, as they do for what must be
    /// waited for.
    Harmonic,
}

/// A window is closed once it is so long and something landed in it. Acknowledgements come by the
/// megabyte, so shorter ones would see none, or two.
const WINDOW: Duration = Duration::from_millis(50);

/// Page bytes below which a window's rate says more about latency than about bandwidth.
const TELLING_BYTES: u64 = 1 << 20;

/// A window that never comes to that many bytes is closed all the same: the link is slow.
const LONGEST_WINDOW: Duration = Duration::from_secs(1);

/// Windows that are looked back on.
const WINDOWS: usize = 16;

/// For how long the last window says what happens just now.
const RECENT: Duration = Duration::from_secs(1);

/// What the last window counts in [`Averaging::Ewma`].
const EWMA_GAIN: f64 = 0.3;

/// Page bytes that land per second, over all channels and on each.
///
/// Only time in which there was something to send counts: the driver says when a round begins, and
/// takes samples while it goes on.
#[derive(Debug, Clone)]
pub struct Bandwidth {
    averaging: Averaging,
    all: Windows,
    channels: Vec<Windows>,
    /// When the last sample was taken, and what had landed then on each channel.
    last: (Duration, Vec<u64>),
    /// Whether the round is too short to fill the link.
    too_short: bool,
    /// When the last window was closed.
    closed_at: Duration,
}

impl Bandwidth {
    /// Of a link about which nothing is known.
    pub fn new(averaging: Averaging) -> Self {
        Self {
            averaging,
            all: Windows::default(),
            channels: Vec::new(),
            last: (Duration::ZERO, Vec::new()),
            too_short: false,
            closed_at: Duration::ZERO,
        }
    }

    /// A round begins that has `bytes` to send, where an answer takes `round_trip`. What landed
    /// since the last one does not count, and neither does the time.
    pub fn round_began(&mut self, now: Duration, landed: &[u64], bytes: u64, round_trip: Duration) {
        self.last = (now, landed.to_vec());
        // A link that is idle for most of a round, since the round is over before it is answered,
        // tells nothing about its bandwidth.
        self.too_short = self.bytes_per_second().is_some_and(|rate| {
            (bytes as f64) < TELLING_BYTES as f64 + rate * 2.0 * round_trip.as_secs_f64()
        });
    }

    /// Takes what has landed on each channel since the beginning. Whether it tells something.
    pub fn sample(&mut self, now: Duration, landed: &[u64]) -> bool {
        let took = now.saturating_sub(self.last.0);
        if took.is_zero() {
            return false;
        }
        let sum: u64 = landed
            .iter()
            .enumerate()
            .map(|(channel, landed)| landed.saturating_sub(self.last_of(channel)))
            .sum();
        // But that it is faster than was thought.
        let slower = self.bytes_per_second().is_some_and(|r| sum as f64 <= r * took.as_secs_f64());
        if self.too_short && slower {
            return false;
        }
        self.channels.resize_with(landed.len().max(self.channels.len()), Windows::default);
        for (channel, landed) in landed.iter().enumerate() {
            let bytes = landed.saturating_sub(self.last_of(channel));
            self.channels[channel].add(bytes, took, self.averaging);
        }
        if self.all.add(sum, took, self.averaging) {
            self.closed_at = now;
        }
        self.last = (now, landed.to_vec());
        sum > 0
    }

    /// What has landed up to now does not count.
    pub(super) fn skip(&mut self, now: Duration, landed: &[u64]) {
        self.last.0 = now;
        self.last.1.clear();
        self.last.1.extend_from_slice(landed);
    }

    fn last_of(&self, channel: usize) -> u64 {
        self.last.1.get(channel).copied().unwrap_or(0)
    }

    /// Over all channels; `None` before anything was seen.
    pub fn bytes_per_second(&self) -> Option<f64> {
        self.all.rate(self.averaging)
    }

    /// On one channel.
    pub fn of_channel(&self, channel: u16) -> Option<f64> {
        self.channels.get(usize::from(channel))?.rate(self.averaging)
    }

    /// How far windows are from the average, as a share of it: a standard deviation. The last
    /// window counts for itself if it was slow just now: whatever slowed it may go on.
    pub fn deviation(&self, now: Duration) -> f64 {
        let Some(rate) = self.bytes_per_second().filter(|rate| *rate > 0.0) else { return 1.0 };
        let closed = &self.all.closed;
        if closed.is_empty() {
            return 0.5;
        }
        let squares: f64 = closed.iter().map(|seen| (seen / rate - 1.0).powi(2)).sum();
        let spread = (squares / closed.len() as f64).sqrt();
        let last = closed.back().filter(|_| self.is_recent(now));
        let lag = last.map_or(0.0, |last| 1.0 - last / rate);
        // One window says little about how much windows differ.
        spread.max(lag).max(0.2 / closed.len() as f64).min(1.0)
    }

    /// Whether the last window says something about this moment. Where rounds are too short to fill
    /// one, none follows.
    fn is_recent(&self, now: Duration) -> bool {
        now.saturating_sub(self.closed_at) < RECENT
    }
}

/// Windows of one channel, or of all together.
#[derive(Debug, Clone, Default)]
struct Windows {
    open_bytes: u64,
    open_took: Duration,
    /// Bytes per second of those that are closed, the newest last.
    closed: VecDeque<f64>,
    ewma: Option<f64>,
    all_bytes: u64,
    all_took: Duration,
}

impl Windows {
    /// Whether that closed a window.
    fn add(&mut self, bytes: u64, took: Duration, averaging: Averaging) -> bool {
        self.all_bytes += bytes;
        self.all_took += took;
        self.open_bytes += bytes;
        self.open_took += took;
        let full = self.open_took >= WINDOW && self.open_bytes >= TELLING_BYTES;
        let slow = self.open_took >= LONGEST_WINDOW && self.open_bytes > 0;
        if !full && !slow {
            return false;
        }
        let rate = self.open_bytes as f64 / self.open_took.as_secs_f64();
        (self.open_bytes, self.open_took) = (0, Duration::ZERO);
        if self.closed.len() == WINDOWS {
            self.closed.pop_front();
        }
        self.closed.push_back(rate);
        if averaging == Averaging::Ewma {
            self.ewma = Some(self.ewma.map_or(rate, |old| old + (rate - old) * EWMA_GAIN));
        }
        true
    }

    fn rate(&self, averaging: Averaging) -> Option<f64> {
        let Some(last) = self.closed.back() else {
            // The first window is not closed yet: better than nothing.
            let seconds = self.all_took.as_secs_f64();
            return (self.all_bytes > 0 && seconds > 0.0).then(|| self.all_bytes as f64 / seconds);
        };
        Some(match averaging {
            Averaging::Last => *last,
            Averaging::Mean => self.all_bytes as f64 / self.all_took.as_secs_f64(),
            Averaging::Ewma => self.ewma.unwrap_or(*last),
            Averaging::Harmonic => {
                let inverse: f64 = self.closed.iter().map(|rate| rate.recip()).sum();
                self.closed.len() as f64 / inverse
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const MIB: u64 = 1 << 20;
    const ALL: [Averaging; 4] =
        [Averaging::Last, Averaging::Mean, Averaging::Ewma, Averaging::Harmonic];

    /// What was seen after so many milliseconds each with so many MiB on two channels.
    fn seen(averaging: Averaging, steps: &[(u32, u64)]) -> Bandwidth {
        let mut bandwidth = Bandwidth::new(averaging);
        let (mut now, mut landed) = (Duration::ZERO, [0, 0]);
        bandwidth.round_began(now, &landed, u64::MAX, Duration::ZERO);
        for (ms, mib) in steps {
            now += MS * *ms;
            landed = [landed[0] + mib * MIB, landed[1] + 3 * mib * MIB];
            bandwidth.sample(now, &landed);
        }
        bandwidth
    }

    fn now(steps: &[(u32, u64)]) -> Duration {
        steps.iter().map(|(ms, _)| MS * *ms).sum()
    }

    fn mib(rate: Option<f64>) -> f64 {
        rate.unwrap() / MIB as f64
    }

    #[test]
    fn a_steady_link_is_measured_alike_by_all() {
        for averaging in ALL {
            let bandwidth = seen(averaging, &[(10, 1); 100]);
            assert!((mib(bandwidth.bytes_per_second()) - 400.0).abs() < 1.0, "{averaging:?}");
            assert!((mib(bandwidth.of_channel(0)) - 100.0).abs() < 1.0);
            assert!((mib(bandwidth.of_channel(1)) - 300.0).abs() < 1.0);
            assert_eq!(bandwidth.of_channel(2), None);
            assert!(bandwidth.deviation(1000 * MS) < 0.05, "{bandwidth:?}");
        }
    }

    #[test]
    fn a_slow_window_is_remembered_by_all_but_the_last() {
        let steps = [[(10, 1); 10], [(100, 1); 10], [(10, 1); 10]].concat();
        assert!((mib(seen(Averaging::Last, &steps).bytes_per_second()) - 400.0).abs() < 1.0);
        for averaging in &ALL[1..] {
            let rate = mib(seen(*averaging, &steps).bytes_per_second());
            assert!(rate < 350.0, "{averaging:?}: {rate}");
        }
        assert!(seen(Averaging::Harmonic, &steps).deviation(now(&steps)) > 0.5);
    }

    #[test]
    fn a_link_that_has_just_become_slow_is_uncertain() {
        let steps = [&[(10, 1); 50][..], &[(200, 1)]].concat();
        let bandwidth = seen(Averaging::Ewma, &steps);
        assert!(bandwidth.deviation(now(&steps)) > 0.5);
        // It may be as it was by now, and rounds too short to tell.
        let later = now(&steps) + 1000 * MS;
        assert!(bandwidth.deviation(later) < 0.5);
    }

    #[test]
    fn time_between_rounds_does_not_count() {
        let mut bandwidth = seen(Averaging::Harmonic, &[(10, 1); 50]);
        let before = bandwidth.bytes_per_second();
        bandwidth.round_began(3600 * 1000 * MS, &[50 * MIB, 150 * MIB], u64::MAX, MS);
        assert_eq!(bandwidth.bytes_per_second(), before);
    }

    #[test]
    fn a_round_that_does_not_fill_the_link_tells_nothing() {
        let mut bandwidth = seen(Averaging::Harmonic, &[(10, 1); 50]);
        let before = bandwidth.bytes_per_second();
        let mut landed = [50 * MIB, 150 * MIB];
        bandwidth.round_began(600 * MS, &landed, MIB, 100 * MS);
        landed[0] += MIB;
        bandwidth.sample(800 * MS, &landed);
        assert_eq!(bandwidth.bytes_per_second(), before);
        // Unless it shows that the link is faster than was thought.
        landed[0] += 100 * MIB;
        bandwidth.sample(801 * MS, &landed);
        bandwidth.round_began(801 * MS, &landed, MIB, 100 * MS);
        landed[0] += 100 * MIB;
        bandwidth.sample(860 * MS, &landed);
        assert!(bandwidth.bytes_per_second() > before, "{:?}", bandwidth.bytes_per_second());
    }

    #[test]
    fn nothing_is_known_before_anything_landed() {
        let mut bandwidth = seen(Averaging::Harmonic, &[(500, 0), (100, 0)]);
        assert_eq!(bandwidth.bytes_per_second(), None);
        assert!(bandwidth.deviation(600 * MS) >= 1.0);
        // Then the time it took counts.
        bandwidth.sample(800 * MS, &[0, MIB]);
        assert!((mib(bandwidth.bytes_per_second()) - 1.25).abs() < 0.01);
    }
}
