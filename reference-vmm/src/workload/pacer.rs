//! How many steps a virtual CPU may take before its next beat.

use std::time::{Duration, Instant};

use super::{WorkloadConfig, WorkloadKind};
use crate::run_control::RunControl;

/// Steps between two beats at full speed, and never more than that.
pub(crate) const FULL_SPEED_STEPS: u32 = 256;
/// An idle guest beats this often.
const IDLE_BEAT: Duration = Duration::from_millis(1);
/// A paced guest beats at least this often, whether a step is due or not.
const PACED_BEAT: Duration = Duration::from_millis(5);
/// What a guest that fell behind may catch up, so that a pause is not followed by a burst.
const CATCH_UP: Duration = Duration::from_millis(20);

/// Paces one virtual CPU. It is asked at every beat and waits there.
#[derive(Debug)]
pub(crate) struct Pacer {
    rate: Rate,
    last: Option<Instant>,
    /// Steps due, in billionths.
    due: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rate {
    FullSpeed,
    StepsPerSecond(u64),
    Idle,
}

const BILLION: u64 = 1_000_000_000;

impl Pacer {
    pub(crate) fn new(workload: &WorkloadConfig, vcpu: u8, vcpus: u8) -> Self {
        let rate = match (workload.kind, workload.dirty_rate_pages_per_second) {
            (WorkloadKind::Idle, _) => Rate::Idle,
            (_, None) => Rate::FullSpeed,
            (_, Some(total)) => {
                let vcpus = u64::from(vcpus);
                Rate::StepsPerSecond(total / vcpus + u64::from(u64::from(vcpu) < total % vcpus))
            }
        };
        Self { rate, last: None, due: 0 }
    }

    /// Waits as the rate demands, not beyond a pause, and says how many steps may follow.
    pub(crate) fn grant(&mut self, control: &RunControl) -> u32 {
        match self.rate {
            Rate::FullSpeed => FULL_SPEED_STEPS,
            Rate::Idle => {
                control.wait_while_running(Instant::now() + IDLE_BEAT);
                0
            }
            Rate::StepsPerSecond(rate) => {
                self.earn(rate, Instant::now());
                let wait = Duration::from_nanos(self.until_worth_a_grant_ns(rate)).min(PACED_BEAT);
                if !wait.is_zero() {
                    control.wait_while_running(Instant::now() + wait);
                    self.earn(rate, Instant::now());
                }
                self.spend()
            }
        }
    }

    fn earn(&mut self, rate: u64, now: Instant) {
        let elapsed = self.last.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.last = Some(now);
        let elapsed_ns = u64::try_from(elapsed.min(CATCH_UP).as_nanos()).unwrap_or(u64::MAX);
        let cap_ns = u64::try_from(CATCH_UP.as_nanos()).unwrap_or(u64::MAX);
        // A slow guest must still be able to save up for a whole step.
        let cap = rate.saturating_mul(cap_ns).max(BILLION);
        self.due = self.due.saturating_add(rate.saturating_mul(elapsed_ns)).min(cap);
    }

    /// Time until a full chunk is due; steps of less than that go by beats.
    fn until_worth_a_grant_ns(&self, rate: u64) -> u64 {
        let missing = (u64::from(FULL_SPEED_STEPS) * BILLION).saturating_sub(self.due);
        missing.checked_div(rate).unwrap_or(u64::MAX)
    }

    fn spend(&mut self) -> u32 {
        let steps = u32::try_from(self.due / BILLION).unwrap_or(u32::MAX).min(FULL_SPEED_STEPS);
        self.due -= u64::from(steps) * BILLION;
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paced(total: u64, vcpu: u8, vcpus: u8) -> Pacer {
        let workload = WorkloadConfig {
            kind: WorkloadKind::Random,
            working_set_bytes: 0,
            dirty_rate_pages_per_second: Some(total),
            seed: 0,
        };
        Pacer::new(&workload, vcpu, vcpus)
    }

    fn steps(pacer: &mut Pacer, rate: u64, beats: u32, beat: Duration) -> u64 {
        let start = Instant::now();
        pacer.earn(rate, start);
        (1..=beats)
            .map(|n| {
                pacer.earn(rate, start + beat * n);
                u64::from(pacer.spend())
            })
            .sum()
    }

    #[test]
    fn rates_add_up_over_time() {
        for rate in [1, 7, 100, 12_345, 50_000] {
            let mut pacer = paced(rate, 0, 1);
            let taken = steps(&mut pacer, rate, 10_000, Duration::from_millis(1));
            assert!(taken.abs_diff(rate * 10) <= 1, "{rate}: {taken}");
        }
    }

    #[test]
    fn the_rate_is_shared_among_virtual_cpus() {
        let rates: Vec<_> = (0..3).map(|vcpu| paced(11, vcpu, 3).rate).collect();
        let expected = [4, 4, 3].map(Rate::StepsPerSecond);
        assert_eq!(rates, expected);
    }

    #[test]
    fn a_long_pause_is_not_caught_up() {
        let mut pacer = paced(1000, 0, 1);
        let start = Instant::now();
        pacer.earn(1000, start);
        pacer.earn(1000, start + Duration::from_secs(100));
        assert_eq!(pacer.spend(), 20);
    }

    #[test]
    fn no_rate_no_step_and_no_overflow() {
        let mut pacer = paced(0, 0, 1);
        assert_eq!(steps(&mut pacer, 0, 100, Duration::from_secs(1)), 0);
        let mut pacer = paced(u64::MAX, 0, 1);
        assert_eq!(steps(&mut pacer, u64::MAX, 3, Duration::from_secs(1)), 3 * 256);
    }
}
