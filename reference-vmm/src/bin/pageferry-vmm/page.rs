//! The page of plots that a demo makes of its migration.

use std::fs;
use std::path::Path;

use pageferry_cli::say;
use pageferry_cli::transport::facts::transports;
use pageferry_report::document::{Document, Gap, Kind, Migration};
use pageferry_report::facts::Facts;
use pageferry_report::page;

use crate::report::Report;
use crate::timeline::Timeline;

/// How long after its end a migration is still looked at: the gap that it made ends there.
const LOOK_ON_MS: f64 = 100.0;

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
