//! Ctrl-C and what comes of it, at every stage and on each side.

use std::thread;
use std::time::{Duration, Instant};

use pageferry::protocol::{Hello, Message};
use rustix::process::Signal;

use crate::support::PATIENCE;
use crate::support::host::{can_trace, guest_kind};
use crate::support::peer::{
    hello_of, is_being_dialled, let_in, listen, receive, send, silent, small_guest, take, welcomed,
};
use crate::support::process::Process;
use crate::support::sides::{
    BUSY, SMALL, TIGHT, destination, destination_by, source, source_that_stays, under_way,
};

#[test]
fn at_the_source() {
    let (mut source, mut destination, beats) = under_way(&[]);
    source.signal(Signal::INT);
    let report = source.finish().report(3);
    report.assert_kept("cancelled", &["cancelled"], beats);
    source.await_message("cancelling; the guest stays here");
    destination.finish().report(3).assert_did_not_come("cancelled", &["cancelled"]);
}

#[test]
fn at_the_destination() {
    let (mut source, mut destination, beats) = under_way(&[]);
    destination.signal(Signal::INT);
    destination.finish().report(3).assert_did_not_come("cancelled", &["cancelled"]);
    source.finish().report(3).assert_kept("cancelled", &["cancelled"], beats);
}

/// The end of a terminal is an end in order too.
#[test]
fn by_the_end_of_the_terminal() {
    let (mut source, mut destination, beats) = under_way(&[]);
    source.signal(Signal::HUP);
    source.finish().report(3).assert_kept("cancelled", &["cancelled"], beats);
    destination.finish().report(3).assert_did_not_come("cancelled", &["cancelled"]);
}

/// Unless it was started so that it outlives that.
#[test]
fn not_by_the_end_of_a_terminal_that_is_of_no_matter() {
    let program = ["nohup", env!("CARGO_BIN_EXE_pageferry-vmm")];
    let (mut destination, address) = destination_by(&program, &[]);
    destination.signal(Signal::HUP);
    let mut source = source(&[]);
    source.say(format!("migrate {address}"));
    source.finish().report(0).assert_departed();
    destination.finish().report(0).assert_arrived();
}

#[test]
fn at_a_destination_that_nobody_came_to() {
    let (mut destination, _) = destination(&[]);
    destination.signal(Signal::INT);
    let why = ["interrupted before a guest came"];
    destination.finish().report(3).assert_did_not_come("cancelled", &why);
}

#[test]
fn by_quit_at_a_destination_that_nobody_came_to() {
    let (mut destination, _) = destination(&[]);
    destination.say("status");
    destination.await_message("there is no guest here yet");
    destination.say("quit");
    let why = ["interrupted before a guest came"];
    destination.finish().report(3).assert_did_not_come("cancelled", &why);
}

#[test]
fn at_a_destination_whose_source_says_nothing() {
    let (mut destination, address) = destination(&[]);
    let _silent = welcomed(&address, 1);
    destination.await_message("a source connected");
    destination.signal(Signal::INT);
    let why = ["cancelled before a guest came"];
    destination.finish().report(3).assert_did_not_come("cancelled", &why);
}

/// Who is told no is given time to read it; somebody who wants to end it is heard meanwhile too.
#[test]
fn at_a_destination_that_turns_a_stranger_away() {
    for (transport, signal) in [("tcp", Signal::INT), ("auto", Signal::TERM)] {
        let (mut destination, address) = destination(&["--transport", transport]);
        let mut stranger = let_in(&address);
        let cat = Hello { description: b"a cat".to_vec(), ..hello_of(small_guest(), 1) };
        send(&mut stranger, &Message::Hello(cat).encode());
        assert!(matches!(receive(&mut stranger), Message::Failed { .. }));
        destination.signal(signal);
        let why = ["before a guest came"];
        destination.finish().report(3).assert_did_not_come("cancelled", &why);
    }
}

/// Which of both it sees first is open.
#[test]
fn at_a_destination_whose_stranger_leaves_at_that_moment() {
    for _ in 0..8 {
        let (mut destination, address) = destination(&[]);
        let stranger = welcomed(&address, 2);
        destination.stop();
        drop(stranger);
        destination.signal(Signal::INT);
        destination.signal(Signal::CONT);
        let why = ["before a guest came"];
        destination.finish().report(3).assert_did_not_come("cancelled", &why);
    }
}

#[test]
fn while_the_destination_does_not_answer() {
    let (listener, address) = listen();
    let mut source = source(&[]);
    let beats = source.beats();
    source.say(format!("migrate {address}"));
    let _control = take(&listener);
    source.signal(Signal::INT);
    source.finish().report(3).assert_kept("cancelled", &["cancelled"], beats);
}

