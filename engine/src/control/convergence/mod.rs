//! When to stop copying and switch over, and what to do if that moment does not come.
//!
//! Pure state machines: what is observed comes in with the time `now`, a duration since the
//! migration began by whatever clock the caller has; decisions go out. The engine's driver and the
//! simulator of `pageferry-bench` drive the same ones.
//!
//! - [`Bandwidth`] and [`DirtyRate`] learn from rounds, and [`Prediction`] is what comes of them:
//!   the downtime to expect, term by term, each with its uncertainty.
//! - [`Convergence`] decides after each round, and once more right before the guest is paused, on
//!   an exact count. What it decides when is a table, in `table.rs`.
//! - [`Attempt`] is the clock of one switchover, and says when it must be called off.

mod attempt;
mod bandwidth;
mod caution;
mod decision;
mod dirty_rate;
mod downtime;
mod estimate;
mod forecast;
mod learning;
mod link;
mod policy;
mod prediction;
mod progress;
mod table;
#[cfg(test)]
mod tests;
mod tries;

use std::time::Duration;

pub use attempt::{Attempt, Bound};
pub use bandwidth::{Averaging, Bandwidth};
pub use dirty_rate::DirtyRate;
pub(crate) use estimate::NEVER;
pub use estimate::{Estimate, Learned};
pub use forecast::Forecast;
pub use policy::{Policy, Settings, Throttling};
pub use prediction::{Prediction, Term};

use caution::Caution;
use link::Link;
use prediction::Terms;
use progress::Progress;
use table::Prospect;
use tries::Tries;

/// Parts of guest memory whose dirty pages are counted apart.
pub const HEAT_PARTS: usize = 64;

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

impl Verdict {
    /// Downtime to expect, or that would be; `None` before anything was measured.
    pub fn expected(self) -> Option<Duration> {
        match self {
            Self::Iterate { expected } => expected,
            Self::Approach { expected }
            | Self::SwitchOver { expected }
            | Self::PostCopy { expected }
            | Self::GiveUp { expected } => Some(expected),
        }
    }
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
    link: Link,
    dirty: DirtyRate,
    terms: Terms,
    rounds: u32,
    /// When all memory was sent once, and how long that took.
    sent_once: Option<(Duration, Duration)>,
    forecast: Option<Forecast>,
    progress: Progress,
    prospect: Prospect,
    tries: Tries,
    /// `None` for a [method](Method) without.
    caution: Option<Caution>,
    throttle_percent: u8,
    can_throttle: bool,
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
            link: Link::new(method.averaging),
            dirty: DirtyRate::default(),
            terms: Terms::default(),
            rounds: 0,
            sent_once: None,
            forecast: None,
            progress: Progress::default(),
            prospect: Prospect::Open,
            tries: Tries::default(),
            caution: method.cautious.then(Caution::default),
            throttle_percent: 0,
            can_throttle: true,
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
            (self.progress, self.prospect) = (Progress::default(), Prospect::Open);
        }
    }

    /// What the host wants.
    pub fn settings(&self) -> &Settings {
        &self.settings
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

    /// The guest cannot be slowed down, and was not: from now on it is not to be.
    pub fn forbid_throttling(&mut self) {
        self.can_throttle = false;
        self.throttle(0);
    }

    /// Whether it will converge, once two rounds have told.
    pub fn outlook(&self) -> Option<&Forecast> {
        self.forecast.as_ref()
    }

    /// What was predicted when the last switchover was decided on.
    pub fn prediction(&self) -> Option<&Prediction> {
        self.prediction.as_ref()
    }
}
