//! What the subcommands have in common when they print.

use std::io::Write;

use comfy_table::{Table, presets};
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

/// The middle one of some figures, the mean of the two in the middle of an even number; `None`
/// of none.
pub(crate) fn median(figures: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = figures.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        length if length.is_multiple_of(2) => {
            Some(f64::midpoint(sorted[middle - 1], sorted[middle]))
        }
        _ => Some(sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median([]), None);
        assert_eq!(median([3.0]), Some(3.0));
        assert_eq!(median([9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 9.0]), Some(3.0));
    }
}
