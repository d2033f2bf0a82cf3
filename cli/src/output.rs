//! What goes to stdout.

use std::io::{self, Write};

use comfy_table::{Table, presets};

/// One line, in one write.
pub fn line(text: &str) -> io::Result<()> {
    io::stdout().write_all(format!("{text}\n").as_bytes())
}

/// A table as this project's programs draw them.
pub fn table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table
}
