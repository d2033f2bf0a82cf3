//! Pages of real guests that are changed on the way.

use crate::support::proxy::damaging;
use crate::support::sides::{BUSY, TIGHT, destination, source_of};

/// A bit of every so many bytes: no head of a batch is near all of them.
const EVERY_BYTES: u64 = 5 << 20;
const TIMES: u64 = 4;

fn assert_arrives_whole(transport: &str) {
    let (mut destination, address) = destination(&[transport]);
    // Much that is sent once, and stays as it is.
    let more = ["--dirty-rate=2000", "--page-checks=on"];
    let mut source = source_of(&[BUSY, TIGHT, &more, &["--run-for=100ms", transport]].concat());
    source.say(format!("migrate {}", damaging(&address, EVERY_BYTES, TIMES)));
    source.await_message("round 1: ");
    source.say("downtime-limit 30s");
    let departed = source.finish().report(0);
    let messages = source.messages();
    let arrived = destination.finish().report(0);
    departed.assert_departed();
    arrived.assert_arrived();
    assert!(departed.count("damaged_pages") > 0, "{departed:?}");
    assert!(messages.contains("pages had arrived otherwise than they were sent"), "{messages}");
}

#[test]
fn a_guest_arrives_whole_though_bits_of_its_pages_change_on_the_way_by_tcp() {
    assert_arrives_whole("--transport=tcp");
}

#[test]
fn a_guest_arrives_whole_though_bits_of_its_pages_change_on_the_way_by_io_uring() {
    assert_arrives_whole("--transport=auto");
}

/// What the checks are good for: over loopback there are none unless they are asked for.
#[test]
fn what_changes_on_the_way_is_in_the_guest_without_checks() {
    let (mut destination, address) = destination(&[]);
    let more = ["--dirty-rate=2000", "--verify"];
    let mut source = source_of(&[BUSY, TIGHT, &more, &["--run-for=100ms"]].concat());
    source.say(format!("migrate {}", damaging(&address, EVERY_BYTES, TIMES)));
    source.await_message("round 1: ");
    source.say("downtime-limit 30s");
    let report = source.finish().report(1);
    assert!(format!("{report:?}").contains("memory differs"), "{report:?}");
    destination.finish();
}
