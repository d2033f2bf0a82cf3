//! How fast pages land while the guest runs, and how fast they will once it stands still.
//!
//! A bandwidth limit holds for the first alone, and what was measured under it says little about the
//! second.

use std::num::NonZeroU64;
use std::time::Duration;

use super::bandwidth::{Averaging, Bandwidth};

/// What a link is taken to carry that was never seen without its limit: 10 Gb/s, in bytes. If that is
/// too much, a strict switchover is called off in time, and has shown how much it is.
const ASSUMED: f64 = 1.25e9;
/// How far off that may be, as a share of it.
const ASSUMED_DEVIATION: f64 = 0.5;
/// More than any link carries: 800 Gb/s, in bytes.
const MOST_ASSUMED: f64 = 1e11;

/// How far off the host's own figure may be.
const GIVEN_DEVIATION: f64 = 0.1;

/// Who sends less than that share of the limit is held by the link, and not by the limit.
const HELD: f64 = 0.8;

/// Two measures of a link: what a limit lets through, and what it carries.
#[derive(Debug, Clone)]
pub(super) struct Link {
    limited: Bandwidth,
    free: Bandwidth,
    /// Page bytes a second, if that is what is sent by just now.
    limit: Option<NonZeroU64>,
    /// What is taken for the free link as long as nobody has seen it.
    assumed: f64,
    /// Rounds that showed it, those of switchovers included.
    free_rounds: u32,
    /// How much more than what was seen of the free link is hoped for.
    hope: f64,
}

impl Link {
    pub(super) fn new(averaging: Averaging) -> Self {
        let unknown = Bandwidth::new(averaging);
        Self {
            limited: unknown.clone(),
            free: unknown,
            limit: None,
            assumed: ASSUMED,
            free_rounds: 0,
            hope: 1.0,
        }
    }

    /// What holds from now on.
    pub(super) fn set_limit(&mut self, limit: Option<NonZeroU64>) {
        self.limit = limit;
    }

    pub(super) fn round_began(
        &mut self,
        now: Duration,
        landed: &[u64],
        bytes: u64,
        round_trip: Duration,
    ) {
        self.free_rounds += u32::from(self.limit.is_none());
        self.limited.round_began(now, landed, bytes, round_trip);
        self.free.round_began(now, landed, bytes, round_trip);
    }

    pub(super) fn skip(&mut self, now: Duration, landed: &[u64]) {
        self.limited.skip(now, landed);
        self.free.skip(now, landed);
    }

    pub(super) fn sample(&mut self, now: Duration, landed: &[u64]) {
        let (measured, other) = match self.limit {
            Some(_) => (&mut self.limited, &mut self.free),
            None => (&mut self.free, &mut self.limited),
        };
        let tells = measured.sample(now, landed);
        other.skip(now, landed);
        if tells && self.limit.is_none() {
            self.hope = 1.0;
        }
    }

    /// As it is just now. A limit that has just been lifted is all that is known.
    pub(super) fn now(&self) -> &Bandwidth {
        let nothing_else = self.free.bytes_per_second().is_none();
        if self.limit.is_some() || nothing_else { &self.limited } else { &self.free }
    }

    /// Page bytes a second that will land while the guest stands still, and how far off that may be
    /// as a share of it: by the host's figure if it has one. `may_try` is whether it does no harm to
    /// expect too much.
    pub(super) fn of_switchover(
        &self,
        now: Duration,
        given: Option<NonZeroU64>,
        may_try: bool,
    ) -> Option<(f64, f64)> {
        if let Some(given) = given {
            return Some((given.get() as f64, GIVEN_DEVIATION));
        }
        let measured = self.now();
        let rate = measured.bytes_per_second().filter(|rate| *rate > 0.0)?;
        let deviation = measured.deviation(now);
        let hope = if may_try { self.hope } else { 1.0 };
        match self.free.bytes_per_second() {
            Some(free) if self.is_held() && free * hope > rate => {
                Some((free * hope, self.free.deviation(now)))
            }
            None if self.is_held() && may_try => Some((rate.max(self.assumed), ASSUMED_DEVIATION)),
            _ => Some((rate, deviation)),
        }
    }

    /// Whether it is the limit that holds pages back, and not the link.
    fn is_held(&self) -> bool {
        let rate = self.limited.bytes_per_second();
        self.limit.zip(rate).is_some_and(|(limit, rate)| rate >= limit.get() as f64 * HELD)
    }

    /// Whether all that is known of the free link is what so many switchovers have shown, which were called
    /// off: each is a moment, and it may have been a bad one.
    pub(super) fn is_barely_known(&self, switchovers: u32) -> bool {
        let seen = self.free.bytes_per_second().is_some();
        self.is_held() && seen && self.free_rounds <= switchovers
    }

    /// Hopes that it carries more than was seen of it, where only a switchover can tell.
    pub(super) fn hope(&mut self, share: f64) {
        let most = self.free.bytes_per_second().map_or(1.0, |free| MOST_ASSUMED / free.max(1.0));
        if self.is_held() {
            self.hope = (self.hope / share).min(most).max(1.0);
        }
    }

    /// Whether all that is known is what a limit lets through, and more than was assumed may be true.
    pub(super) fn may_assume_more(&self) -> bool {
        self.more().is_some()
    }

    /// By what was assumed nothing will come of it. Assumes twice as much, if nothing is known: only a
    /// switchover can tell, and costs less than a guest that is slowed down in vain.
    pub(super) fn assume_more(&mut self) {
        if let Some(more) = self.more() {
            self.assumed = more;
        }
    }

