//! The page of plots of one migration.

use std::fs;
use std::path::Path;

use pageferry_report::document::{Document, Kind, Migration};
use pageferry_report::facts::Facts;
use pageferry_report::page;

use super::{Report, Timeline};
use crate::outcome::Failure;
use crate::transport::facts::transports;

/// Writes the page of one migration: `report` is what both sides say together, `timelines` what
/// each of them saw.
pub fn write(
    path: &Path,
    report: &Report,
    timelines: [Option<Timeline>; 2],
) -> Result<(), Failure> {
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
    let (began_realtime_ns, migration) = began?;
    let mut migration = Migration {
        outcome: serde_json::to_value(report.outcome).ok()?.as_str()?.to_owned(),
        error: report.error.clone(),
        oracle_ok: report.oracle_ok,
        downtime_limit_ms: report.downtime_limit_ms.unwrap_or_default(),
        cpu_ms: report.cpu_ms,
        heartbeat_gap_ms: report.heartbeat_gap_ms,
        ..*migration
    };
    migration.add_heartbeat_gaps(began_realtime_ns, gaps);
    Some(migration)
}
