//! What the host wants: how long the guest may stand still, and what to do if that is not met.

use std::num::NonZeroU64;
use std::time::Duration;

use super::attempt::Bound;

/// What to do with a guest that dirties memory faster than the downtime limit allows to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Policy {
    /// Go on with rounds, until [the deadline](Settings::deadline): the guest may become quieter,
    /// or someone may raise the limit.
    KeepTrying,
    /// Slow the guest down step by step ([`crate::Machine::throttle`]), and go on until the
    /// deadline.
    Throttle(Throttling),
    /// Let the guest run at the destination before all of its memory is there. The engine does not
    /// do that yet, and refuses.
    PostCopy,
    /// Give up as soon as two rounds in a row say that it will not converge.
    GiveUp,
}

/// How a guest is slowed down: by percent of its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Throttling {
    /// The first step.
    pub first_percent: u8,
    /// Each further one.
    pub step_percent: u8,
    /// The last one, at most 99.
    pub max_percent: u8,
}

impl Default for Throttling {
    fn default() -> Self {
        Self { first_percent: 20, step_percent: 10, max_percent: 99 }
    }
}

impl Throttling {
    /// The step after `percent`.
    pub(super) fn after(self, percent: u8) -> u8 {
        let next = if percent == 0 {
            self.first_percent
        } else {
            percent.saturating_add(self.step_percent)
        };
        next.min(self.max_percent).min(MAX_PERCENT).max(percent)
    }
}

/// A guest is never stopped by throttling.
const MAX_PERCENT: u8 = 99;

/// How long a guest that does not converge is tried at least, unless the host says how long.
const PATIENCE: Duration = Duration::from_secs(300);

/// All that a host may choose, before a migration and during it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// How long the guest may stand still.
    pub downtime_limit: Duration,
    /// Whether the limit is kept once the guest is paused.
    pub bound: Bound,
    /// What to do if it does not converge.
    pub policy: Policy,
    /// How long to go on once all memory was sent once. `None`: as long again as that took, and
    /// five minutes at least.
    pub deadline: Option<Duration>,
    /// Rounds to try, whatever the policy.
    pub max_rounds: u32,
    /// Page bytes a second to expect while the guest stands still, when no bandwidth limit holds.
    /// `None`: what was seen without a limit. If there always was one a strict switchover expects
    /// 10 Gb/s, and one by best effort no more than the limit.
    pub switchover_bandwidth: Option<NonZeroU64>,
}

impl Default for Settings {
    /// A strict limit of 300 ms, and a guest that is slowed down if need be.
    fn default() -> Self {
        Self {
            downtime_limit: Duration::from_millis(300),
            bound: Bound::Strict,
            policy: Policy::Throttle(Throttling::default()),
            deadline: None,
            max_rounds: u32::MAX,
            switchover_bandwidth: None,
        }
    }
}

impl Settings {
    /// What makes no sense about them.
    pub fn complaint(&self) -> Option<String> {
        if self.max_rounds == 0 {
            return Some("at least one round is needed".to_owned());
        }
        match self.policy {
            Policy::Throttle(Throttling { max_percent, .. }) if max_percent > MAX_PERCENT => {
                Some(format!("throttling by {max_percent} %, at most {MAX_PERCENT} % are possible"))
            }
            Policy::Throttle(
                Throttling { first_percent: 0, .. } | Throttling { step_percent: 0, .. },
            ) => Some("throttling in steps of 0 %".to_owned()),
            _ => None,
        }
    }

    /// When trying ends, if all memory was sent once at `since`, which took `took`.
    pub(super) fn ends(&self, since: Duration, took: Duration) -> Duration {
        since.saturating_add(self.deadline.unwrap_or_else(|| took.max(PATIENCE)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_end_at_the_most() {
        let throttling = Throttling::default();
        let mut percent = 0;
        let steps: Vec<_> = std::iter::repeat_with(|| {
            percent = throttling.after(percent);
            percent
        })
        .take(11)
        .collect();
        assert_eq!(steps, [20, 30, 40, 50, 60, 70, 80, 90, 99, 99, 99]);
        let most = Throttling { max_percent: 25, ..throttling };
        assert_eq!((most.after(0), most.after(20), most.after(25)), (20, 25, 25));
        // A lower limit does not let go of what is set already.
        assert_eq!(most.after(60), 60);
        assert_eq!(Throttling { max_percent: u8::MAX, ..throttling }.after(250), 250);
    }

    #[test]
    fn nonsense_is_complained_about() {
        assert_eq!(Settings::default().complaint(), None);
        let no_rounds = Settings { max_rounds: 0, ..Settings::default() };
        assert!(no_rounds.complaint().is_some());
        for throttling in [
            Throttling { max_percent: 100, ..Throttling::default() },
            Throttling { first_percent: 0, ..Throttling::default() },
            Throttling { step_percent: 0, ..Throttling::default() },
        ] {
            let settings = Settings { policy: Policy::Throttle(throttling), ..Settings::default() };
            assert!(settings.complaint().is_some(), "{throttling:?}");
        }
    }

    #[test]
    fn patience_grows_with_the_guest() {
        let second = Duration::from_secs(1);
        let settings = Settings::default();
        assert_eq!(settings.ends(10 * second, 10 * second), 310 * second);
        assert_eq!(settings.ends(4000 * second, 4000 * second), 8000 * second);
        let hurried = Settings { deadline: Some(second), ..settings };
        assert_eq!(hurried.ends(4000 * second, 4000 * second), 4001 * second);
    }
}
