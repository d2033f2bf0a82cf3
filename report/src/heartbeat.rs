//! What a guest's heartbeat tells over time, by the clock that all processes of a host share.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::document::{Gap, Migration};

/// How long after its end a migration is still looked at: the gap that it made ends there.
const LOOK_ON_MS: f64 = 100.0;

/// A silence between two beats: the longest that ended in a slice of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeartbeatGap {
    /// `CLOCK_REALTIME` of the beat that ended it.
    pub ended_realtime_ns: u64,
    /// How long it was.
    pub gap_ns: u64,
}

/// `CLOCK_REALTIME`, 0 before 1970.
pub fn realtime_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

impl Migration {
    /// Adds the gaps that both sides saw, as far as they are the migration's, which began then.
    pub fn add_heartbeat_gaps(
        &mut self,
        began_realtime_ns: u64,
        gaps: impl IntoIterator<Item = HeartbeatGap>,
    ) {
        let ms = |nanoseconds: u64| nanoseconds as f64 / 1e6;
        let last_ms = self.total_ms + LOOK_ON_MS;
        let gaps = gaps.into_iter().map(|gap| Gap {
            ms: ms(gap.ended_realtime_ns.saturating_sub(began_realtime_ns)),
            gap_ms: ms(gap.gap_ns),
        });
        self.heartbeat_gaps.extend(gaps.filter(|gap| gap.ms > 0.0 && gap.ms <= last_ms));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_has_the_gaps_from_its_beginning_to_a_little_after_its_end() {
        const MS: u64 = 1_000_000;
        let mut migration = Migration { total_ms: 50.0, ..Migration::default() };
        let gap = |at_ms: u64| HeartbeatGap { ended_realtime_ns: at_ms * MS, gap_ns: 3 * MS };
        migration.add_heartbeat_gaps(1000 * MS, [999, 1000, 1001, 1150, 1151].map(gap));
        let seen = migration.heartbeat_gaps.iter().map(|gap| (gap.ms, gap.gap_ms));
        assert_eq!(seen.collect::<Vec<_>>(), [(1.0, 3.0), (150.0, 3.0)]);
    }
}
