//! The downtime to expect, term by term, each learned from this migration.

use std::fmt;
use std::time::Duration;

use super::estimate::{Estimate, Learned, from_seconds};
use crate::machine::Rehearsal;
use crate::pages::memory::PAGE_BYTES;

/// What is assumed of a term that was not seen yet: of most machines it is less.
const ASSUMED: Duration = Duration::from_micros(500);

/// Device state that was not measured yet takes so long to save, and to load.
const ASSUMED_STATE: Duration = Duration::from_millis(1);

/// How much longer loading device state takes than saving it, until a destination has done it.
/// Between 0.7 (flat structures) and 3 times (KVM: registers are checked as they are set).
const LOAD_BY_SAVE: f64 = 1.5;

/// The downtime to expect.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Prediction {
    /// Stopping the guest.
    pub pause: Estimate,
    /// Asking the trackers what was written until then.
    pub final_harvest: Estimate,
    /// The remaining pages, until all have landed.
    pub final_pages: Estimate,
    /// Device state: what saving takes longer than the pages, its way, and loading it.
    pub device_state: Estimate,
    /// The commit and its answer.
    pub commit: Estimate,
    /// Letting the guest run at the destination.
    pub resume: Estimate,
}

impl Prediction {
    fn terms(&self) -> [Estimate; 6] {
        let Self { pause, final_harvest, final_pages, device_state, commit, resume } = *self;
        [pause, final_harvest, final_pages, device_state, commit, resume]
    }

    /// All of it. Terms go wrong independently of each other.
    pub fn total(&self) -> Estimate {
        sum(&self.terms())
    }

    /// What comes before the point of no return.
    pub fn before_commit(&self) -> Estimate {
        sum(&self.terms()[..4])
    }

    /// What follows once all pages have landed.
    pub fn after_pages(&self) -> Estimate {
        sum(&[self.device_state, self.commit, self.resume])
    }
}

fn sum(terms: &[Estimate]) -> Estimate {
    let squares: f64 = terms.iter().map(|term| term.uncertainty.as_secs_f64().powi(2)).sum();
    Estimate {
        expected: terms.iter().fold(Duration::ZERO, |all, term| all.saturating_add(term.expected)),
        uncertainty: from_seconds(squares.sqrt()),
    }
}

/// A part of the downtime, as what is at fault if it is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Term {
    /// Stopping the guest.
    Pause,
    /// Asking the trackers what was written, twice.
    FinalHarvest,
    /// The pages that the guest dirties.
    FinalPages,
    /// Saving device state, as far as it takes longer than the pages.
    Save,
    /// The way of the device state.
    StateTransfer,
    /// Loading device state at the destination.
    Load,
    /// Releasing what only one host may hold.
    Release,
    /// Messages and their answers.
    RoundTrips,
    /// Letting the guest run at the destination.
    Resume,
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pause => "stopping the guest",
            Self::FinalHarvest => "asking the dirty trackers",
            Self::FinalPages => "moving what the guest dirties",
            Self::Save => "saving device state",
            Self::StateTransfer => "sending device state",
            Self::Load => "loading device state at the destination",
            Self::Release => "releasing host resources",
            Self::RoundTrips => "waiting for the destination's answers",
            Self::Resume => "letting the guest run at the destination",
        })
    }
}

impl Term {
    /// What helps, beside a longer limit.
    pub(crate) fn advice(self) -> &'static str {
        match self {
            Self::FinalPages => "slow the guest down, or use a faster link",
            Self::StateTransfer => "use a faster link",
            Self::RoundTrips => "use a link with less delay",
            _ => "find out what holds it up",
        }
    }
}

/// What the terms were so far.
#[derive(Debug, Clone)]
pub(super) struct Terms {
    pub(super) pause: Learned,
    pub(super) harvest: Learned,
    pub(super) round_trip: Learned,
    pub(super) save: Learned,
    pub(super) load: Learned,
    pub(super) resume: Learned,
    /// Not predicted: known once it was done, and called off or not then.
    pub(super) release: Learned,
    pub(super) state_bytes: u64,
}

impl Default for Terms {
    fn default() -> Self {
        let assumed = || Learned::assumed(ASSUMED, ASSUMED);
        Self {
            pause: assumed(),
            harvest: assumed(),
            round_trip: assumed(),
            save: Learned::assumed(ASSUMED_STATE, ASSUMED_STATE),
            load: Learned::assumed(ASSUMED_STATE, ASSUMED_STATE),
            resume: assumed(),
            release: Learned::assumed(Duration::ZERO, Duration::ZERO),
            state_bytes: 0,
        }
    }
}

impl Terms {
    pub(super) fn learn(&mut self, rehearsal: &Rehearsal) {
        self.state_bytes = rehearsal.state_bytes;
        self.save.learn(rehearsal.save);
        if let Some(pause) = rehearsal.pause {
            self.pause.learn(pause);
        }
        if let Some(resume) = rehearsal.resume {
            self.resume.learn(resume);
        }
    }

    fn load(&self) -> Estimate {
        if self.load.is_known() || !self.save.is_known() {
            return self.load.estimate();
        }
        let save = self.save.estimate().expected.as_secs_f64();
        Estimate {
            expected: from_seconds(save * LOAD_BY_SAVE),
            uncertainty: from_seconds(save * LOAD_BY_SAVE / 4.0),
        }
    }

