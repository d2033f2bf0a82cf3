//! What the subcommands have in common when they print.

use comfy_table::Table;
use pageferry_cli::outcome::Failure;
use pageferry_cli::output;
pub(crate) use pageferry_cli::output::table;
pub(crate) use pageferry_report::document::median;
use serde::Serialize;

/// Version of the JSON objects. Fields are added, never repurposed.
pub(crate) const SCHEMA: u32 = 1;

/// One line on stdout.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    output::line(text).map_err(|error| format!("failed to print the result: {error}").into())
}

/// The object, or the table.
pub(crate) fn report(report: &impl Serialize, table: &Table, json: bool) -> Result<(), Failure> {
    if json { line(&serde_json::to_string(report)?) } else { line(&table.to_string()) }
}
