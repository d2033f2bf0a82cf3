//! When to stop copying and switch over, and what to do if that moment does not come.
//!
//! Pure state machines: what is observed comes in with the time `now`, a duration since the
//! migration began by whatever clock the caller has; decisions go out. The engine's driver and the
//! simulator of `pageferry-bench` drive the same ones.
//!
//! - [`Bandwidth`] and [`DirtyRate`] learn from rounds, and [`Prediction`] is what comes of them:
//!   the downtime to expect, term by term, each with its uncertainty.
//! - [`Convergence`] decides after each round, and once more right before the guest is paused, on
//!   an exact count.
//! - [`Attempt`] is the clock of one switchover, and says when it must be called off.

mod attempt;
mod bandwidth;
mod dirty_rate;
mod estimate;
mod link;
mod policy;
mod prediction;
#[cfg(test)]
mod tests;

use std::num::NonZeroU64;
use std::time::Duration;

pub use attempt::{Attempt, Bound};
pub use bandwidth::{Averaging, Bandwidth};
pub use dirty_rate::DirtyRate;
pub(crate) use estimate::NEVER;
pub use estimate::{Estimate, Learned};
pub use policy::{Policy, Settings, Throttling};
pub use prediction::{Prediction, Term};

use crate::machine::Rehearsal;
use crate::pages::memory::PAGE_BYTES;
use estimate::from_seconds;
use link::Link;
use prediction::Terms;

/// Parts of guest memory whose dirty pages are counted apart.
pub const HEAT_PARTS: usize = 64;

/// How many uncertainties a prediction must be below the limit, at first.
const CAUTION: f64 = 2.0;
/// And at most, after switchovers that were called off.
const MOST_CAUTION: f64 = 4.0;
/// Deviations that are reserved for what follows the commit, as TCP's timeout has it; less as
/// caution sinks.
const RESERVE: f64 = 4.0;
const LEAST_RESERVE: f64 = 1.0;
/// What is left of caution after each round whose prediction would fit without. What is waited for may
/// never come, and the bound holds anyway.
const COURAGE: f64 = 0.8;
/// But rounds may be short, and a host busy for longer.
const BOLDER_EVERY: Duration = Duration::from_millis(100);

/// What a switchover that was called off is worth waiting for: so many limits, twice as many after
/// each, and no longer than the most. So the guest stands still for a small share of the time.
const BACK_OFF_LIMITS: u32 = 4;
const MOST_BACK_OFF: Duration = Duration::from_secs(10);
/// What is left, round by round, of what the last switchover took too long for, once that time is
/// over: it may have been bad luck, and only another one can tell.
const HOPE: f64 = 0.7;
/// Switchovers that must have been called off before it is believed what they alone have shown.
const TELLING_SWITCHOVERS: u32 = 3;

/// How old what is known of device state may become.
const REHEARSE_AGAIN: Duration = Duration::from_secs(30);
const REHEARSE_SOON: Duration = Duration::from_millis(200);

/// Rounds before it can be said whether it will converge: two lengths tell how fast pages are
/// dirtied and how many there are.
const TELLING_ROUNDS: u32 = 2;

/// Rounds in a row in which the downtime to expect does not shrink by a tenth.
const STALE_ROUNDS: u32 = 3;
const PROGRESS: f64 = 0.9;

/// Rounds in a row that must say that it will not converge before it is given up.
const HOPELESS_ROUNDS: u32 = 2;

/// Rounds shorter than this are followed by a rest: they wait for something else than pages.
const SHORTEST_ROUND: Duration = Duration::from_millis(5);

/// Turns at which a guess at the least downtime has settled.
const TURNS: u32 = 40;

