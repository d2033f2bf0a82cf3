//! A source and a destination, the way most tests want them.

use super::host::guest_kind;
use super::process::Process;

/// Of a guest that is small and quick to move.
pub(crate) const SMALL: &[&str] = &["--memory", "64M", "--working-set", "8M", "--backing", "memfd"];

/// The memory of such a guest.
pub(crate) const SMALL_BYTES: u64 = 64 << 20;

/// Of a guest that dirties a lot in each of the first rounds, since they move so much.
pub(crate) const BUSY: &[&str] = &["--memory=256M", "--working-set=192M", "--backing=memfd"];

/// A downtime limit that is not met as long as anything is dirty.
pub(crate) const TIGHT: &[&str] = &["--downtime-limit=1us"];

/// For tests of links that do not come back.
pub(crate) const LOST_FOR_GOOD: &str = "--rejoin-timeout=1s";

/// Arguments of what runs what arrives for a moment.
const FOR_A_MOMENT: &[&str] = &["--run-for", "100ms"];

/// A `receive` that runs what arrives for a moment. With its address.
pub(crate) fn destination(more: &[&str]) -> (Process, String) {
    destination_that_stays(&[FOR_A_MOMENT, more].concat())
}

/// A `receive` that runs what arrives until it is told to end. With its address.
pub(crate) fn destination_that_stays(more: &[&str]) -> (Process, String) {
    listening(&[env!("CARGO_BIN_EXE_pageferry-vmm")], more)
}

/// As [`destination`], by a program that becomes this one.
pub(crate) fn destination_by(program: &[&str], more: &[&str]) -> (Process, String) {
    listening(program, &[FOR_A_MOMENT, more].concat())
}

fn listening(program: &[&str], more: &[&str]) -> (Process, String) {
    let own = ["receive", "--with-parent", "--json", "--listen", "127.0.0.1:0"];
    let args = [&program[1..], &own, more].concat();
    let mut process = Process::start_program("destination", program[0], &args);
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
    source_of(&[SMALL, more].concat())
}

/// A `run --on-demand` whose guest runs.
pub(crate) fn source_of(guest: &[&str]) -> Process {
    let own = ["run", "--with-parent", "--json", "--on-demand", "--guest", guest_kind()];
    let mut process = Process::start("source", &[&own, guest].concat());
    process.await_message("pageferry guest: ");
    process
}

/// A source in the second round of a migration, which takes a while, its destination, and the
/// heartbeats before. A link that they lose is soon given up.
pub(crate) fn under_way(more: &[&str]) -> (Process, Process, u64) {
    let (mut destination, address) = destination(&[LOST_FOR_GOOD]);
    let more = [&[LOST_FOR_GOOD], more].concat();
    let (source, beats) = under_way_to(&mut destination, &address, &more);
    (source, destination, beats)
}

/// As [`under_way`], to a destination that is there. It ends when the source is told of another
/// downtime limit.
pub(crate) fn under_way_to(
    destination: &mut Process,
    address: &str,
    more: &[&str],
) -> (Process, u64) {
    let mut source = source_of(&[BUSY, TIGHT, &["--run-for", "100ms"], more].concat());
    let beats = source.beats();
    source.say(format!("migrate {address}"));
    destination.await_message("a source connected");
    source.await_message("round 1: ");
    (source, beats)
}
