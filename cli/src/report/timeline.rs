//! What each side saw over time.

use pageferry::Statistics;
use pageferry_report::document::{Migration, Setting};
use pageferry_report::heartbeat::HeartbeatGap;
use pageferry_report::recorder::Recorder;
use serde::{Deserialize, Serialize};

/// What a side saw.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Timeline {
    /// When it began, by `CLOCK_REALTIME`, and what it was; of a source.
    pub migration: Option<(u64, Box<Migration>)>,
    /// When its guest was not heard.
    pub gaps: Vec<HeartbeatGap>,
}

impl Timeline {
    /// What was recorded of a migration that was set up so.
    pub fn of_source(recorder: Recorder, setting: Setting, statistics: &Statistics) -> Self {
        let began = recorder.began_realtime_ns();
        let mut migration = Migration::of(setting, statistics);
        (migration.rounds, migration.samples) = recorder.finish();
        Self { migration: Some((began, Box::new(migration))), gaps: Vec::new() }
    }
}
