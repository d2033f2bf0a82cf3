//! Switchovers that were called off, and what the next one waits for.

use std::time::Duration;

/// What a switchover that was called off is worth waiting for: so many limits, twice as many after
/// each, and no longer than the most. So the guest stands still for a small share of the time.
const BACK_OFF_LIMITS: u32 = 4;
const MOST_BACK_OFF: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Default)]
pub(super) struct Tries {
    called_off: u32,
    /// When another switchover may be tried.
    not_before: Duration,
}

impl Tries {
    /// One was called off that was to keep this limit.
    pub(super) fn call_off(&mut self, now: Duration, limit: Duration) {
        let limits = BACK_OFF_LIMITS.saturating_mul(1 << self.called_off.min(20));
        let back_off = limit.saturating_mul(limits).min(MOST_BACK_OFF);
        self.not_before = now.saturating_add(back_off);
        self.called_off += 1;
    }

    /// How many were called off.
    pub(super) fn called_off(&self) -> u32 {
        self.called_off
    }

    /// Whether the next one must wait.
    pub(super) fn backs_off(&self, now: Duration) -> bool {
        now < self.not_before
    }
}
