//! What the subcommands have in common when they print.

use std::io::Write;

use comfy_table::{Table, presets};
pub(crate) use pageferry_report::document::median;
use serde::Serialize;

use crate::outcome::Failure;

/// Version of the JSON objects. Fields are added, never repurposed.
pub(crate) const SCHEMA: u32 = 1;

/// One line on stdout.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    std::io::stdout()
        .write_all(format!("{text}\n").as_bytes())
        .map_err(|error| format!("failed to print the result: {error}").into())
}

/// The object, or the table.
pub(crate) fn report(report: &impl Serialize, table: &Table, json: bool) -> Result<(), Failure> {
    if json { line(&serde_json::to_string(report)?) } else { line(&table.to_string()) }
}

/// A table as this project's programs draw them.
pub(crate) fn table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table
}