    fn more(&self) -> Option<f64> {
        let rate = self.limited.bytes_per_second()?;
        let unseen = self.free.bytes_per_second().is_none();
        let more = 2.0 * self.assumed.max(rate);
        (self.is_held() && unseen && more <= MOST_ASSUMED).then_some(more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const SOME: NonZeroU64 = NonZeroU64::new(123).unwrap();

    /// A link, its time, and what has landed.
    struct Seen(Link, Duration, u64);

    impl Seen {
        fn nothing() -> Self {
            Self(Link::new(Averaging::default()), Duration::ZERO, 0)
        }

        /// A second at so many MB/s, under a limit of so many.
        fn at(mut self, rate: u64, limit: Option<u64>) -> Self {
            let Self(link, now, landed) = &mut self;
            link.set_limit(limit.and_then(|limit| NonZeroU64::new(limit * 1_000_000)));
            link.round_began(*now, &[*landed], u64::MAX, Duration::ZERO);
            for _ in 0..100 {
                *now += 10 * MS;
                *landed += rate * 10_000;
                link.sample(*now, &[*landed]);
            }
            self
        }

        /// MB/s to expect of a switchover.
        fn expected(&self, given: Option<NonZeroU64>, may_try: bool) -> Option<f64> {
            let expected = self.0.of_switchover(self.1, given, may_try);
            expected.map(|(rate, _)| (rate / 1e6).round())
        }
    }

    #[test]
    fn without_a_limit_it_is_what_was_measured() {
        assert_eq!(Seen::nothing().expected(None, true), None);
        assert_eq!(Seen::nothing().at(300, None).expected(None, true), Some(300.0));
        let given = NonZeroU64::new(2_000_000);
        assert_eq!(Seen::nothing().at(300, None).expected(given, true), Some(2.0));
        assert_eq!(Seen::nothing().expected(Some(SOME), false), Some(0.0));
    }

    #[test]
    fn under_a_limit_it_is_what_was_measured_without() {
        let seen = Seen::nothing().at(300, None).at(20, Some(20));
        assert_eq!(seen.expected(None, false), Some(300.0));
        assert!((seen.0.now().bytes_per_second().unwrap() - 20e6).abs() < 1e6);
        // The limit is no longer what holds it back.
        assert_eq!(
            seen.at(200, Some(1000)).expected(None, true).map(|rate| rate < 250.0),
            Some(true)
        );
    }

    #[test]
    fn where_there_always_was_a_limit_the_link_may_be_tried() {
        let seen = Seen::nothing().at(20, Some(20));
        assert_eq!(seen.expected(None, true), Some(1250.0));
        assert_eq!(seen.expected(None, false), Some(20.0));
        assert_eq!(Seen::nothing().at(20, Some(100)).expected(None, true), Some(20.0));
        // What the switchover showed that was called off, and then the limit again.
        let seen = seen.at(90, None).at(20, Some(20));
        assert_eq!(seen.expected(None, true), Some(90.0));
        // Lifted just now.
        let mut seen = Seen::nothing().at(20, Some(20));
        seen.0.set_limit(None);
        assert_eq!(seen.expected(None, true), Some(20.0));
    }

    #[test]
    fn of_what_only_a_switchover_shows_more_is_hoped_for() {
        let barely = |seen: &Seen| seen.0.is_barely_known(1);
        let mut seen = Seen::nothing().at(20, Some(20));
        assert!(!barely(&seen), "nobody has seen anything of it");
        // A switchover.
        seen.0.set_limit(None);
        seen.0.round_began(seen.1, &[seen.2], 1_000_000, Duration::ZERO);
        seen.0.sample(seen.1 + 100 * MS, &[seen.2 + 1_000_000]);
        seen.0.set_limit(NonZeroU64::new(20_000_000));
        assert!(barely(&seen));
        // It was slower than the limit, which is what counts then.
        assert_eq!(seen.expected(None, true), Some(20.0));
        (0..4).for_each(|_| seen.0.hope(0.5));
        assert_eq!(seen.expected(None, true), Some(160.0));
        assert_eq!(
            seen.expected(None, false),
            Some(20.0),
            "hope costs a switchover that is not called off"
        );
        // The next one shows that there was reason.
        seen.0.set_limit(None);
        seen.0.sample(seen.1 + 200 * MS, &[seen.2 + 9_000_000]);
        seen.0.set_limit(NonZeroU64::new(20_000_000));
        assert!(seen.expected(None, true).is_some_and(|rate| (20.0..80.0).contains(&rate)));
        for _ in 0..1000 {
            seen.0.hope(0.5);
        }
        assert_eq!(seen.expected(None, true), Some(MOST_ASSUMED / 1e6));
        let seen = Seen::nothing().at(90, None).at(20, Some(20));
        assert!(!seen.0.is_barely_known(0), "a round has shown it");
    }

    #[test]
    fn more_is_assumed_of_a_link_until_it_was_seen() {
        let mut seen = Seen::nothing().at(20, Some(20));
        assert!(seen.0.may_assume_more());
        seen.0.assume_more();
        assert_eq!(seen.expected(None, true), Some(2500.0));
        while seen.0.may_assume_more() {
            seen.0.assume_more();
        }
        assert_eq!(seen.expected(None, true), Some(80_000.0));
        assert!(!seen.at(90, None).at(20, Some(20)).0.may_assume_more());
        // Nothing holds these back but the link.
        assert!(!Seen::nothing().at(20, Some(100)).0.may_assume_more());
        assert!(!Seen::nothing().at(20, None).0.may_assume_more());
    }
}
