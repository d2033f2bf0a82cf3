//! How much one channel has under way: as much as lands soon.
//!
//! Of what is under way nothing is known until it lands, and a link is given up that lands nothing for
//! too long. So a slow one is given little at a time, and all that many channels hand it lands in time to
//! be seen. Where it lands soon the next time it is more, which a fast link is at within a few round
//! trips.

use std::time::Duration;

/// Page bytes under way at the start, and at least.
const LEAST: u64 = 64 << 10;

/// Page bytes under way at most: what must be remembered, and what the last round may have to wait for.
const MOST: u64 = 32 << 20;

/// One channel's.
#[derive(Debug)]
pub(crate) struct Pace {
    window: u64,
    /// What waits longer for those before it was too much.
    late: Duration,
    /// The shortest time that anything took to land: the way there and back.
    shortest: Duration,
}

impl Pace {
    /// On a link that is given up when nothing lands for so long.
    pub(crate) fn new(stall: Duration) -> Self {
        // All channels may begin at once that had the link to themselves, and links become slower.
        Self { window: LEAST, late: stall / 32, shortest: Duration::MAX }
    }

    /// Page bytes to have under way before something lands.
    pub(crate) fn window(&self) -> u64 {
        self.window
    }

    /// Page bytes of a batch, so that several are under way.
    pub(crate) fn batch_bytes(&self) -> u64 {
        self.window / 4
    }

    /// So many page bytes, all that were under way then, took so long to land.
    pub(crate) fn landed(&mut self, under_way: u64, took: Duration) {
        self.shortest = self.shortest.min(took);
        let waited = took.saturating_sub(self.shortest);
        if waited > self.late {
            let in_time = u128::from(under_way) * self.late.as_nanos() / waited.as_nanos();
            self.window = self.window.min(u64::try_from(in_time).unwrap_or(MOST)).max(LEAST);
        } else if waited <= self.late / 2 {
            // What was not there to be sent says nothing of what could have been.
            self.window = self.window.max(under_way.saturating_mul(2)).min(MOST);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const STALL: Duration = Duration::from_secs(10);

    /// A link of so many bytes a second that so many channels share byte by byte, each with a full
    /// window. Returns the windows that follow one another, and the longest time that nothing landed.
    fn over(rate: u64, channels: u64, rounds: usize) -> (Vec<u64>, Duration) {
        let mut pace = Pace::new(STALL);
        let mut longest = Duration::ZERO;
        let windows = (0..rounds).map(|_| {
            let window = pace.window();
            let time_of =
                |bytes: u64| Duration::from_secs_f64((bytes * channels) as f64 / rate as f64);
            let batch = pace.batch_bytes();
            longest = longest.max(time_of(batch));
            (1..=4).for_each(|batches| pace.landed(batches * batch, time_of(batches * batch)));
            window
        });
        (windows.collect(), longest)
    }

    #[test]
    fn a_fast_link_has_all_it_can_take_within_few_windows() {
        let (windows, _) = over(4 << 30, 16, 12);
        assert_eq!(windows[9..], [MOST; 3], "{windows:?}");
    }

    #[test]
    fn a_slow_link_shared_by_many_lands_something_all_the_time() {
        for (rate, channels) in [(4 << 20, 16), (1 << 20, 16), (4 << 20, 64), (1 << 20, 64)] {
            let (windows, longest) = over(rate, channels, 12);
            assert!(windows.iter().all(|window| *window <= 4 * LEAST), "{windows:?}");
            assert!(longest < STALL / 4, "{longest:?}");
        }
        // In between: as much as lands in time, and not more from then on.
        let (windows, longest) = over(64 << 20, 16, 12);
        assert!(windows.iter().all(|window| (LEAST..8 << 20).contains(window)), "{windows:?}");
        assert!(windows[11] > LEAST && longest < STALL / 16, "{windows:?} {longest:?}");
    }

    #[test]
    fn a_long_way_is_not_a_slow_link() {
        let mut pace = Pace::new(STALL);
        (0..9).for_each(|_| pace.landed(pace.window(), STALL));
        assert_eq!(pace.window(), MOST);
    }

    #[test]
    fn a_link_that_becomes_slow_is_given_less() {
        let mut pace = Pace::new(STALL);
        (0..9).for_each(|_| pace.landed(pace.window(), Duration::ZERO));
        assert_eq!(pace.window(), MOST);
        pace.landed(MOST, STALL / 8);
        assert_eq!(pace.window(), MOST / 4);
        // Neither a small batch that took its time, nor one that did not, says anything.
        pace.landed(4096, STALL / 48);
        pace.landed(4096, Duration::ZERO);
        assert_eq!(pace.window(), MOST / 4);
    }
}