/// The attempt ends too, and not only the wait for it.
#[test]
fn while_the_address_is_silent() {
    for wish in ["cancel", "Ctrl-C"] {
        let (address, _held) = silent();
        let mut source = source_that_stays(&[]);
        source.say(format!("migrate {address}"));
        let deadline = Instant::now() + PATIENCE;
        while !is_being_dialled(&address) {
            assert!(Instant::now() < deadline, "nobody connects");
            thread::yield_now();
        }
        match wish {
            "cancel" => source.say(wish),
            _ => source.signal(Signal::INT),
        }
        assert_eq!(source.await_report().text("outcome"), "cancelled");
        // By itself it would end after ten seconds.
        let deadline = Instant::now() + Duration::from_secs(5);
        while is_being_dialled(&address) {
            assert!(Instant::now() < deadline, "after {wish} it is still connecting");
            thread::yield_now();
        }
        source.signal(Signal::INT);
        source.finish().assert_status(3);
    }
}

/// At the time that was told, or once somebody wants it.
#[test]
fn before_the_migration_begins() {
    let args = ["run", "--with-parent", "--json", "--run-for", "100ms", "--guest", guest_kind()];
    for when in [&["--migrate-to=127.0.0.1:1", "--migrate-after=1h"][..], &["--on-demand"], &[]] {
        for signal in [Signal::INT, Signal::TERM] {
            let mut source = Process::start("source", &[&args, SMALL, when].concat());
            source.await_message("pageferry guest: ");
            let beats = source.beats();
            source.await_beats_beyond(beats);
            source.signal(signal);
            let why = ["before the migration began"];
            source.finish().report(3).assert_kept("cancelled", &why, beats);
        }
    }
}

/// A handler that is in the kernel and not in anybody's table yet took a signal, and that was all.
#[test]
fn while_signals_are_set_up() {
    if !can_trace() {
        return;
    }
    let slow = "inject=rt_sigaction:delay_exit=200000";
    let strace = ["-D", "-f", "-qq", "-o", "/dev/null", "-e", slow];
    let receive = [env!("CARGO_BIN_EXE_pageferry-vmm"), "receive", "--listen=127.0.0.1:0"];
    let args = [&strace[..], &receive, &["--json"]].concat();
    let mut destination = Process::start_program("destination", "strace", &args);
    destination.await_hearing();
    destination.signal(Signal::TERM);
    let why = ["before a guest came"];
    destination.finish().report(3).assert_did_not_come("cancelled", &why);
}

/// Nothing ends the search for an address.
#[test]
fn at_a_destination_whose_name_is_still_looked_up() {
    if !can_trace() {
        return;
    }
    let stuck = "inject=openat:delay_enter=3600000000";
    let strace = ["-D", "-f", "-qq", "-o", "/dev/null", "-P", "/etc/hosts", "-e", stuck];
    let receive = [env!("CARGO_BIN_EXE_pageferry-vmm"), "receive", "--listen=localhost:0"];
    let args = [&strace[..], &receive, &["--json"]].concat();
    let mut destination = Process::start_program("destination", "strace", &args);
    destination.await_hearing();
    destination.signal(Signal::TERM);
    let why = ["interrupted before a guest came"];
    destination.await_report().assert_did_not_come("cancelled", &why);
    destination.trace_no_more();
    destination.finish().assert_status(3);
}

#[test]
fn then_the_guest_goes_on_until_it_is_told_to_end() {
    let (listener, address) = listen();
    let mut source = source_that_stays(&["--migrate-to", &address]);
    source.signal(Signal::USR1);
    let control = take(&listener);
    source.signal(Signal::TERM);
    assert_eq!(source.await_report().text("outcome"), "cancelled");
    drop(control);
    source.await_message("the guest runs on here");
    let beats = source.beats();
    source.await_beats_beyond(beats);
    source.signal(Signal::INT);
    source.finish().assert_status(3);
}

#[test]
fn a_demo_under_way() {
    let mut demo = demo();
    demo.await_message("round 1: ");
    demo.signal(Signal::INT);
    let report = demo.finish().report(3);
    report.assert_kept("cancelled", &["cancelled"], 0);
    assert!(report.count("rounds") >= 1, "{report:?}");
}

#[test]
fn a_demo_whose_guest_has_just_started() {
    let mut demo = demo();
    demo.await_message("pageferry guest: ");
    demo.signal(Signal::INT);
    demo.finish().report(3).assert_kept("cancelled", &["cancelled"], 0);
}

#[test]
fn a_demo_that_has_hardly_begun() {
    let mut demo = demo();
    demo.await_message("listening on ");
    demo.signal(Signal::INT);
    let report = demo.finish().report(3);
    assert_eq!((report.text("outcome"), report.text("guest_at")), ("cancelled", "source"));
    assert_ne!(report.flag("oracle_ok"), Some(false), "{report:?}");
}

/// A demo whose migration takes a while.
fn demo() -> Process {
    Process::start("demo", &[&["demo", "--json"], BUSY, TIGHT].concat())
}
