//! One switchover against the clock: whether what is left can still be done in time.

use std::time::Duration;

/// What a downtime limit means once the guest is paused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Bound {
    /// A switchover that would overrun it is called off: the guest goes on at the source, and so
    /// does the migration.
    #[default]
    Strict,
    /// A switchover that has begun is finished, however long it takes; unless a channel is lost and the
    /// destination does not say at once that it is closed, since then it may be the link.
    BestEffort,
}

/// The clock of one switchover. Times are of the clock that `now` is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    began: Duration,
    limit: Duration,
    bound: Bound,
    /// Comparing memory, which does not count.
    excluded: Duration,
}

impl Attempt {
    /// The guest is about to be paused.
    pub fn begin(now: Duration, limit: Duration, bound: Bound) -> Self {
        Self { began: now, limit, bound, excluded: Duration::ZERO }
    }

    /// Something took time that does not count.
    pub fn exclude(&mut self, took: Duration) {
        self.excluded = self.excluded.saturating_add(took);
    }

    /// How long the guest has stood still, as far as that counts.
    pub fn stood(&self, now: Duration) -> Duration {
        now.saturating_sub(self.began).saturating_sub(self.excluded)
    }

    /// Until when what is under way may take, if `after` must follow. `None` for as long as it
    /// takes.
    pub fn due(&self, after: Duration) -> Option<Duration> {
        match self.bound {
            Bound::Strict => {
                let left = self.limit.saturating_sub(after);
                Some(self.began.saturating_add(self.excluded).saturating_add(left))
            }
            Bound::BestEffort => None,
        }
    }

    /// Whether `after`, begun now, would end beyond the limit.
    pub fn overruns(&self, now: Duration, after: Duration) -> bool {
        self.bound == Bound::Strict && self.stood(now).saturating_add(after) > self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn what_would_end_too_late_is_due_before() {
        let attempt = Attempt::begin(1000 * MS, 20 * MS, Bound::Strict);
        assert_eq!(attempt.due(5 * MS), Some(1015 * MS));
        assert!(!attempt.overruns(1015 * MS, 5 * MS));
        assert!(attempt.overruns(1016 * MS, 5 * MS));
        // What can never be kept is due at once.
        assert_eq!(attempt.due(60 * MS), Some(1000 * MS));
    }

    #[test]
    fn comparing_memory_does_not_count() {
        let mut attempt = Attempt::begin(1000 * MS, 20 * MS, Bound::Strict);
        attempt.exclude(500 * MS);
        assert_eq!(attempt.stood(1510 * MS), 10 * MS);
        assert!(!attempt.overruns(1510 * MS, 10 * MS));
        assert_eq!(attempt.due(5 * MS), Some(1515 * MS));
    }

    #[test]
    fn best_effort_is_never_called_off() {
        let attempt = Attempt::begin(Duration::ZERO, MS, Bound::BestEffort);
        assert_eq!(attempt.due(9 * MS), None);
        assert!(!attempt.overruns(1000 * MS, 9 * MS));
    }
}
