//! How it is decided: what is seen, where that stands in the [table], and what it changes.

use std::time::Duration;

use super::attempt::Bound;
use super::estimate::NEVER;
use super::policy::Policy;
use super::prediction::Prediction;
use super::progress::Progress;
use super::table::{self, Asked, Consequence, Sight, Stage, Step};
use super::{Convergence, Round, Verdict};

/// What is left, round by round, of what the last switchover took too long for, once that time is
/// over: it may have been bad luck, and only another one can tell.
const HOPE: f64 = 0.7;
/// Switchovers that must have been called off before it is believed what they alone have shown.
const TELLING_SWITCHOVERS: u32 = 3;

/// Rounds shorter than this are followed by a rest: they wait for something else than pages.
const SHORTEST_ROUND: Duration = Duration::from_millis(5);

impl Convergence {
    /// A switchover was called off.
    pub fn called_off(&mut self, now: Duration) {
        self.tries.call_off(now, self.settings.downtime_limit);
        if let Some(caution) = &mut self.caution {
            caution.called_off();
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
        let prediction = self.predict(now, pages);
        if let Some(prediction) = &prediction {
            self.progress.note(prediction.total().expected);
            self.forecast = self.forecast(now, pages);
        }
        self.answer(now, Asked::AfterRound, prediction, pages)
    }

    /// Decides on an exact count: everything sent has landed, and was harvested just now.
    pub fn decide(&mut self, now: Duration, pages: u64) -> Verdict {
        let prediction = self.predict(now, pages);
        self.answer(now, Asked::OnCount, prediction, pages)
    }

    /// How long to wait before the next round after one that took so long.
    pub fn rest(&self, took: Duration) -> Duration {
        SHORTEST_ROUND.saturating_sub(took)
    }

    fn answer(
        &mut self,
        now: Duration,
        asked: Asked,
        prediction: Option<Prediction>,
        pages: u64,
    ) -> Verdict {
        let stage = self.stage(now);
        let Some(prediction) = prediction else {
            return match table::step(Sight::Unknown, asked, stage) {
                Step::GiveUp => Verdict::GiveUp { expected: NEVER },
                _ => Verdict::Iterate { expected: None },
            };
        };
        let expected = prediction.total().expected;
        let seen = self.look(asked, stage, &prediction, pages);
        match table::step(seen, asked, stage) {
            Step::Approach => return Verdict::Approach { expected },
            Step::SwitchOver => {
                self.prediction = Some(prediction);
                return Verdict::SwitchOver { expected };
            }
            Step::GiveUp => return Verdict::GiveUp { expected },
            Step::Embolden => self.embolden(now),
            Step::Hope => self.hope(now),
            Step::Iterate => {}
        }
        if seen == Sight::Unseen {
            self.link.assume_more();
        }
        self.prospect = self.prospect.after(seen);
        match table::consequence(self.prospect, self.settings.policy) {
            Consequence::Iterate => {}
            Consequence::SlowDown => self.slow_down(now),
            Consequence::PostCopy => return Verdict::PostCopy { expected },
            Consequence::GiveUp => return Verdict::GiveUp { expected },
        }
        Verdict::Iterate { expected: Some(expected) }
    }

    /// Where it stands.
    pub(super) fn stage(&self, now: Duration) -> Stage {
        let called_off = self.tries.called_off() > 0;
        Stage::of(called_off, self.tries.backs_off(now), self.time_is_over(now))
    }

    /// What is seen of so many pages. Whether they fit is asked only where it matters.
    pub(super) fn look(
        &self,
        asked: Asked,
        stage: Stage,
        prediction: &Prediction,
        pages: u64,
    ) -> Sight {
        let matters =
            matches!(table::step(Sight::Fits, asked, stage), Step::Approach | Step::SwitchOver);
        if matters && self.fits(prediction, pages) {
            return Sight::Fits;
        }
        // What is expected to fit waits for something else than a slower guest.
        if prediction.total().expected <= self.settings.downtime_limit {
            return Sight::Close;
        }
        let misses = self.forecast.is_some_and(|forecast| !forecast.meets_limit);
        if !(misses || self.progress.is_stale()) {
            return Sight::Far;
        }
        let tries = self.tries.called_off();
        if self.may_try() && tries < TELLING_SWITCHOVERS && self.link.is_barely_known(tries) {
            return Sight::Glimpsed;
        }
        if self.may_try() && self.link.may_assume_more() { Sight::Unseen } else { Sight::Stuck }
    }

    fn fits(&self, prediction: &Prediction, pages: u64) -> bool {
        let limit = self.settings.downtime_limit;
        let total = if self.method.all_terms { prediction.total() } else { prediction.final_pages };
        match self.settings.bound {
            Bound::Strict => {
                let Some(caution) = &self.caution else { return total.expected <= limit };
                let before_commit = prediction.before_commit().expected;
                total.upper(caution.uncertainties()) <= limit
                    && before_commit.saturating_add(self.after_commit()) <= limit
            }
            // Without pages another round could not make it shorter.
            Bound::BestEffort => pages == 0 || total.expected <= limit,
        }
    }

    fn embolden(&mut self, now: Duration) {
        if let Some(caution) = &mut self.caution {
            caution.embolden(now);
        }
    }

    /// Hopes that what a switchover took too long for was bad luck.
    fn hope(&mut self, now: Duration) {
        if self.pages_take_long(now) {
            self.link.hope(HOPE);
        } else {
            self.terms.hope(HOPE);
        }
    }

    fn slow_down(&mut self, now: Duration) {
        if let Policy::Throttle(throttling) = self.settings.policy
            && self.can_throttle
            && self.pages_take_long(now)
        {
            self.throttle(throttling.after(self.throttle_percent));
        }
    }

    pub(super) fn throttle(&mut self, percent: u8) {
        let before = f64::from(100 - self.throttle_percent.min(99));
        self.dirty.slow_down(f64::from(100 - percent.min(99)) / before);
        self.throttle_percent = percent;
        // What was seen of the faster guest says nothing about this one.
        self.progress = Progress::default();
    }

    fn time_is_over(&self, now: Duration) -> bool {
        self.rounds >= self.settings.max_rounds
            || self.sent_once.is_some_and(|(at, took)| now >= self.settings.ends(at, took))
    }
}
