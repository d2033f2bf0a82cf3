//! What is printed.

use comfy_table::{Cell, CellAlignment, Table};
use indicatif::HumanBytes;
use pageferry_report::document::{Missing, median};
use pageferry_report::facts::Facts;
use serde::Serialize;

use crate::output;

/// One guest that moved.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Move {
    /// From the call to its return.
    pub(super) total_ms: f64,
    /// As whoever moved it says.
    pub(super) downtime_ms: f64,
    /// As the guest shows; none of one that showed no life again.
    pub(super) standstill_ms: Option<f64>,
    /// On the wire.
    pub(super) wire_bytes: u64,
    /// Of all but virtual CPUs.
    pub(super) cpu_ms: f64,
    /// Whether the guest's memory was right afterwards.
    pub(super) oracle_ok: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Contestant {
    pub(super) name: String,
    pub(super) moves: Vec<Move>,
}

#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) schema: u32,
    pub(super) facts: Facts,
    /// QEMU's version.
    pub(super) qemu: String,
    pub(super) memory_bytes: u64,
    pub(super) working_set_bytes: u64,
    pub(super) vcpus: u8,
    pub(super) channels: u16,
    pub(super) downtime_limit_ms: f64,
    pub(super) contestants: Vec<Contestant>,
    pub(super) missing: Vec<Missing>,
}

impl Report {
    /// What must not be: a guest that pageferry moved and that is wrong, or a failure of what it has done before.
    pub(super) fn wrong_of_pageferry(&self) -> Option<String> {
        self.contestants.iter().filter(|each| each.name.starts_with("pageferry")).find_map(|each| {
            let name = &each.name;
            let failed = self.missing.iter().find(|missing| missing.name == *name);
            if each.moves.iter().any(|moved| !moved.oracle_ok) {
                Some(format!("{name}: a guest was wrong after it was moved"))
            } else {
                failed.map(|Missing { why, .. }| format!("{name}: {why}"))
            }
        })
    }

    pub(super) fn table(&self) -> Table {
        let mut table = output::table();
        let title = format!(
            "guest of {}, {} of it written all the time; QEMU {}",
            HumanBytes(self.memory_bytes),
            HumanBytes(self.working_set_bytes),
            self.qemu
        );
        table.set_header([
            &*title,
            "total, ms",
            "downtime, ms",
            "standstill, ms",
            "bytes",
            "CPU, ms",
            "wrong",
        ]);
        for Contestant { name, moves } in &self.contestants {
            let milliseconds = |of: fn(&Move) -> Option<f64>| {
                let all = || moves.iter().filter_map(of);
                let (least, most) = (all().reduce(f64::min), all().reduce(f64::max));
                match (median(all()), least, most) {
                    (Some(median), Some(least), Some(most)) => {
                        format!("{median:.0} ({least:.0}–{most:.0})")
                    }
                    _ => "-".to_owned(),
                }
            };
            let wrong = moves.iter().filter(|moved| !moved.oracle_ok).count();
            // Of a list of whole numbers; the exact middle does not matter.
            let mut bytes: Vec<_> = moves.iter().map(|moved| moved.wire_bytes).collect();
            bytes.sort_unstable();
            let bytes = bytes.get(bytes.len() / 2).copied().unwrap_or_default();
            let mut cells = vec![Cell::new(name)];
            cells.extend(
                [
                    milliseconds(|moved| Some(moved.total_ms)),
                    milliseconds(|moved| Some(moved.downtime_ms)),
                    milliseconds(|moved| moved.standstill_ms),
                    HumanBytes(bytes).to_string(),
                    milliseconds(|moved| Some(moved.cpu_ms)),
                    format!("{wrong} of {}", moves.len()),
                ]
                .map(|text| Cell::new(text).set_alignment(CellAlignment::Right)),
            );
            table.add_row(cells);
        }
        for Missing { name, why } in &self.missing {
            table.add_row([Cell::new(name), Cell::new(format!("MISSING: {why}"))]);
        }
        table
    }
}
