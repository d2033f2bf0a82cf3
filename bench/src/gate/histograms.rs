//! Histograms of latencies over each transport, head beside base.

use std::path::Path;

use comfy_table::{Cell, CellAlignment, Table};
use pageferry_cli::outcome::Failure;
use pageferry_cli::say;
use pageferry_iouring::{IoUringOptions, Rings};
use pageferry_report::document::Document;
use pageferry_report::latency::Latency;
use serde::Serialize;

use super::binary::Binary;
use crate::output;

/// The same thing, measured with both.
#[derive(Debug, Serialize)]
pub(super) struct Percentiles {
    base: Option<Latency>,
    head: Latency,
}

/// Measures, and keeps the histograms in `DIRECTORY/base` and `DIRECTORY/head`.
pub(super) fn make(
    head: &Binary,
    base: Option<&Binary>,
    directory: &Path,
) -> Result<Vec<Percentiles>, Failure> {
    let mut all = Vec::new();
    for transport in ["tcp", "iouring"] {
        if let ("iouring", Err(unavailable)) = (transport, Rings::new(IoUringOptions::default())) {
            say!("histograms of iouring skipped, because {unavailable}");
            continue;
        }
        let heads = measure(head, transport, directory)?.ok_or("the head has no `latency`")?;
        let bases = base.map(|base| measure(base, transport, directory)).transpose()?.flatten();
        let bases = bases.unwrap_or_default();
        all.extend(heads.into_iter().map(|head| Percentiles {
            base: bases.iter().find(|base| base.what == head.what).cloned(),
            head,
        }));
    }
    Ok(all)
}

fn measure(
    binary: &Binary,
    transport: &str,
    directory: &Path,
) -> Result<Option<Vec<Latency>>, Failure> {
    let directory = directory.join(binary.to_string());
    let directory = directory.to_str().ok_or("a path that is no text")?;
    let args = [
        "latency",
        "--json",
        "--transport",
        transport,
        "--histograms",
        directory,
        "--memory=128M",
        "--migrations=8",
        "--pings=5000",
    ];
    let Some(text) = binary.run(&args)? else { return Ok(None) };
    Ok(Some(Document::parse(&text)?.latencies))
}

pub(super) fn table(latencies: &[Percentiles]) -> Table {
    let mut table = output::table();
    table.set_header([
        "latency in us, base | head",
        "",
        "50 %",
        "90 %",
        "99 %",
        "99.9 %",
        "longest",
    ]);
    for Percentiles { base, head } in latencies {
        let mut cells = vec![Cell::new(&head.transport), Cell::new(head.what.description())];
        let figures: [fn(&Latency) -> u64; 5] = [
            |latency| latency.p50_ns,
            |latency| latency.p90_ns,
            |latency| latency.p99_ns,
            |latency| latency.p99_9_ns,
            |latency| latency.max_ns,
        ];
        cells.extend(figures.map(|figure| {
            let us = |latency: &Latency| format!("{:.1}", figure(latency) as f64 / 1e3);
            let base = base.as_ref().map_or_else(|| "-".to_owned(), us);
            Cell::new(format!("{base} | {}", us(head))).set_alignment(CellAlignment::Right)
        }));
        table.add_row(cells);
    }
    table
}
