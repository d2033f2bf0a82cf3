//! Links that are lost and come back, under real guests.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use pageferry_tcp::preamble::ANSWER_BYTES;

use crate::support::peer::Noise;
use crate::support::proxy::{Gate, Relay, Tap, gated, relayed, tapped};
use crate::support::sides::{BUSY, TIGHT, destination, source_of};

/// How often the link is cut.
const CUTS: u64 = 20;

/// All connections are cut at all kinds of moments, in rounds that follow the first.
fn assert_survives_cuts(cuts: u64, both: &[&str]) {
    let relay = Arc::new(Relay::default());
    let (mut destination, address) = destination(both);
    let more = ["--dirty-rate=20000", "--verify", "--run-for=100ms"];
    let mut source = source_of(&[BUSY, TIGHT, &more, both].concat());
    source.say(format!("migrate {}", relayed(&address, &relay)));
    source.await_message("round 1: ");
    for cut in 1..=cuts {
        relay.cut_after(cut * cut * 1_000_003 % (16 << 20));
        source.await_message("the link is back");
    }
    source.say("downtime-limit 30s");
    let departed = source.finish().report(0);
    let arrived = destination.finish().report(0);
    if both.iter().any(|option| option.starts_with("--shared-key")) {
        departed.assert_departed_encrypted();
        arrived.assert_arrived_encrypted();
    } else {
        departed.assert_departed();
        arrived.assert_arrived();
    }
    for report in [&departed, &arrived] {
        assert_eq!(report.flag("memory_match"), Some(true), "{report:?}");
        assert_eq!(report.count("rejoins"), cuts, "{report:?}");
    }
}

#[test]
fn a_guest_moves_over_a_link_that_is_cut_again_and_again_by_tcp() {
    assert_survives_cuts(CUTS, &["--transport=tcp"]);
}

#[test]
fn a_guest_moves_over_a_link_that_is_cut_again_and_again_by_io_uring() {
    assert_survives_cuts(CUTS, &["--transport=auto"]);
}

/// Each link is one that both sides have proven to each other anew.
#[test]
fn a_guest_moves_encrypted_over_a_link_that_is_cut_again_and_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let key = folder.path().join("key");
    std::fs::write(&key, [b'k'; 32]).expect("the folder is writable");
    assert_survives_cuts(CUTS / 4, &[&format!("--shared-key={}", key.display())]);
}

/// Bytes that may be under way on a channel (docs/design.md, "Landed") and a batch that is being sent, for each cut.
const UNDER_WAY_BYTES: u64 = (2 * (32 + 4)) << 20;

/// All of a guest's memory goes out over a link that is cut twenty times at random, in the first round: hardly more than
/// over one that is not. `PAGEFERRY_MEMORY_MIB=1024` for more memory.
fn assert_little_is_sent_twice(both: &[&str]) {
    let mib = std::env::var("PAGEFERRY_MEMORY_MIB").ok().and_then(|mib| mib.parse().ok());
    let mib: u64 = mib.unwrap_or(512);
    let seed = u64::from(std::process::id());
    eprintln!("{mib} MiB, seed {seed}");
    let mut noise = Noise(seed);
    let [memory, written] = [("memory", mib), ("working-set", mib - 64)]
        .map(|(option, mib)| format!("--{option}={mib}M"));
    let guest = [&memory, &written, "--backing=memfd", "--dirty-rate=2000", "--verify"];
    // Fast enough for a guest to be waited for, and slow enough for cuts to meet it.
    let limits = ["--downtime-limit=5s", "--bandwidth-limit=256M", "--run-for=100ms"];
    let mut sent = Vec::new();
    for cuts in [0, CUTS] {
        let relay = Arc::new(Relay::default());
        let (mut destination, address) = destination(both);
        let mut source = source_of(&[&guest[..], &limits, both].concat());
        source.say(format!("migrate {}", relayed(&address, &relay)));
        for _ in 0..cuts {
            // All of them in what is sent anyway.
            relay.cut_after(noise.next() % ((mib << 20) / CUTS));
            source.await_message("the link is back");
        }
        let departed = source.finish().report(0);
        let arrived = destination.finish().report(0);
        departed.assert_departed();
        arrived.assert_arrived();
        assert_eq!(departed.count("rejoins"), cuts, "{departed:?}");
        sent.push(departed.count("bytes_on_wire"));
    }
    eprintln!("{} MiB undisturbed, {} MiB with {CUTS} cuts", sent[0] >> 20, sent[1] >> 20);
    assert!(sent[1] <= sent[0] + sent[0] / 10 + CUTS * UNDER_WAY_BYTES, "{sent:?}");
}

