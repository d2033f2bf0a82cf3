//! A side that is killed or stands still in the middle, and guests that cannot be moved in time.

use rustix::process::Signal;

use crate::support::sides::{BUSY, destination, source, source_of, under_way};

#[test]
fn the_destination_is_killed() {
    let (mut source, mut destination, beats) = under_way(&[]);
    destination.signal(Signal::KILL);
    assert!(destination.finish().reports.is_empty());
    let report = source.finish().report(1);
    report.assert_kept("failed", &["the transport failed"], beats);
    assert!(report.count("bytes_on_wire") > 0, "{report:?}");
}

#[test]
fn the_source_is_killed() {
    let (mut source, mut destination, _) = under_way(&[]);
    source.signal(Signal::KILL);
    source.finish();
    // No guest was its own, so none may run.
    let report = destination.finish().report(1);
    report.assert_did_not_come("failed", &["the transport failed"]);
}

#[test]
fn the_destination_stands_still_and_the_source_is_told_to_stop() {
    let (mut source, mut destination, beats) = under_way(&[]);
    destination.stop();
    source.signal(Signal::INT);
    source.finish().report(3).assert_kept("cancelled", &["cancelled"], beats);
    destination.signal(Signal::CONT);
    destination.finish().report(3).assert_did_not_come("cancelled", &["cancelled"]);
}

#[test]
fn the_destination_stands_still() {
    let more = ["--dirty-rate=100000", "--stall-timeout=10s"];
    let (mut source, destination, beats) = under_way(&more);
    destination.stop();
    source.finish().report(1).assert_kept("failed", &["timed out after 10s"], beats);
}

#[test]
fn a_destination_that_never_answers() {
    let (destination, address) = destination(&[]);
    let mut source = source(&["--workload=idle", "--connect-timeout=1s"]);
    let beats = source.beats();
    destination.stop();
    // Its kernel takes the connection.
    source.say(format!("migrate {address}"));
    let report = source.finish().report(1);
    report.assert_kept("failed", &["failed to connect to", &address, "timed out"], beats);
}

#[test]
fn a_guest_that_writes_too_fast() {
    let (mut destination, address) = destination(&[]);
    let more = ["--downtime-limit=1ms", "--max-rounds=3", "--run-for=100ms"];
    let mut source = source_of(&[BUSY, &more].concat());
    let beats = source.beats();
    source.say(format!("migrate {address}"));
    let report = source.finish().report(1);
    report.assert_kept(
        "failed",
        &["not converging after 3 rounds", "pages", "limit of 1ms"],
        beats,
    );
    assert_eq!(report.count("rounds"), 3);
    let why = ["not converging", "limit of 1ms"];
    destination.finish().report(1).assert_did_not_come("failed", &why);
}
