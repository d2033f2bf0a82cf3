//! A table of migrations.

use comfy_table::{Cell, CellAlignment};
use pageferry_cli::outcome::Failure;
use pageferry_report::document::{Document, Migration};

use crate::output;

/// The object on stdout, or the table.
pub(super) fn print(document: &Document, json: bool) -> Result<(), Failure> {
    let mut table = output::table();
    table.set_header([
        "migration",
        "total",
        "rounds",
        "Gb/s",
        "downtime",
        "longest gap",
        "load, CPUs",
        "guest",
    ]);
    for each in &document.migrations {
        let mut cells = vec![Cell::new(each.setting.title())];
        let figures = [
            format!("{:.1} ms", each.total_ms),
            each.rounds.last().map_or(0, |last| last.round).to_string(),
            format!("{:.2}", each.throughput_gbps),
            format!("{:.2} ms", each.downtime_ms),
            each.heartbeat_gap_ms.map_or_else(|| "-".to_owned(), |gap| format!("{gap:.1} ms")),
            format!("{:.1} + {:.1}", each.load.guest_cpus, each.load.host_cpus),
        ];
        cells.extend(figures.map(|text| Cell::new(text).set_alignment(CellAlignment::Right)));
        cells.push(Cell::new(verdict(each)));
        table.add_row(cells);
    }
    output::report(document, &table, json)
}

fn verdict(migration: &Migration) -> String {
    match (migration.outcome.as_str(), migration.oracle_ok, &migration.error) {
        ("completed", Some(true), _) => "right".to_owned(),
        (_, Some(false), Some(error)) => format!("WRONG: {error}"),
        (outcome, _, Some(error)) => format!("{outcome}: {error}"),
        (outcome, _, None) => outcome.to_owned(),
    }
}