#[test]
fn little_is_sent_twice_over_a_link_that_is_cut_again_and_again_by_tcp() {
    assert_little_is_sent_twice(&["--transport=tcp"]);
}

#[test]
fn little_is_sent_twice_over_a_link_that_is_cut_again_and_again_by_io_uring() {
    assert_little_is_sent_twice(&["--transport=auto"]);
}

/// In the first round, in which most of what is sent is new.
#[test]
fn a_link_that_is_cut_in_the_first_round_comes_back() {
    let relay = Arc::new(Relay::default());
    let (mut destination, address) = destination(&[]);
    let more = ["--dirty-rate=20000", "--downtime-limit=2s", "--verify", "--run-for=100ms"];
    let mut source = source_of(&[BUSY, &more].concat());
    source.say(format!("migrate {}", relayed(&address, &relay)));
    relay.cut_after(32 << 20);
    let departed = source.finish().report(0);
    let arrived = destination.finish().report(0);
    assert_eq!((departed.count("rejoins"), arrived.count("rejoins")), (1, 1));
    departed.assert_departed();
    arrived.assert_arrived();
}

/// The destination's end of the first link seems to live when the source is back on another one.
#[test]
fn a_link_that_only_the_source_has_lost_is_displaced() {
    let gate = Arc::new(Gate::default());
    let (mut destination, address) = destination(&["--stall-timeout=60s"]);
    let more = ["--dirty-rate=20000", "--stall-timeout=2s", "--verify", "--run-for=100ms"];
    let mut source = source_of(&[BUSY, TIGHT, &more].concat());
    source.say(format!("migrate {}", gated(&address, &gate)));
    source.await_message("round 1: ");
    gate.shut_for_those_that_are_there();
    source.await_message("the link is lost (timed out after 2s");
    source.await_message("the link is back");
    source.say("downtime-limit 30s");
    let departed = source.finish().report(0);
    destination.await_message("displaced");
    let arrived = destination.finish().report(0);
    assert_eq!((departed.count("rejoins"), arrived.count("rejoins")), (1, 1));
    departed.assert_departed();
    arrived.assert_arrived();
}

/// In plain text whoever listened can say it again: it takes nobody's place, while that link is there and after it.
#[test]
fn how_a_source_came_back_is_of_no_use_to_others() {
    const LINKS: u64 = 3;
    let tap = Arc::new(Tap::default());
    let (mut destination, address) = destination(&[]);
    let more = ["--dirty-rate=20000", "--verify", "--run-for=100ms"];
    let mut source = source_of(&[BUSY, TIGHT, &more].concat());
    source.say(format!("migrate {}", tapped(&address, &tap)));
    source.await_message("round 1: ");
    let mut others = Vec::new();
    for _ in 0..LINKS {
        tap.cut();
        source.await_message("the link is back");
        let said = tap.newest_control();
        for _ in 0..5 {
            let mut other = TcpStream::connect(&address).expect("it listens");
            other.write_all(&said).expect("it is read");
            // It is let in, and its first word is looked at.
            other.read_exact(&mut [0; ANSWER_BYTES]).expect("an answer");
            others.push(other);
        }
    }
    source.say("downtime-limit 30s");
    let departed = source.finish().report(0);
    let arrived = destination.finish().report(0);
    assert_eq!((departed.count("rejoins"), arrived.count("rejoins")), (LINKS, LINKS));
    departed.assert_departed();
    arrived.assert_arrived();
}
