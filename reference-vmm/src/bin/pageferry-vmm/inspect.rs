//! `inspect`: device state as text.

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::say;
use pageferry_device_state::inspect::{Inspected, diff};
use pageferry_vmm::{snapshot, state};

use crate::args::InspectArgs;
use crate::schema::print;

pub(crate) fn inspect(args: &InspectArgs) -> Result<Outcome, Failure> {
    let found = look_into(&args.file)?;
    let Some(other) = &args.other else {
        print(&found.to_string());
        return Ok(Outcome::Completed);
    };
    let changes = diff(&found, &look_into(other)?);
    for change in &changes {
        print(&change.to_string());
    }
    say!("{} differences", changes.len());
    Ok(Outcome::Completed)
}

/// A file of a guest has the schema of its program, a stream is taken for one of this program's.
fn look_into(path: &Path) -> Result<Inspected, Failure> {
    let named = |error: &(dyn Error + 'static)| {
        format!("failed to inspect {}: {}", path.display(), pageferry::Chain::of(error))
    };
    let mut input: Box<dyn Read> = if path == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        Box::new(File::open(path).map_err(|error| named(&error))?)
    };
    let mut begin = Vec::new();
    let magic_bytes = snapshot::MAGIC.len() as u64;
    (&mut input).take(magic_bytes).read_to_end(&mut begin).map_err(|error| named(&error))?;
    let is_guest = begin == snapshot::MAGIC;
    let mut input = begin.as_slice().chain(input);
    let (state, schema) = if is_guest {
        let header = snapshot::read_header(&mut input).map_err(|error| named(&error))?;
        (header.state, header.schema)
    } else {
        let mut state = Vec::new();
        input.read_to_end(&mut state).map_err(|error| named(&error))?;
        (state, state::schema())
    };
    let found = pageferry_device_state::inspect(&state, &schema);
    Ok(found.map_err(|error| named(&error))?)
}
