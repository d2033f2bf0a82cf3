//! The heartbeat: the guest beats after every chunk of work, and the device keeps the longest
//! silence. After a move that is the time the guest's user saw nothing happen.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pageferry_device_state::{Component, DeviceState, HookError};

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
    }

    pub(crate) fn snapshot(&self) -> HeartbeatSnapshot {
        self.lock().seen
    }

    pub(crate) fn reset_gap(&self) {
        self.lock().seen.longest_gap_ns = 0;
    }

    pub(crate) fn restore(&self, seen: HeartbeatSnapshot) {
        *self.lock() = Inner { seen, last_beat: None };
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

fn realtime_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, nanoseconds)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

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
