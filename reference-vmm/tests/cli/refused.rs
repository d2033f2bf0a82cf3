//! Migrations that cannot begin: a clear error, and the guest goes on where it is.

use crate::support::peer::{closed_port, listen};
use crate::support::process::Process;
use crate::support::sides::{destination, destination_that_stays, source, source_of};

/// A source that is told to migrate to `address` fails for all these reasons, and keeps its guest.
fn assert_fails(address: &str, why: &[&str]) {
    let mut source = source(&[]);
    let beats = source.beats();
    source.say(format!("migrate {address}"));
    source.finish().report(1).assert_kept("failed", why, beats);
}

#[test]
fn nobody_listens() {
    let (_held, address) = closed_port();
    assert_fails(&address, &["failed to connect to", &address, "refused"]);
}

#[test]
fn addresses_that_are_none() {
    // No name has a part of more than 63 characters: no name server is asked.
    let unknown = format!("{}.invalid:7400", "a".repeat(64));
    for address in ["nonsense", "127.0.0.1:port", "127.0.0.1:99999", &unknown] {
        assert_fails(address, &["failed to connect to", address]);
    }
    // It could be an address of eight groups as well.
    assert_fails("fe80::1:7400", &["in brackets before its port: [fe80::1]:7400"]);
    assert_fails("[fe80::1%no-such0]:7400", &["is there a network interface no-such0?"]);
}

#[test]
fn a_port_that_is_in_use_and_addresses_that_cannot_be_listened_on() {
    let (_listener, used) = listen();
    for (address, why) in [
        (used.as_str(), "in use"),
        // For documentation (RFC 5737), so never this host's.
        ("192.0.2.1:0", "assign requested address"),
        ("nonsense", "invalid socket address"),
    ] {
        let mut destination =
            Process::start("destination", &["receive", "--json", "--listen", address]);
        let report = destination.finish().report(1);
        assert_eq!((report.text("outcome"), report.text("guest_at")), ("failed", "nowhere"));
        assert!(report.text("error").contains(why), "{report:?}");
        let message = destination.await_message("error: failed to listen on ");
        assert!(message.contains(address) && message.contains(why), "{message}");
    }
}

#[test]
fn memory_of_another_size() {
    let (mut destination, address) = destination(&["--memory", "128M"]);
    assert_fails(&address, &["(declined)", "67108864", "134217728"]);
    let line = destination.await_message("no guest came from ");
    assert!(["67108864", "134217728"].iter().all(|part| line.contains(part)), "{line}");
    // It was not the guest that is waited for, which may come yet.
    let mut source = source_of(&["--memory", "128M", "--working-set", "8M", "--run-for", "100ms"]);
    source.say(format!("migrate {address}"));
    source.finish().report(0).assert_departed();
    destination.finish().report(0).assert_arrived();
}

#[test]
fn memory_of_the_size_that_is_wanted() {
    let (mut destination, address) = destination(&["--memory", "64M"]);
    let mut source = source(&[]);
    source.say(format!("migrate {address}"));
    source.finish().report(0).assert_departed();
    destination.finish().report(0).assert_arrived();
}

#[test]
fn a_destination_that_has_a_guest_already() {
    let (mut destination, address) = destination_that_stays(&[]);
    let mut first = source(&[]);
    first.say(format!("migrate {address}"));
    first.finish().report(0).assert_departed();
    destination.await_report();
    assert_fails(&address, &["failed to connect to", "refused"]);
    assert!(destination.lives());
}
