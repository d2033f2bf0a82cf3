//! A table of percentiles.

use comfy_table::{Cell, CellAlignment};
use pageferry_cli::outcome::Failure;
use pageferry_report::document::{Document, PageWritePair, median};
use pageferry_report::latency::Latency;

use crate::output;

/// The object on stdout, or the table.
pub(super) fn print(document: &Document, json: bool) -> Result<(), Failure> {
    let mut table = output::table();
    table.set_header(["", "count", "50 %", "90 %", "99 %", "99.9 %", "99.99 %", "longest"]);
    for latency in &document.latencies {
        let Latency { p50_ns, p90_ns, p99_ns, p99_9_ns, p99_99_ns, max_ns, .. } = *latency;
        let mut cells =
            vec![Cell::new(latency.what.description()), Cell::new(latency.count.to_string())];
        cells.extend(
            [p50_ns, p90_ns, p99_ns, p99_9_ns, p99_99_ns, max_ns]
                .map(|ns| Cell::new(microseconds(ns)).set_alignment(CellAlignment::Right)),
        );
        table.add_row(cells);
        if let Some(recording) = latency.recording {
            let cost = format!(
                "recording: {:.0} ns each, {:.4} % of the transfer",
                recording.ns_each,
                recording.share_of_transfer * 100.0
            );
            table.add_row(vec![Cell::new(cost)]);
        }
    }
    if let Some(writes) = &document.page_writes {
        let figure = |of: fn(&PageWritePair) -> f64| {
            let median = median(writes.pairs.iter().map(of)).unwrap_or(0.0);
            Cell::new(format!("{median:.1} us")).set_alignment(CellAlignment::Right)
        };
        let name = |name: &str| vec![Cell::new(name), Cell::new(writes.writes.to_string())];
        let engine = figure(|pair| pair.engine_us);
        table.add_row([name("a page written, seen there"), vec![engine]].concat());
        let perftest = figure(|pair| pair.perftest_us);
        table.add_row([name("the same by ib_write_lat"), vec![perftest]].concat());
        let ratio = writes.ratio_median.unwrap_or(0.0);
        table.add_row(vec![Cell::new(format!("ratio, median of pairs: {ratio:.2}"))]);
    }
    output::report(document, &table, json)
}

fn microseconds(ns: u64) -> String {
    format!("{:.1} us", ns as f64 / 1e3)
}
