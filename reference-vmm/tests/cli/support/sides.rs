//! A source and a destination, the way most tests want them.

use super::host::guest_kind;
use super::process::Process;

/// Of a guest that is small and quick to move.
pub(crate) const SMALL: &[&str] = &["--memory", "64M", "--working-set", "8M", "--backing", "memfd"];

/// What keeps a source in pre-copy until somebody ends it.
pub(crate) const ENDLESS: &[&str] = &["--downtime-limit", "1us", "--max-rounds", "4000000000"];

/// A `receive` that runs what arrives for a moment. With its address.
pub(crate) fn destination(more: &[&str]) -> (Process, String) {
    destination_that_stays(&[&["--run-for", "100ms"], more].concat())
}

/// A `receive` that runs what arrives until it is told to end. With its address.
pub(crate) fn destination_that_stays(more: &[&str]) -> (Process, String) {
    let own = ["receive", "--with-parent", "--json", "--listen", "127.0.0.1:0"];
    let mut process = Process::start("destination", &[&own, more].concat());
    let line = process.await_message("listening on ");
    let address = line.trim_start_matches("listening on ").to_owned();
    (process, address)
}

/// A `run` whose small guest runs until it is told what to do, and for a moment after a migration
/// that failed.
pub(crate) fn source(more: &[&str]) -> Process {
    source_that_stays(&[&["--run-for", "100ms"], more].concat())
}

/// As [`source`]; after a migration that failed it waits for what comes next.
pub(crate) fn source_that_stays(more: &[&str]) -> Process {
    let own = ["run", "--with-parent", "--json", "--on-demand", "--guest", guest_kind()];
    let mut process = Process::start("source", &[&own, SMALL, more].concat());
    process.await_message("pageferry guest: ");
    process
}

/// A source in the middle of a migration that does not end by itself, its destination, and the
/// heartbeats before.
pub(crate) fn under_way(more: &[&str]) -> (Process, Process, u64) {
    let (mut destination, address) = destination(&[]);
    let mut source = source(&[ENDLESS, more].concat());
    let beats = source.beats();
    source.say(format!("migrate {address}"));
    destination.await_message("a source connected");
    source.await_message("round 3: ");
    (source, destination, beats)
}