/// A round that is over.
#[derive(Debug, Clone, Copy)]
pub struct Round<'a> {
    /// From its beginning until the harvest after it.
    pub took: Duration,
    /// How long the guest had to dirty the pages: from the harvest before it to the one after it.
    /// That is longer than the round where there is a rest between rounds.
    pub dirtied_for: Duration,
    /// Pages that are dirty now, by [parts of memory](HEAT_PARTS).
    pub dirty_pages: &'a [u64],
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// Another round.
    Iterate {
        /// Downtime to expect if one switched over now; `None` before anything was measured.
        expected: Option<Duration>,
    },
    /// What remains may fit into the downtime limit: let all land that is under way, harvest once
    /// more, and [decide](Convergence::decide).
    Approach {
        /// Downtime to expect.
        expected: Duration,
    },
    /// What remains fits: pause the guest.
    SwitchOver {
        /// Downtime to expect.
        expected: Duration,
    },
    /// It will not converge, and post-copy was wanted for that.
    PostCopy {
        /// Downtime to expect if one switched over now.
        expected: Duration,
    },
    /// It does not converge, and was tried for long enough.
    GiveUp {
        /// Downtime to expect if one switched over now.
        expected: Duration,
    },
}

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
    /// Unique pages the guest dirtied a second in the last round.
    pub dirty_pages_per_second: f64,
    /// Rounds that it is told from.
    pub rounds: u32,
}

/// How a decision is made. The engine has the default; others are there to be compared with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Method {
    /// How the rates of windows become a bandwidth.
    pub averaging: Averaging,
    /// Whether a prediction must be below the limit by its uncertainty.
    pub cautious: bool,
    /// Whether the downtime is more than the time to send the remaining pages.
    pub all_terms: bool,
}

impl Default for Method {
    fn default() -> Self {
        Self { averaging: Averaging::default(), cautious: true, all_terms: true }
    }
}

/// Learns from rounds and switchovers, and decides.
#[derive(Debug, Clone)]
pub struct Convergence {
    settings: Settings,
    method: Method,
    /// How many uncertainties count.
    caution: f64,
    link: Link,
    dirty: DirtyRate,
    terms: Terms,
    rounds: u32,
    /// When all memory was sent once, and how long that took.
    sent_once: Option<(Duration, Duration)>,
    forecast: Option<Forecast>,
    /// The least downtime that was expected after a round, and rounds since.
    best: Duration,
    stale_rounds: u32,
    /// Rounds in a row that say that it will not converge.
    hopeless_rounds: u32,
    throttle_percent: u8,
    times_called_off: u32,
    /// When another switchover may be tried.
    not_before: Duration,
    /// When caution may be given up again.
    bolder_from: Duration,
    prediction: Option<Prediction>,
}

impl Convergence {
    /// Of a migration that begins.
    pub fn new(settings: Settings) -> Self {
        Self::by(Method::default(), settings)
    }

    /// The same, decided in another way.
    pub fn by(method: Method, settings: Settings) -> Self {
        Self {
            settings,
            method,
            caution: if method.cautious { CAUTION } else { 0.0 },
            link: Link::new(method.averaging),
            dirty: DirtyRate::default(),
            terms: Terms::default(),
            rounds: 0,
            sent_once: None,
            forecast: None,
            best: NEVER,
            stale_rounds: 0,
            hopeless_rounds: 0,
            throttle_percent: 0,
            times_called_off: 0,
            not_before: Duration::ZERO,
            bolder_from: Duration::ZERO,
            prediction: None,
        }
    }

    /// The host wants something else from now on.
    pub fn set(&mut self, settings: Settings) {
        if settings != self.settings {
            self.settings = settings;
            if !matches!(settings.policy, Policy::Throttle(_)) {
                self.throttle(0);
            }
            (self.best, self.stale_rounds, self.hopeless_rounds) = (NEVER, 0, 0);
        }
    }

    /// What the host wants.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// A round begins with `pages` to send.
    pub fn round_began(&mut self, now: Duration, landed: &[u64], pages: u64) {
        let round_trip = self.terms.round_trip.estimate().expected;
        self.link.round_began(now, landed, pages.saturating_mul(PAGE_BYTES), round_trip);
    }

    /// Page bytes that have landed on each channel since the migration began.
    pub fn landed(&mut self, now: Duration, landed: &[u64]) {
        self.link.sample(now, landed);
    }

