//! `run` and `receive` by hand.

use rustix::process::Signal;

use crate::support::host::guest_kind;
use crate::support::peer::closed_port;
use crate::support::process::Process;
use crate::support::sides::{
    SMALL, destination, destination_that_stays, source, source_that_stays,
};

#[test]
fn a_guest_moves_by_itself() {
    let (mut destination, address) = destination(&[]);
    let own = ["run", "--with-parent", "--json", "--migrate-to", &address, "--verify"];
    let own = [&own, SMALL, &["--migrate-after", "50ms", "--guest", guest_kind()]].concat();
    let departed = Process::start("source", &own).finish().report(0);
    departed.assert_departed();
    assert_eq!(departed.flag("memory_match"), Some(true));
    let arrived = destination.finish().report(0);
    arrived.assert_arrived();
    assert_eq!(arrived.flag("memory_match"), Some(true));
    assert_eq!(arrived.text("guest"), guest_kind());
    assert!(arrived.count("heartbeats") > 0);
}

#[test]
fn a_guest_moves_on_a_signal() {
    let (mut destination, address) = destination(&[]);
    let mut source = source_that_stays(&["--migrate-to", &address]);
    let before = source.beats();
    source.await_beats_beyond(before);
    source.signal(Signal::USR1);
    source.finish().report(0).assert_departed();
    let arrived = destination.finish().report(0);
    arrived.assert_arrived();
    // The heartbeats moved with it.
    assert!(arrived.count("heartbeats") > before, "{before} before: {arrived:?}");
}

#[test]
fn a_guest_moves_on_a_line_on_stdin() {
    let (mut destination, address) = destination(&[]);
    let mut source = source_that_stays(&[]);
    source.say("migrate");
    source.await_message("migrate where to?");
    source.say("cancel");
    source.await_message("no migration is under way");
    source.say("dance");
    source.await_message("\"dance\" is not known here");
    source.say("migrate here there");
    source.await_message("nothing more was expected");
    source.say(b"\xff\xfe\x00");
    source.await_message("is not known here");
    source.say("");
    let before = source.beats();
    source.await_beats_beyond(before);
    source.say(format!("  migrate   {address} "));
    source.finish().report(0).assert_departed();
    destination.finish().report(0).assert_arrived();
}

#[test]
fn a_migration_that_failed_can_be_tried_again() {
    let (_held, nowhere) = closed_port();
    let (mut destination, address) = destination_that_stays(&[]);
    let mut source = source_that_stays(&["--migrate-to", &nowhere]);
    source.signal(Signal::USR1);
    let failed = source.await_report();
    assert_eq!((failed.text("outcome"), failed.text("guest_at")), ("failed", "source"));
    source.await_message("\"migrate [ADDR]\" tries again");
    let before = source.beats();
    source.await_beats_beyond(before);
    source.say(format!("migrate {address}"));
    source.await_report().assert_departed();
    source.finish().assert_status(0);

    let arrived = destination.await_report();
    assert_eq!(arrived.text("outcome"), "completed");
    destination.await_message("the guest runs here; Ctrl-C ends it");
    assert!(destination.lives());
    destination.signal(Signal::INT);
    destination.finish().assert_status(0);
}

#[test]
fn quit_ends_a_guest() {
    let mut source = source(&[]);
    let beats = source.beats();
    source.await_beats_beyond(beats);
    source.say("quit");
    source.finish().report(3).assert_kept("cancelled", &["before the migration began"], beats);
}

#[test]
fn waiting_for_a_guest_can_be_ended() {
    let (mut destination, _) = destination(&[]);
    destination.signal(Signal::INT);
    destination.finish().assert_status(3);
    destination.await_message("interrupted before a guest came");
}

#[test]
fn a_bandwidth_limit_is_kept_and_can_be_lifted() {
    let (mut destination, address) = destination(&["--pin", "0"]);
    // 8 MiB of data at 64 KiB a second: two minutes, if nobody lifts it.
    let more = ["--workload=idle", "--bandwidth-limit=64K", "--pin=0", "--migrate-to", &address];
    let mut source = source_that_stays(&more);
    source.say("limit 1M");
    source.await_message("no migration is under way");
    source.say("migrate");
    destination.await_message("a source connected");
    // Nothing is slow without a word.
    source.await_message("round 1 goes on: ");
    destination.await_message("round 1 goes on: ");
    source.say("limit 8M");
    source.say("limit fast");
    source.await_message("a size is like");
    let departed = source.finish().report(0);
    departed.assert_departed();
    // At 8 MiB a second, but for what the first moments and the last round had.
    assert!(departed.number("total_ms") > 500.0, "{departed:?}");
    destination.finish().report(0).assert_arrived();
}