    /// With so many pages to send at that rate, which is off by that share of it.
    pub(super) fn predict(&self, pages: u64, bytes_per_second: f64, deviation: f64) -> Prediction {
        // Pings go out while pages do, and while the guest keeps CPUs busy. At the end both stand.
        let round_trip = self.round_trip.undisturbed();
        let seconds = (pages * PAGE_BYTES) as f64 / bytes_per_second;
        let sending = from_seconds(seconds);
        // The last page is there one way later, and its acknowledgement comes back.
        let final_pages = sum(&[
            Estimate { expected: sending, uncertainty: from_seconds(seconds * deviation) },
            round_trip,
        ]);
        let save = self.save.estimate();
        let overtime = Estimate {
            expected: save.expected.saturating_sub(final_pages.expected),
            uncertainty: if save.expected > final_pages.expected {
                save.uncertainty
            } else {
                Duration::ZERO
            },
        };
        let way = Estimate {
            expected: from_seconds(self.state_bytes as f64 / bytes_per_second),
            uncertainty: from_seconds(self.state_bytes as f64 / bytes_per_second * deviation),
        };
        Prediction {
            pause: self.pause.estimate(),
            // Before the pages, and once more after the state was saved.
            final_harvest: sum(&[self.harvest.estimate(), self.harvest.estimate()]),
            final_pages,
            device_state: sum(&[overtime, way, self.load(), round_trip]),
            commit: round_trip,
            resume: self.resume.estimate(),
        }
    }

    /// What each term took last, with so many pages to send at that rate. What is only hoped does not
    /// count.
    pub(super) fn seen(&self, pages: u64, bytes_per_second: f64) -> [(Term, Duration); 9] {
        let sending = |bytes: u64| from_seconds(bytes as f64 / bytes_per_second);
        let final_pages = sending(pages.saturating_mul(PAGE_BYTES));
        let load = self.load.seen().unwrap_or_else(|| self.load().expected);
        [
            (Term::Pause, self.pause.last()),
            (Term::FinalHarvest, self.harvest.last().saturating_mul(2)),
            (Term::FinalPages, final_pages),
            (Term::Save, self.save.last().saturating_sub(final_pages)),
            (Term::StateTransfer, sending(self.state_bytes)),
            (Term::Load, load),
            (Term::Release, self.release.last()),
            // The last page, the state and the commit are answered.
            (Term::RoundTrips, self.round_trip.undisturbed().expected.saturating_mul(3)),
            (Term::Resume, self.resume.last()),
        ]
    }

    /// Hopes that what only a switchover can show is better than it was in the last one.
    pub(super) fn hope(&mut self, share: f64) {
        for term in [&mut self.pause, &mut self.save, &mut self.load] {
            term.hope(share);
        }
    }

    /// What the commit, its answer and the resume will hardly exceed, with so many deviations.
    pub(super) fn after_commit(&self, deviations: f64) -> Duration {
        self.round_trip.guard(deviations).saturating_add(self.resume.guard(deviations))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn terms_add_up() {
        let mut terms = Terms::default();
        terms.learn(&Rehearsal {
            state_bytes: 1 << 20,
            save: 40 * MS,
            pause: Some(2 * MS),
            resume: Some(3 * MS),
        });
        terms.round_trip.learn(10 * MS);
        terms.harvest.learn(MS);
        // 100 MiB/s: 1 MiB takes 10 ms.
        let prediction = terms.predict(256, f64::from(100 << 20), 0.5);
        assert_eq!(prediction.pause.expected, 2 * MS);
        assert_eq!(prediction.final_harvest.expected, 2 * MS);
        assert_eq!(prediction.final_pages.expected, 20 * MS);
        // 20 ms of saving beyond the pages, 10 ms on the way, 60 ms of loading, 10 ms for the answer.
        assert_eq!(prediction.device_state.expected, 100 * MS);
        assert_eq!(prediction.commit.expected, 10 * MS);
        assert_eq!(prediction.resume.expected, 3 * MS);
        let total = prediction.total();
        assert_eq!(total.expected, 137 * MS);
        assert!(total.uncertainty > 20 * MS && total.uncertainty < 40 * MS, "{total:?}");
        assert_eq!(prediction.after_pages().expected, 113 * MS);
        assert!(terms.after_commit(0.0) >= 13 * MS);
    }

    #[test]
    fn what_is_hoped_is_not_what_was_seen() {
        let mut terms = Terms::default();
        terms.load.learn(5000 * MS);
        (0..20).for_each(|_| terms.hope(0.7));
        assert!(terms.predict(0, 1e9, 0.0).total().expected < 300 * MS);
        let seen = terms.seen(0, 1e9);
        let worst = seen.iter().max_by_key(|(_, took)| *took).unwrap();
        assert_eq!(*worst, (Term::Load, 5000 * MS));
    }

    #[test]
    fn a_load_that_goes_on_was_seen_and_is_not_expected() {
        let mut terms = Terms::default();
        let expected = terms.load();
        terms.load.goes_on(250 * MS);
        assert_eq!(terms.load(), expected);
        let load = |terms: &Terms| terms.seen(0, 1e9)[5];
        assert_eq!(load(&terms), (Term::Load, 250 * MS));
        // Once it is over, what goes on next takes no less.
        terms.load.learn(5000 * MS);
        terms.load.goes_on(250 * MS);
        assert_eq!(load(&terms), (Term::Load, 5000 * MS));
    }

    #[test]
    fn a_load_that_was_seen_counts_instead_of_the_save() {
        let mut terms = Terms::default();
        terms.learn(&Rehearsal { save: 40 * MS, ..Rehearsal::default() });
        terms.load.learn(5 * MS);
        let prediction = terms.predict(0, 1e9, 0.0);
        assert!(prediction.device_state.expected < 48 * MS, "{prediction:?}");
    }

    #[test]
    fn a_link_that_stands_still_takes_for_ever_and_does_not_overflow() {
        let prediction = Terms::default().predict(u64::MAX / PAGE_BYTES, 1e-9, 1.0);
        assert!(prediction.total().expected >= Duration::from_secs(86_400));
        assert!(prediction.total().upper(4.0) > Duration::ZERO);
    }
}