    /// Page bytes a second that the host allows just now; `None` if as many as the link carries. It
    /// allows all of them while the guest stands still.
    pub fn set_bandwidth_limit(&mut self, limit: Option<NonZeroU64>) {
        self.link.set_limit(limit);
    }

    /// A message and its answer took so long.
    pub fn learn_round_trip(&mut self, took: Duration) {
        self.terms.round_trip.learn(took);
    }

    /// A harvest took so long.
    pub fn learn_harvest(&mut self, took: Duration) {
        self.terms.harvest.learn(took);
    }

    /// Device state was saved for the sake of what it takes.
    pub fn learn_rehearsal(&mut self, rehearsal: &Rehearsal) {
        self.terms.learn(rehearsal);
    }

    /// Whether what is known of device state should be learned anew, after so long: soon as long as
    /// little is known, and where what is not pages alone takes too long.
    pub fn wants_rehearsal(&self, now: Duration, age: Duration) -> bool {
        let soon = !self.terms.save.is_settled() || !self.pages_take_long(now);
        age >= if soon { REHEARSE_SOON } else { REHEARSE_AGAIN }
    }

    /// Stopping the guest took so long.
    pub fn learn_pause(&mut self, took: Duration) {
        self.terms.pause.learn(took);
    }

    /// Saving so many bytes of device state took so long.
    pub fn learn_save(&mut self, state_bytes: u64, took: Duration) {
        self.terms.learn(&Rehearsal { state_bytes, save: took, ..Rehearsal::default() });
    }

    /// Loading device state took so long.
    pub fn learn_load(&mut self, took: Duration) {
        self.terms.load.learn(took);
    }

    /// Device state has been with the destination for so long, and is not loaded: nobody waits for it
    /// any more, but if that is the last of it, it is why.
    pub fn load_goes_on(&mut self, so_far: Duration) {
        self.terms.load.goes_on(so_far);
    }

    /// Releasing host resources took so long.
    pub fn learn_release(&mut self, took: Duration) {
        self.terms.release.learn(took);
    }

    /// Device state went to the destination and its answer came back, in that time without the
    /// load: what that tells of the round trip.
    pub fn learn_state_exchange(&mut self, took: Duration) {
        let way = self
            .switchover_bandwidth(Duration::MAX)
            .map_or(Duration::ZERO, |(rate, _)| from_seconds(self.terms.state_bytes as f64 / rate));
        self.terms.round_trip.learn(took.saturating_sub(way));
    }

    /// A switchover was called off.
    pub fn called_off(&mut self, now: Duration) {
        let limits = BACK_OFF_LIMITS.saturating_mul(1 << self.times_called_off.min(20));
        let back_off = self.settings.downtime_limit.saturating_mul(limits).min(MOST_BACK_OFF);
        self.not_before = now.saturating_add(back_off);
        self.times_called_off += 1;
        if self.method.cautious {
            self.caution = (self.caution * 1.5 + 0.5).min(MOST_CAUTION);
        }
    }

    /// Takes a finished round and decides. Pages may still be under way: whether they fit is
    /// decided once they have landed.
    pub fn round_ended(&mut self, now: Duration, round: Round<'_>) -> Verdict {
        self.rounds += 1;
        self.dirty.learn(round.dirtied_for, round.dirty_pages);
        if self.sent_once.is_none() {
            self.sent_once = Some((now, round.took));
        }
        let pages = round.dirty_pages.iter().sum();
        let Some(prediction) = self.predict(now, pages) else {
            return if self.is_over(now) {
                Verdict::GiveUp { expected: NEVER }
            } else {
                Verdict::Iterate { expected: None }
            };
        };
        let expected = prediction.total().expected;
        self.note_progress(expected);
        self.forecast = self.forecast(now, pages);
        // What was tried and called off before is not tried for ever.
        let in_vain = self.times_called_off > 0 && self.is_over(now);
        if !in_vain && now >= self.not_before && self.fits(&prediction, pages) {
            return Verdict::Approach { expected };
        }
        self.not_yet(now, expected)
    }

