//! A side that is killed or stands still in the middle, and guests that cannot be moved in time.

use std::sync::Arc;

use rustix::process::Signal;

use crate::support::proxy::{Gate, Trouble, gated, proxy};
use crate::support::report::Report;
use crate::support::sides::{
    BUSY, LOST_FOR_GOOD, destination, source, source_of, under_way, under_way_to,
};

/// A side that has lost its link waits so long for the other one's word why: longer than a guest
/// may stand still for a peer that does not do its part.
const LAST_WORDS_MS: f64 = 1000.0;

/// For how long the guest stood still at most, by its own clock. Of one that nobody has paused that is a
/// matter of how busy the machine is.
fn stood_still_ms(report: &Report) -> f64 {
    let gap_ms = report.number("heartbeat_gap_ms");
    eprintln!("the guest stood still for {gap_ms} ms at most");
    gap_ms
}

/// The link of a guest that stands still has trouble: it goes on at once, and not once the source has given
/// the link up, which is after `gives_up_ms`.
fn assert_goes_on(trouble: Trouble, more: &[&str], why: &[&str], gives_up_ms: f64) {
    let (_destination, address) = destination(&[LOST_FOR_GOOD]);
    let mut source = source(&[&["--dirty-rate=20000", LOST_FOR_GOOD], more].concat());
    let beats = source.beats();
    source.say(format!("migrate {}", proxy(&address, trouble)));
    source.await_message("guest paused at the source");
    let report = source.finish().report(1);
    report.assert_kept("failed", why, beats);
    assert!(stood_still_ms(&report) < gives_up_ms, "{report:?}");
}

#[test]
fn the_link_is_cut_while_the_guest_stands_still() {
    assert_goes_on(Trouble::Cut, &[], &["the transport failed"], LAST_WORDS_MS);
}

#[test]
fn data_channels_are_cut_while_the_guest_stands_still_and_nobody_says_why() {
    // Lost or timed out, by which channel has something to send; where none has, and state is being loaded, that is
    // waited for.
    let more = ["--stall-timeout=3s", "--load-timeout=3s"];
    assert_goes_on(Trouble::DataCut, &more, &[], LAST_WORDS_MS);
}

#[test]
fn the_link_is_silent_while_the_guest_stands_still() {
    // What it waits for is a matter of when it was paused: pages to land, or state to be loaded.
    let (more, why) = (["--stall-timeout=6s", "--load-timeout=6s"], ["timed out after 6s"]);
    // The guest stands still for a little less than that: what landed last had landed before.
    assert_goes_on(Trouble::Silence, &more, &why, 5000.0);
}

#[test]
fn the_link_is_silent_while_memory_is_compared() {
    let more = ["--verify", "--stall-timeout=3s"];
    let why = ["timed out after 3", "while waiting for the destination to compare memory"];
    // As long as that, and what comparing takes itself.
    assert_goes_on(Trouble::SilentComparison, &more, &why, 10_000.0);
}

#[test]
fn the_destination_is_killed() {
    let (mut source, mut destination, beats) = under_way(&[]);
    destination.signal(Signal::KILL);
    assert!(destination.finish().reports.is_empty());
    let report = source.finish().report(1);
    report.assert_kept("failed", &["the transport failed"], beats);
    stood_still_ms(&report);
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
    let report = source.finish().report(3);
    report.assert_kept("cancelled", &["cancelled"], beats);
    stood_still_ms(&report);
    destination.signal(Signal::CONT);
    destination.finish().report(3).assert_did_not_come("cancelled", &["cancelled"]);
}

/// It is the link that stands still then, and no channel of it.
#[test]
fn a_destination_that_stood_still_for_a_while_loses_no_channel() {
    let more = ["--channels=4", "--dirty-rate=100000", "--stall-timeout=8s"];
    let (mut source, destination, _) = under_way(&more);
    destination.stop();
    // More than half of what is allowed.
    std::thread::sleep(std::time::Duration::from_secs(6));
    destination.signal(Signal::CONT);
    source.await_message("round 3: ");
    source.say("cancel");
    let report = source.finish().report(3);
    assert_eq!(report.count("lost_channels"), 0, "{report:?}");
}

/// Nothing gets through on any connection for longer than one channel alone may be silent, and then all of
/// it does: whatever was on its way when it stopped.
fn assert_stands_an_outage(transport: &str) {
    let (mut destination, address) = destination(&[transport]);
    let gate = Arc::new(Gate::default());
    let address = gated(&address, &gate);
    let more =
        ["--channels=4", "--dirty-rate=100000", "--stall-timeout=10s", "--verify", transport];
    let (mut source, _) = under_way_to(&mut destination, &address, &more);
    gate.shut();
    std::thread::sleep(std::time::Duration::from_secs(6));
    let messages = source.messages();
    assert!(!messages.contains("round 3: "), "it got through: {messages}");
    gate.open();
    source.await_message("round 3: ");
    source.say("downtime-limit 30s");
    let departed = source.finish().report(0);
    let arrived = destination.finish().report(0);
    for report in [&departed, &arrived] {
        assert_eq!(report.count("lost_channels"), 0, "{report:?}");
        assert_eq!(report.flag("memory_match"), Some(true), "{report:?}");
    }
    arrived.assert_arrived();
}

#[test]
fn an_outage_of_the_whole_link_loses_no_channel_of_tcp() {
    assert_stands_an_outage("--transport=tcp");
}

#[test]
fn an_outage_of_the_whole_link_loses_no_channel_of_io_uring() {
    assert_stands_an_outage("--transport=auto");
}

#[test]
fn the_destination_stands_still() {
    let more = ["--dirty-rate=100000", "--stall-timeout=10s"];
    let (mut source, destination, beats) = under_way(&more);
    destination.stop();
    let report = source.finish().report(1);
    report.assert_kept("failed", &["timed out after 10s"], beats);
    stood_still_ms(&report);
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
