//! Somebody who connects, is no source, and comes again and again.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use pageferry_tcp::preamble::ANSWER_BYTES;

use super::{assert_destination_stands, flooded_by};
use crate::support::long_way::long_way;
use crate::support::peer::{control_preamble, frame, hello};
use crate::support::sides::{destination, destination_that_stays, source_that_stays};

#[derive(Debug, Clone, Copy)]
enum Says {
    Nothing,
    Preamble,
    Garbage,
    HalfAHello,
    Hello,
    /// When it is welcomed.
    HelloAndLeaves,
}

impl Says {
    const ALL: [Self; 6] = [
        Self::Nothing,
        Self::Preamble,
        Self::Garbage,
        Self::HalfAHello,
        Self::Hello,
        Self::HelloAndLeaves,
    ];
}

/// Somebody who connects, and is no source. It goes on until it is thrown out.
fn strange(address: &str, says: Says, over: &AtomicBool) -> u64 {
    let preamble = control_preamble();
    let Ok(mut stream) = TcpStream::connect(address) else { return 0 };
    let _ = stream.set_read_timeout(Some(Duration::from_millis(50)));
    let mut speaks = |bytes: &[u8]| stream.write_all(bytes).map_or(0, |()| bytes.len() as u64);
    let hello = frame(&hello(2));
    let sent = match says {
        Says::Nothing => 0,
        Says::Preamble => speaks(&preamble),
        Says::Garbage => speaks(&preamble) + speaks(&[&[40, 0, 0, 0][..], &[0xff; 40]].concat()),
        Says::HalfAHello => speaks(&preamble) + speaks(&hello[..hello.len() / 2]),
        Says::Hello | Says::HelloAndLeaves => speaks(&preamble) + speaks(&hello),
    };
    let (mut heard, mut piece) = (0, [0; 4096]);
    while !over.load(Ordering::Relaxed) {
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(more) => heard += more,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
        if matches!(says, Says::HelloAndLeaves) && heard > ANSWER_BYTES {
            break;
        }
    }
    sent
}

/// Several of them come again and again.
fn assert_destination_stands_strangers(says: Says) {
    assert_destination_stands(&[], |address, over| strange(address, says, over));
}

#[test]
fn strangers_that_say_nothing() {
    assert_destination_stands_strangers(Says::Nothing);
}

#[test]
fn strangers_that_say_a_preamble() {
    assert_destination_stands_strangers(Says::Preamble);
}

#[test]
fn strangers_that_say_garbage() {
    assert_destination_stands_strangers(Says::Garbage);
}

#[test]
fn strangers_that_say_half_a_hello() {
    assert_destination_stands_strangers(Says::HalfAHello);
}

#[test]
fn strangers_that_greet_and_fall_silent() {
    assert_destination_stands_strangers(Says::Hello);
}

#[test]
fn strangers_that_greet_and_leave() {
    assert_destination_stands_strangers(Says::HelloAndLeaves);
}

/// Whoever else is there, a source that is far away gets in at the first attempt.
#[test]
fn strangers_of_all_kinds_beside_a_source_that_is_far_away() {
    let (mut destination, address) = destination(&[]);
    let far = long_way(&address, Duration::from_millis(700));
    let mut source = source_that_stays(&["--workload=idle", "--downtime-limit=20s"]);
    let kinds = Says::ALL.len();
    let next = AtomicUsize::new(0);
    let strange = |over: &AtomicBool| {
        let says = Says::ALL[next.fetch_add(1, Ordering::Relaxed) % kinds];
        let mut sent = 0;
        while !over.load(Ordering::Relaxed) {
            sent += strange(&address, says, over);
        }
        sent
    };
    flooded_by(kinds, strange, || {
        source.say(format!("migrate {far}"));
        source.await_report().assert_departed();
    });
    source.finish().assert_status(0);
    destination.finish().report(0).assert_arrived();
}

/// It waits for an answer no longer than any source, and half a second and three more is what each that was
/// there before it may take.
#[test]
fn who_is_so_far_away_that_its_turn_comes_too_late_hears_why() {
    const MANY: usize = 20;
    let (_destination, address) = destination_that_stays(&[]);
    let far = long_way(&address, Duration::from_millis(1500));
    let mut source = source_that_stays(&["--workload=idle"]);
    let strange = |over: &AtomicBool| strange(&address, Says::Hello, over);
    flooded_by(MANY, strange, || {
        source.say(format!("migrate {far}"));
        let report = source.await_report();
        assert_eq!((report.text("outcome"), report.text("guest_at")), ("failed", "source"));
        let error = report.text("error");
        assert!(error.contains("refused by "), "{error}");
    });
}