    /// Decides on an exact count: everything sent has landed, and was harvested just now.
    pub fn decide(&mut self, now: Duration, pages: u64) -> Verdict {
        let Some(prediction) = self.predict(now, pages) else {
            return Verdict::Iterate { expected: None };
        };
        let expected = prediction.total().expected;
        if self.fits(&prediction, pages) {
            self.prediction = Some(prediction);
            return Verdict::SwitchOver { expected };
        }
        self.not_yet(now, expected)
    }

    /// The downtime to expect with so many pages to send; `None` before anything has landed.
    pub fn predict(&self, now: Duration, pages: u64) -> Option<Prediction> {
        match self.switchover_bandwidth(now) {
            Some((rate, deviation)) => Some(self.terms.predict(pages, rate, deviation)),
            // Memory was all zero, and nothing is to be sent.
            _ if pages == 0 => Some(self.terms.predict(0, f64::INFINITY, 0.0)),
            _ => None,
        }
    }

    /// Page bytes a second while the guest stands still, and how far off that may be.
    fn switchover_bandwidth(&self, now: Duration) -> Option<(f64, f64)> {
        self.link.of_switchover(now, self.settings.switchover_bandwidth, self.may_try())
    }

    /// Whether it does no harm to expect too much of the link: the host has not said how much, and what
    /// takes too long is called off.
    fn may_try(&self) -> bool {
        self.settings.bound == Bound::Strict && self.settings.switchover_bandwidth.is_none()
    }

    /// What takes longest of a downtime with so many pages to send, and all of that downtime, by what
    /// was seen of each term last: why it does not converge.
    pub fn at_fault(&self, pages: u64) -> (Term, Duration, Duration) {
        let nothing = if pages == 0 { 1.0 } else { 0.0 };
        let rate = self.switchover_bandwidth(Duration::MAX).map_or(nothing, |(rate, _)| rate);
        let seen = self.terms.seen(pages, rate);
        let all = seen.iter().fold(Duration::ZERO, |all, (_, took)| all.saturating_add(*took));
        let worst = seen.into_iter().max_by_key(|(_, took)| *took);
        let (term, took) = worst.unwrap_or((Term::FinalPages, all));
        (term, took, all)
    }

    /// What was predicted when the last switchover was decided on.
    pub fn prediction(&self) -> Option<&Prediction> {
        self.prediction.as_ref()
    }

    /// What must be left when the pages have landed, in a switchover under way.
    pub fn after_pages(&self) -> Duration {
        let state = self.prediction.map(|prediction| prediction.device_state).unwrap_or_default();
        state.expected.saturating_add(self.after_commit())
    }

    /// What must be left before the commit, in a switchover under way: nothing can be called off
    /// after it.
    pub fn after_commit(&self) -> Duration {
        let deviations = if self.method.cautious {
            (RESERVE * (self.caution / CAUTION).min(1.0)).max(LEAST_RESERVE)
        } else {
            RESERVE
        };
        self.terms.after_commit(deviations)
    }

    /// Whether a switchover under way will overrun its limit, with so many pages to send from now
    /// on: then it need not be tried.
    pub fn overruns(&self, attempt: &Attempt, now: Duration, pages: u64) -> bool {
        self.predict(now, pages).is_some_and(|prediction| {
            let pages = prediction.final_pages.expected;
            attempt.overruns(now, pages.saturating_add(prediction.after_pages().expected))
        })
    }

    /// Page bytes that land a second, if any did.
    pub fn bandwidth(&self) -> &Bandwidth {
        self.link.now()
    }

    /// How the guest dirties its memory.
    pub fn dirty_rate(&self) -> &DirtyRate {
        &self.dirty
    }

    /// By how much the guest is to be slowed down.
    pub fn throttle_percent(&self) -> u8 {
        self.throttle_percent
    }

    /// Whether it will converge, once two rounds have told.
    pub fn outlook(&self) -> Option<&Forecast> {
        self.forecast.as_ref()
    }

