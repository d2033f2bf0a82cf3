//! What was measured, as one JSON object and as a table for people.

use comfy_table::{Cell, CellAlignment};
use indicatif::HumanBytes;
use pageferry_cli::outcome::Failure;
use serde::Serialize;

use super::pattern::Pattern;
use crate::output::{self, SCHEMA};

/// Times are medians in nanoseconds for the whole bitmap.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) guest_bytes: u64,
    pub(super) bitmap_bytes: u64,
    pub(super) dirty_share: f64,
    pub(super) pattern: Pattern,
    pub(super) dirty_pages: u64,
    pub(super) threads: u16,
    /// By all threads.
    pub(super) read_ns: f64,
    /// Finding the dirty stripes and the runs in them, by all threads.
    pub(super) scan_ns: f64,
    pub(super) read_by_one_ns: f64,
    /// By one thread.
    pub(super) harvest_ns: f64,
    /// By one thread.
    pub(super) count_ns: f64,
}

/// The JSON object.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    schema: u32,
    samples: u16,
    rows: Vec<Row>,
}

impl Report {
    pub(super) fn new(samples: u16, rows: Vec<Row>) -> Self {
        Self { schema: SCHEMA, samples, rows }
    }

    /// The object on stdout, or the table.
    pub(super) fn print(&self, json: bool) -> Result<(), Failure> {
        let mut table = output::table();
        table.set_header(["guest", "dirty", "", "threads", "read", "scan", "harvest", "count"]);
        for row in &self.rows {
            let (read, alone) = (row.read_ns, row.read_by_one_ns);
            let mut cells = vec![
                Cell::new(HumanBytes(row.guest_bytes)),
                Cell::new(format!("{} %", row.dirty_share * 100.0)),
                Cell::new(row.pattern.name()),
            ];
            let figures = [
                row.threads.to_string(),
                time(read),
                times(row.scan_ns, read),
                times(row.harvest_ns, alone),
                times(row.count_ns, alone),
            ];
            cells.extend(figures.map(|text| Cell::new(text).set_alignment(CellAlignment::Right)));
            table.add_row(cells);
        }
        output::report(self, &table, json)
    }
}

fn time(nanoseconds: f64) -> String {
    match nanoseconds {
        large if large >= 1e6 => format!("{:.2} ms", large / 1e6),
        small => format!("{:.2} us", small / 1e3),
    }
}

/// A time, and how often one could have read the bitmap in it.
fn times(nanoseconds: f64, read: f64) -> String {
    let ratio = if read > 0.0 { nanoseconds / read } else { 0.0 };
    format!("{} ({ratio:.1} x)", time(nanoseconds))
}
