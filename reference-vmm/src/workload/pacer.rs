//! How many steps a virtual CPU may take before its next beat.
//!
//! A virtual CPU that is throttled is held outside the guest after its steps, for as long as makes
//! up its share; and it gets fewer steps at a time, so that it goes on beating.

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

/// Waits shorter than this are put off until they add up: the kernel has no shorter ones.
const SHORTEST_HOLD: Duration = Duration::from_micros(500);
/// What steps may seem to take: a guest that was paused meanwhile was not busy.
const LONGEST_STEPS: Duration = Duration::from_millis(5);
/// Most that a virtual CPU is held for at a time.
const LONGEST_HOLD: Duration = Duration::from_millis(20);

/// Paces one virtual CPU. It is asked at every beat and waits there.
#[derive(Debug)]
pub(crate) struct Pacer {
    vcpu: usize,
    rate: Rate,
    last: Option<Instant>,
    /// Steps due, in billionths.
    due: u64,
    /// When steps were granted last.
    granted: Option<Instant>,
    /// How long it is to be held for the steps it has taken.
    owed: Duration,
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
        Self { vcpu: vcpu.into(), rate, last: None, due: 0, granted: None, owed: Duration::ZERO }
    }

    /// Waits as the rate and the throttle demand, not beyond a pause, and says how many steps may
    /// follow.
    pub(crate) fn grant(&mut self, control: &RunControl) -> u32 {
        let percent = control.throttle(self.vcpu);
        let steps = match self.rate {
            Rate::FullSpeed => {
                self.hold(control, percent);
                throttled(FULL_SPEED_STEPS.into(), percent)
            }
            Rate::Idle => {
                control.wait_while_running(Instant::now() + IDLE_BEAT);
                0
            }
            // It has time to make up for being held, so the rate itself is cut.
            Rate::StepsPerSecond(rate) => self.paced(control, throttled(rate, percent)),
        };
        self.granted = (percent > 0).then(Instant::now);
        u32::try_from(steps).unwrap_or(FULL_SPEED_STEPS)
    }

    fn paced(&mut self, control: &RunControl, rate: u64) -> u64 {
        self.earn(rate, Instant::now());
        let wait = Duration::from_nanos(self.until_worth_a_grant_ns(rate)).min(PACED_BEAT);
        if !wait.is_zero() {
            control.wait_while_running(Instant::now() + wait);
            self.earn(rate, Instant::now());
        }
        self.spend().into()
    }

    /// Holds the virtual CPU for what it took for its last steps.
    fn hold(&mut self, control: &RunControl, percent: u8) {
        let now = Instant::now();
        self.owe(self.granted.map_or(Duration::ZERO, |at| now.duration_since(at)), percent);
        if self.owed >= SHORTEST_HOLD {
            control.wait_while_running(now + self.owed);
            // Waits are longer than asked for.
            self.owed = self.owed.saturating_sub(now.elapsed());
        }
    }

    fn owe(&mut self, busy: Duration, percent: u8) {
        if percent == 0 {
            self.owed = Duration::ZERO;
            return;
        }
        let percent = u32::from(percent.min(99));
        let owed = busy.min(LONGEST_STEPS) * percent / (100 - percent);
        self.owed = (self.owed + owed).min(LONGEST_HOLD);
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

/// What is left of a number; never nothing of something.
fn throttled(number: u64, percent: u8) -> u64 {
    let left = u128::from(number) * u128::from(100 - percent.min(99)) / 100;
    u64::try_from(left).unwrap_or(u64::MAX).max(number.min(1))
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
    fn a_throttled_virtual_cpu_is_held_for_its_share() {
        let mut pacer = paced(1, 0, 1);
        pacer.rate = Rate::FullSpeed;
        let ms = Duration::from_millis(1);
        for (percent, owed_ms) in [(50, 1), (75, 3), (90, 9), (99, 20), (100, 20)] {
            pacer.owed = Duration::ZERO;
            pacer.owe(ms, percent);
            assert_eq!(pacer.owed, ms * owed_ms, "{percent} %");
        }
        // A pause of the guest is no work of its.
        pacer.owed = Duration::ZERO;
        pacer.owe(Duration::from_secs(100), 50);
        assert_eq!(pacer.owed, LONGEST_STEPS);
        pacer.owe(ms, 0);
        assert_eq!(pacer.owed, Duration::ZERO);
    }

    #[test]
    fn a_throttled_virtual_cpu_beats_as_often() {
        assert_eq!(
            [0, 50, 90, 99, 255].map(|percent| throttled(256, percent)),
            [256, 128, 25, 2, 2]
        );
        assert_eq!(throttled(1, 99), 1);
        assert_eq!(throttled(0, 50), 0);
        assert_eq!(throttled(u64::MAX, 0), u64::MAX);
    }

    #[test]
    fn no_rate_no_step_and_no_overflow() {
        let mut pacer = paced(0, 0, 1);
        assert_eq!(steps(&mut pacer, 0, 100, Duration::from_secs(1)), 0);
        let mut pacer = paced(u64::MAX, 0, 1);
        assert_eq!(steps(&mut pacer, u64::MAX, 3, Duration::from_secs(1)), 3 * 256);
    }
}