    /// How long to wait before the next round after one that took so long.
    pub fn rest(&self, took: Duration) -> Duration {
        SHORTEST_ROUND.saturating_sub(took)
    }

    fn fits(&self, prediction: &Prediction, pages: u64) -> bool {
        let limit = self.settings.downtime_limit;
        let total = if self.method.all_terms { prediction.total() } else { prediction.final_pages };
        match self.settings.bound {
            Bound::Strict => {
                if !self.method.cautious {
                    return total.expected <= limit;
                }
                let before_commit = prediction.before_commit().expected;
                total.upper(self.caution) <= limit
                    && before_commit.saturating_add(self.after_commit()) <= limit
            }
            // Without pages another round could not make it shorter.
            Bound::BestEffort => pages == 0 || total.expected <= limit,
        }
    }

    fn not_yet(&mut self, now: Duration, expected: Duration) -> Verdict {
        if self.is_over(now) {
            return Verdict::GiveUp { expected };
        }
        if now >= self.not_before {
            if expected <= self.settings.downtime_limit {
                if now >= self.bolder_from {
                    self.caution *= COURAGE;
                    self.bolder_from = now.saturating_add(BOLDER_EVERY);
                }
            } else if self.times_called_off > 0 {
                if self.pages_take_long(now) {
                    self.link.hope(HOPE);
                } else {
                    self.terms.hope(HOPE);
                }
            }
        }
        // What is expected to fit waits for something else than a slower guest.
        let hopeless = expected > self.settings.downtime_limit
            && (self.stale_rounds >= STALE_ROUNDS
                || self.forecast.is_some_and(|forecast| !forecast.meets_limit));
        let doubtful = self.times_called_off < TELLING_SWITCHOVERS
            && self.link.is_barely_known(self.times_called_off);
        if hopeless && self.may_try() && (doubtful || self.link.assumes_more()) {
            self.hopeless_rounds = 0;
            return Verdict::Iterate { expected: Some(expected) };
        }
        self.hopeless_rounds = if hopeless { self.hopeless_rounds + 1 } else { 0 };
        let given_up = self.hopeless_rounds >= HOPELESS_ROUNDS;
        match self.settings.policy {
            Policy::GiveUp if given_up => Verdict::GiveUp { expected },
            Policy::PostCopy if given_up => Verdict::PostCopy { expected },
            Policy::Throttle(throttling) => {
                if hopeless && self.pages_take_long(now) {
                    self.throttle(throttling.after(self.throttle_percent));
                }
                Verdict::Iterate { expected: Some(expected) }
            }
            _ => Verdict::Iterate { expected: Some(expected) },
        }
    }

    fn throttle(&mut self, percent: u8) {
        let before = f64::from(100 - self.throttle_percent.min(99));
        self.dirty.slow_down(f64::from(100 - percent.min(99)) / before);
        self.throttle_percent = percent;
        // What was seen of the faster guest says nothing about this one.
        (self.best, self.stale_rounds) = (NEVER, 0);
    }

    /// Whether a guest that writes nothing would do: else slowing it down is of no use.
    fn pages_take_long(&self, now: Duration) -> bool {
        let nothing = self.predict(now, 0).map(|prediction| prediction.total().expected);
        nothing.is_none_or(|least| least <= self.settings.downtime_limit)
    }

    fn note_progress(&mut self, expected: Duration) {
        if expected.as_secs_f64() <= self.best.as_secs_f64() * PROGRESS {
            (self.best, self.stale_rounds) = (expected, 0);
        } else {
            self.stale_rounds += 1;
        }
    }

    fn is_over(&self, now: Duration) -> bool {
        self.rounds >= self.settings.max_rounds
            || self.sent_once.is_some_and(|(at, took)| now >= self.settings.ends(at, took))
    }

    /// Follows rounds that get shorter to where they no longer do.
    fn forecast(&self, now: Duration, pages: u64) -> Option<Forecast> {
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
