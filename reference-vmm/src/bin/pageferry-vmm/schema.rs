//! `schema`: what device state is made of.

use std::fs;
use std::path::Path;

use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::output;
use pageferry_cli::say;
use pageferry_device_state::Schema;
use pageferry_vmm::state;

use crate::args::SchemaCommand;

pub(crate) fn schema(command: &SchemaCommand) -> Result<Outcome, Failure> {
    match command {
        SchemaCommand::Dump => {
            print(&state::schema().to_pretty_json());
            Ok(Outcome::Completed)
        }
        SchemaCommand::Check { old, new } => Ok(check(&read(old)?, &read(new)?)),
    }
}

fn read(path: &Path) -> Result<Schema, Failure> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let json = fs::read(path).map_err(|error| failed(&error))?;
    Ok(Schema::from_json(&json).map_err(|error| failed(&pageferry::Chain::of(&error)))?)
}

/// Both ways. What was to fail by its versions is no failure of the check.
fn check(old: &Schema, new: &Schema) -> Outcome {
    let mut undeclared = 0;
    for (way, compatibility) in [("old to new", new.reads(old)), ("new to old", old.reads(new))] {
        print(&format!("{way}: {compatibility}"));
        undeclared += compatibility.undeclared().count();
    }
    if undeclared == 0 {
        return Outcome::Completed;
    }
    say!("{undeclared} of these were not declared: no version says that they fail");
    Outcome::Failed
}

/// If nobody reads it there is nothing to do about it.
pub(crate) fn print(text: &str) {
    let _ = output::line(text);
}
