//! Nobody reads what the program writes: no reason for a guest to end.

use rustix::process::Signal;

use crate::support::peer::{listen, take};
use crate::support::sides::{destination_that_stays, source, source_that_stays};

#[test]
fn a_destination_lives_without_readers() {
    let (mut destination, address) = destination_that_stays(&[]);
    destination.close_outputs();
    let mut source = source_that_stays(&[]);
    source.say(format!("migrate {address}"));
    source.finish().report(0).assert_departed();
    // A source that is told that the guest runs there has heard it from the guest's process. It
    // lives on until it is told to end.
    destination.signal(Signal::INT);
    destination.finish().assert_status(0);
}

#[test]
fn a_source_lives_without_readers() {
    let (mut destination, address) = destination_that_stays(&[]);
    let mut source = source_that_stays(&[]);
    source.close_outputs();
    source.say("status");
    source.say("nonsense");
    source.say(format!("migrate {address}"));
    assert_eq!(destination.await_report().text("outcome"), "completed");
    source.finish().assert_status(0);
    destination.signal(Signal::INT);
    destination.finish().assert_status(0);
}

#[test]
fn a_source_keeps_its_guest_without_readers() {
    let (listener, address) = listen();
    let mut source = source(&[]);
    source.close_outputs();
    source.say(format!("migrate {address}"));
    drop(take(&listener));
    // Had it died of its failed writes, that would be another status.
    source.finish().assert_status(1);
}
