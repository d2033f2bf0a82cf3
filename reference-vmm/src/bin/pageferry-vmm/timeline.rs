//! What each side saw over time.

use std::time::{SystemTime, UNIX_EPOCH};

use pageferry::Statistics;
use pageferry_report::document::{Migration, Setting};
use pageferry_report::recorder::Recorder;
use pageferry_vmm::guest::GuestConfig;
use pageferry_vmm::heartbeat::HeartbeatGap;
use pageferry_vmm::tracking::DirtyTracking;
use serde::{Deserialize, Serialize};

/// What a side saw.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Timeline {
    /// When it began, by `CLOCK_REALTIME`, and what it was; of a source.
    pub(crate) migration: Option<(u64, Box<Migration>)>,
    pub(crate) gaps: Vec<HeartbeatGap>,
}

impl Timeline {
    pub(crate) fn of_source(
        recorder: Recorder,
        transport: &str,
        channels: u16,
        config: &GuestConfig,
        tracking: DirtyTracking,
        statistics: &Statistics,
    ) -> Self {
        let since = u64::try_from(recorder.began().elapsed().as_nanos()).unwrap_or(0);
        let began = realtime_ns().saturating_sub(since);
        let setting = Setting {
            transport: transport.to_owned(),
            channels,
            backing: config.backing.to_string(),
            guest: config.kind.to_string(),
            dirty_source: tracking.to_string(),
            workload: config.workload.kind.to_string(),
            vcpus: config.vcpus,
            memory_bytes: config.regions.iter().map(|(_, len_bytes)| len_bytes).sum(),
            working_set_bytes: config.workload.working_set_bytes,
            dirty_rate: config.workload.dirty_rate_pages_per_second,
            guest_load: 0,
            host_load: 0,
        };
        let mut migration = Migration::of(setting, statistics);
        (migration.rounds, migration.samples) = recorder.finish();
        Self { migration: Some((began, Box::new(migration))), gaps: Vec::new() }
    }

    pub(crate) fn add_gaps(&mut self, gaps: Vec<HeartbeatGap>) {
        self.gaps.extend(gaps);
    }
}

fn realtime_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}
