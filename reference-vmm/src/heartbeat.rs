//! The heartbeat: the guest beats after every chunk of work, and the device keeps the longest
//! silence. After a move that is the time the guest's user saw nothing happen.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry_device_state::{Component, DeviceState, HookError};
pub use pageferry_report::heartbeat::HeartbeatGap;
use pageferry_report::heartbeat::realtime_ns;

/// Slices of time of which the longest silence is kept, and how many of them.
const SLICE_NS: u64 = 10_000_000;
const MOST_SLICES: usize = 4096;

/// What the heartbeat saw so far. It moves with the device state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, DeviceState)]
#[device_state(name = "heartbeat")]
pub struct HeartbeatSnapshot {
    /// Beats since boot, of all virtual CPUs together.
    #[device_state(tag = 1)]
    pub beats: u64,
    /// Longest time between two beats since the last reset.
    #[device_state(tag = 2)]
    pub longest_gap_ns: u64,
    /// `CLOCK_REALTIME` of the last beat, the only clock two hosts share; 0 before the first.
    #[device_state(tag = 3)]
    pub last_beat_realtime_ns: u64,
}

/// The device.
#[derive(Debug, Default)]
pub(crate) struct Heartbeat {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    seen: HeartbeatSnapshot,
    /// The last beat, if this process saw it. The gap since a beat of another process can only be
    /// told by the realtime clock, which may be stepped, so it is used for nothing else.
    last_beat: Option<Instant>,
    /// The newest slices in which this process saw a beat.
    gaps: VecDeque<HeartbeatGap>,
}

impl Heartbeat {
    pub(crate) fn beat(&self) {
        let now = Instant::now();
        let realtime_ns = realtime_ns();
        let mut inner = self.lock();
        let gap_ns = match inner.last_beat {
            // Two virtual CPUs may take their time stamps in another order than the lock.
            Some(last) => nanoseconds(now.saturating_duration_since(last)),
            None if inner.seen.last_beat_realtime_ns == 0 => 0,
            None => realtime_ns.saturating_sub(inner.seen.last_beat_realtime_ns),
        };
        inner.seen.beats += 1;
        inner.seen.longest_gap_ns = inner.seen.longest_gap_ns.max(gap_ns);
        inner.seen.last_beat_realtime_ns = realtime_ns;
        inner.last_beat = Some(now);
        inner.note(HeartbeatGap { ended_realtime_ns: realtime_ns, gap_ns });
    }

    /// The longest silence of each of the newest slices of time, as far as this process saw them.
    pub(crate) fn gaps(&self) -> Vec<HeartbeatGap> {
        self.lock().gaps.iter().copied().collect()
    }

    pub(crate) fn snapshot(&self) -> HeartbeatSnapshot {
        self.lock().seen
    }

    pub(crate) fn reset_gap(&self) {
        self.lock().seen.longest_gap_ns = 0;
    }

    pub(crate) fn restore(&self, seen: HeartbeatSnapshot) {
        *self.lock() = Inner { seen, ..Inner::default() };
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Component for &Heartbeat {
    type State = HeartbeatSnapshot;

    fn save(&mut self) -> Result<HeartbeatSnapshot, HookError> {
        Ok(self.snapshot())
    }

    fn load(&mut self, seen: HeartbeatSnapshot) -> Result<(), HookError> {
        self.restore(seen);
        Ok(())
    }
}

impl Inner {
    fn note(&mut self, gap: HeartbeatGap) {
        let slice = |gap: &HeartbeatGap| gap.ended_realtime_ns / SLICE_NS;
        match self.gaps.back_mut() {
            Some(last) if slice(last) == slice(&gap) => {
                if gap.gap_ns > last.gap_ns {
                    *last = gap;
                }
            }
            _ => {
                if self.gaps.len() == MOST_SLICES {
                    self.gaps.pop_front();
                }
                self.gaps.push_back(gap);
            }
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_keeps_its_longest_gap_and_old_slices_go() {
        let gap = |ended_realtime_ns, gap_ns| HeartbeatGap { ended_realtime_ns, gap_ns };
        let mut inner = Inner::default();
        for (ended, gap_ns) in [(1, 5), (2, 9), (3, 7), (SLICE_NS, 1)] {
            inner.note(gap(ended, gap_ns));
        }
        assert_eq!(inner.gaps, [gap(2, 9), gap(SLICE_NS, 1)]);
        (2..=MOST_SLICES as u64).for_each(|slice| inner.note(gap(slice * SLICE_NS, 1)));
        assert_eq!((inner.gaps.len(), inner.gaps[0]), (MOST_SLICES, gap(SLICE_NS, 1)));
    }

    #[test]
    fn the_first_beat_has_no_gap() {
        let heartbeat = Heartbeat::default();
        heartbeat.beat();
        assert_eq!(heartbeat.snapshot().longest_gap_ns, 0);
        assert_eq!(heartbeat.snapshot().beats, 1);
    }

    #[test]
    fn the_gap_across_a_move_counts_from_the_other_hosts_last_beat() {
        let heartbeat = Heartbeat::default();
        let last_beat_realtime_ns = realtime_ns() - 5_000_000_000;
        heartbeat.restore(HeartbeatSnapshot { beats: 7, longest_gap_ns: 1, last_beat_realtime_ns });
        heartbeat.beat();
        let seen = heartbeat.snapshot();
        assert_eq!(seen.beats, 8);
        assert!(seen.longest_gap_ns >= 5_000_000_000, "{seen:?}");
        heartbeat.reset_gap();
        assert_eq!(heartbeat.snapshot().longest_gap_ns, 0);
        heartbeat.beat();
        assert!(heartbeat.snapshot().longest_gap_ns < 5_000_000_000);
    }

    #[test]
    fn a_clock_behind_the_other_hosts_gives_no_gap() {
        let heartbeat = Heartbeat::default();
        let ahead = HeartbeatSnapshot {
            beats: 1,
            longest_gap_ns: 0,
            last_beat_realtime_ns: realtime_ns() + 60_000_000_000,
        };
        heartbeat.restore(ahead);
        heartbeat.beat();
        assert_eq!(heartbeat.snapshot().longest_gap_ns, 0);
    }
}
