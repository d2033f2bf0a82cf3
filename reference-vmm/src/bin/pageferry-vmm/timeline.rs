//! What each side saw over time, and the page that a demo makes of it.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use pageferry::Statistics;
use pageferry_report::document::{Document, Gap, Kind, Migration, Setting};
use pageferry_report::facts::Facts;
use pageferry_report::page;
use pageferry_report::recorder::Recorder;
use pageferry_vmm::facts::transports;
use pageferry_vmm::guest::GuestConfig;
use pageferry_vmm::heartbeat::HeartbeatGap;
use pageferry_vmm::tracking::DirtyTracking;
use serde::{Deserialize, Serialize};

use crate::report::Report;

/// How long after its end a migration is still looked at: the gap that it made ends there.
const LOOK_ON_MS: f64 = 100.0;

/// What a side saw.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Timeline {
    /// When it began, by `CLOCK_REALTIME`, and what it was; of a source.
    migration: Option<(u64, Box<Migration>)>,
    gaps: Vec<HeartbeatGap>,
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

/// Writes the page of one migration: `report` is what both sides say together, `timelines` what
/// each of them saw.
pub(crate) fn write(
    path: &Path,
    report: &Report,
    timelines: [Option<Timeline>; 2],
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut document = Document::new(Kind::Demo, Facts::here(transports()));
    document.migrations.extend(migration(report, timelines));
    fs::write(path, page::render(&document))
        .map_err(|error| format!("failed to write the report to {}: {error}", path.display()))?;
    say!("the report is in {}", path.display());
    Ok(())
}

fn migration(report: &Report, timelines: [Option<Timeline>; 2]) -> Option<Migration> {
    let mut began = None;
    let mut gaps = Vec::new();
    for timeline in timelines.into_iter().flatten() {
        began = began.or(timeline.migration);
        gaps.extend(timeline.gaps);
    }
    let (began_ns, migration) = began?;
    let ms = |nanoseconds: u64| nanoseconds as f64 / 1e6;
    let gaps = gaps.into_iter().map(|gap| Gap {
        ms: ms(gap.ended_realtime_ns.saturating_sub(began_ns)),
        gap_ms: ms(gap.gap_ns),
    });
    let last_ms = migration.total_ms + LOOK_ON_MS;
    Some(Migration {
        outcome: serde_json::to_value(report.outcome).ok()?.as_str()?.to_owned(),
        error: report.error.clone(),
        oracle_ok: report.oracle_ok,
        downtime_limit_ms: report.downtime_limit_ms.unwrap_or_default(),
        cpu_ms: report.cpu_ms,
        heartbeat_gap_ms: report.heartbeat_gap_ms,
        heartbeat_gaps: gaps.filter(|gap| gap.ms > 0.0 && gap.ms <= last_ms).collect(),
        ..*migration
    })
}
