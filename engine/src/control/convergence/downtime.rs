//! What a switchover would take, and what must be left of the limit in one under way.

use std::time::Duration;

use super::Convergence;
use super::attempt::{Attempt, Bound};
use super::caution::{Caution, RESERVE};
use super::prediction::{Prediction, Term};

impl Convergence {
    /// The downtime to expect with so many pages to send; `None` before anything has landed.
    pub fn predict(&self, now: Duration, pages: u64) -> Option<Prediction> {
        match self.switchover_bandwidth(now) {
            Some((rate, deviation)) => Some(self.terms.predict(pages, rate, deviation)),
            // Memory was all zero, and nothing is to be sent.
            _ if pages == 0 => Some(self.terms.predict(0, f64::INFINITY, 0.0)),
            _ => None,
        }
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

    /// What must be left when the pages have landed, in a switchover under way.
    pub fn after_pages(&self) -> Duration {
        let state = self.prediction.map(|prediction| prediction.device_state).unwrap_or_default();
        state.expected.saturating_add(self.after_commit())
    }

    /// What must be left before the commit, in a switchover under way: nothing can be called off
    /// after it.
    pub fn after_commit(&self) -> Duration {
        let deviations = self.caution.as_ref().map_or(RESERVE, Caution::reserve);
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

    /// Page bytes a second while the guest stands still, and how far off that may be.
    pub(super) fn switchover_bandwidth(&self, now: Duration) -> Option<(f64, f64)> {
        self.link.of_switchover(now, self.settings.switchover_bandwidth, self.may_try())
    }

    /// Whether it does no harm to expect too much of the link: the host has not said how much, and what
    /// takes too long is called off.
    pub(super) fn may_try(&self) -> bool {
        self.settings.bound == Bound::Strict && self.settings.switchover_bandwidth.is_none()
    }

    /// Whether a guest that writes nothing would do: else slowing it down is of no use.
    pub(super) fn pages_take_long(&self, now: Duration) -> bool {
        let nothing = self.predict(now, 0).map(|prediction| prediction.total().expected);
        nothing.is_none_or(|least| least <= self.settings.downtime_limit)
    }
}
