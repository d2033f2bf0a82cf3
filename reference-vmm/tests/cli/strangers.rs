//! Who connects to a listening destination and is no source, or not the one that is served, disturbs
//! nobody.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use pageferry::protocol::{FailureReason, Hello, Message};
use pageferry::transport::stream::FrameHeader;
use pageferry_tcp::preamble::{Kind, Preamble, Status};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};
use rustix::process::Signal;

use crate::support::peer::{
    Noise, Opened, control_preamble, dial, frame, hello, let_in, listen, ok_answer, read_answer,
    read_refusal, receive, send, take, try_open, welcomed,
};
use crate::support::process::Process;
use crate::support::sides::{destination, destination_by, source, under_way, under_way_to};

/// Throws bytes at the port, more than a preamble and less; gives back connections that say
/// nothing more.
fn disturb(address: &str, noise: &mut Noise) -> Vec<TcpStream> {
    for length in [1, 7, 8, 31, 32, 33, 500, 70_000] {
        let mut stream = dial(address);
        // The other side hangs up before it has read a lot of nonsense.
        let _ = stream.write_all(&noise.bytes(length)).and_then(|()| stream.read(&mut [0; 256]));
    }
    // A good beginning, and then nonsense.
    let start = &Preamble { id: pageferry::transport::LinkId([1; 16]), kind: Kind::Control };
    let mut cut_short = dial(address);
    cut_short.write_all(&start.encode()[..20]).expect("write");
    let mut wrong_kind = dial(address);
    let mut bytes = start.encode();
    bytes[10] = 200;
    wrong_kind.write_all(&bytes).expect("write");
    assert_eq!(read_answer(&mut wrong_kind).status, Status::Malformed);
    let mut no_such_migration = dial(address);
    let data = Preamble { kind: Kind::Data { channel: 0 }, ..*start };
    no_such_migration.write_all(&data.encode()).expect("write");
    assert_eq!(read_answer(&mut no_such_migration).status, Status::UnknownMigration);
    vec![cut_short, dial(address)]
}

#[test]
fn noise_before_and_during_a_migration() {
    let mut noise = Noise(1);
    let (mut destination, address) = destination(&[]);
    let mut silent = disturb(&address, &mut noise);
    let (mut source, _) = under_way_to(&mut destination, &address, &["--verify"]);
    // The migration stands still while they come.
    source.stop();
    silent.extend(disturb(&address, &mut noise));
    let mut second = let_in(&address);
    send(&mut second, &hello(1).encode());
    assert_eq!(read_refusal(&mut second), "another migration is being served");
    source.signal(Signal::CONT);
    source.say("downtime-limit 60s");
    source.finish().report(0).assert_departed();
    destination.finish().report(0).assert_arrived();
    destination.await_message("refused a connection");
}

#[test]
fn a_second_source_while_one_is_served() {
    let (mut destination, address) = destination(&[]);
    let (mut first, _) = under_way_to(&mut destination, &address, &[]);
    let mut second = source(&[]);
    let beats = second.beats();
    first.stop();
    second.say(format!("migrate {address}"));
    let why = ["refused by", &address, "another migration is being served"];
    second.finish().report(1).assert_kept("failed", &why, beats);
    first.signal(Signal::CONT);
    first.say("downtime-limit 60s");
    first.finish().report(0).assert_departed();
    destination.finish().report(0).assert_arrived();
}

/// A real source comes after all of them; the time that it may take.
fn assert_serves(destination: &mut Process, address: &str) {
    let mut source = source(&[]);
    let began = Instant::now();
    source.say(format!("migrate {address}"));
    source.finish().report(0).assert_departed();
    assert!(began.elapsed() < Duration::from_secs(5), "it took {:?}", began.elapsed());
    destination.finish().report(0).assert_arrived();
}

#[test]
fn strangers_that_leave_at_every_step_before_a_guest_is_on_its_way() {
    let (mut destination, address) = destination(&[]);
    drop(let_in(&address));
    destination.await_message("it ended after 0 bytes of its greeting");
    let mut nonsense = let_in(&address);
    send(&mut nonsense, &[0xff; 40]);
    destination.await_message("no greeting: message of type 65535 where a greeting is due");
    let refused = read_refusal(&mut nonsense);
    assert!(refused.starts_with("no greeting"), "{refused}");
    let mut declined = let_in(&address);
    let Message::Hello(hello) = hello(1) else { panic!("no greeting") };
    let other = Hello { description: b"a cat".to_vec(), ..hello };
    send(&mut declined, &Message::Hello(other).encode());
    assert!(matches!(receive(&mut declined), Message::Failed { .. }));
    destination.await_message("no guest came from 127.0.0.1:");
    // It has been promised that its guest is waited for.
    drop(welcomed(&address, 2));
    destination.await_message("no guest came from 127.0.0.1:");
    assert_serves(&mut destination, &address);
}

#[test]
fn a_source_that_fails_before_its_guest_is_on_its_way() {
    let (mut destination, address) = destination(&[]);
    let mut failed = welcomed(&address, 2);
    let text = "no more cheese".to_owned();
    send(&mut failed, &Message::Failed { reason: FailureReason::Host, text }.encode());
    destination.await_message("no more cheese");
    assert_serves(&mut destination, &address);
}

#[test]
fn strangers_that_are_let_in_and_say_nothing() {
    let (mut destination, address) = destination(&[]);
    let _silent: Vec<_> = (0..30).map(|_| let_in(&address)).collect();
    assert_serves(&mut destination, &address);
}

#[test]
fn strangers_that_greet_and_say_nothing_more() {
    let (mut destination, address) = destination(&[]);
    let _silent = welcomed(&address, 2);
    assert_serves(&mut destination, &address);
    let why =
        "displaced: its source came back, or did not answer its welcome while another one waited";
    assert!(destination.await_message("no guest came from 127.0.0.1:").contains(why));
}

/// Whose guest is on its way: the destination has heard of the first round.
fn in_a_round(address: &str) -> Opened {
    let Message::Hello(hello) = hello(2) else { panic!("no greeting") };
    let mut source = try_open(address, &hello).expect("it is let in");
    send(&mut source.control, &Message::Round { round: 1, dirty_pages: 9 }.encode());
    send(&mut source.control, &Message::Ping { number: 1 }.encode());
    assert_eq!(receive(&mut source.control), Message::Pong { number: 1 });
    source
}

/// No source breaks the protocol, however far it has come.
#[test]
fn a_stranger_that_breaks_the_protocol_in_a_round() {
    let (mut destination, address) = destination(&[]);
    let mut stranger = in_a_round(&address);
    send(&mut stranger.control, &Message::Round { round: 1, dirty_pages: 9 }.encode());
    destination.await_message("no guest came from 127.0.0.1:");
    assert_serves(&mut destination, &address);
}

/// No frame is so long.
fn misuse(control: &mut TcpStream) {
    control.write_all(&FrameHeader::with_length(u32::MAX, &[]).encode()).expect("write a header");
    let Message::Failed { reason, text } = receive(control) else { panic!("it goes on") };
    assert_eq!(reason, FailureReason::PeerMisbehaved);
    assert!(text.contains("control frame of 4294967295 bytes"), "{text}");
}

#[test]
fn a_source_whose_frames_are_none_is_told_so() {
    let (mut destination, address) = destination(&[]);
    misuse(&mut welcomed(&address, 2));
    misuse(&mut in_a_round(&address).control);
    assert_serves(&mut destination, &address);
}

#[test]
fn a_destination_whose_frames_are_none_is_told_so() {
    let (listener, address) = listen();
    let mut source = source(&[]);
    let beats = source.beats();
    source.say(format!("migrate {address}"));
    let mut control = take(&listener);
    control.write_all(&ok_answer()).expect("write the answer");
    assert!(matches!(receive(&mut control), Message::Hello(_)));
    misuse(&mut control);
    let why = ["control frame of 4294967295 bytes"];
    source.finish().report(1).assert_kept("failed", &why, beats);
}

/// A source, as far as anybody can tell: who waits for its guest is told that it does not come.
#[test]
fn a_source_that_leaves_in_a_round_ends_the_wait() {
    let (mut destination, address) = destination(&[]);
    drop(in_a_round(&address));
    // Which of its connections was seen to end first decides the rest of the words.
    destination.finish().report(1).assert_did_not_come("failed", &["the transport failed"]);
}

#[test]
fn commands_while_a_migration_is_under_way() {
    let (mut source, mut destination, beats) = under_way(&[]);
    // So that it stays under way.
    destination.stop();
    source.say("status");
    source.await_message("a migration is under way");
    source.say("quit");
    source.await_message("a migration is under way: cancel it first");
    source.say("migrate 127.0.0.1:1");
    source.await_message("a migration is under way");
    source.say("nonsense");
    source.await_message("is not known here");
    source.say("cancel");
    source.finish().report(3).assert_kept("cancelled", &["cancelled"], beats);
    destination.signal(Signal::CONT);
    destination.finish().report(3).assert_did_not_come("cancelled", &["cancelled"]);
}

/// A connection from an address that nothing else here has.
fn from_elsewhere(to: SocketAddr) -> TcpStream {
    let (family, flags) = (AddressFamily::INET, SocketFlags::CLOEXEC);
    let socket = socket_with(family, SocketType::STREAM, flags, None).expect("a socket");
    bind(&socket, &SocketAddr::from(([127, 0, 0, 3], 0))).expect("an address of loopback");
    connect(&socket, &to).expect("the listener takes it");
    socket.into()
}

/// There are more connections than a process may have files: a guest that comes from another address gets in
/// at its first attempt, and there are descriptors for all that it needs.
fn assert_few_files_are_enough(said: &[u8]) {
    const FILES: &str = "--nofile=64:64";
    /// And no more than a listener keeps until they are accepted.
    const MANY: usize = 100;
    /// By default.
    const A_STRANGER_MAY_BE_SILENT: Duration = Duration::from_secs(5);
    for transport in ["--transport=tcp", "--transport=auto"] {
        let program = ["prlimit", FILES, env!("CARGO_BIN_EXE_pageferry-vmm")];
        let (mut destination, address) = destination_by(&program, &[transport]);
        let to = address.parse().expect("an address");
        let _crowd: Vec<_> = (0..MANY)
            .map(|_| {
                let mut stream = from_elsewhere(to);
                // The first ones are turned away while the last ones come.
                let _ = stream.write_all(said);
                stream
            })
            .collect();
        let mut source = source(&["--workload=idle", transport]);
        let began = Instant::now();
        source.say(format!("migrate {address}"));
        source.await_report().assert_departed();
        let took = began.elapsed();
        assert!(took < A_STRANGER_MAY_BE_SILENT, "after {took:?}");
        source.finish().assert_status(0);
        destination.finish().report(0).assert_arrived();
    }
}

#[test]
fn silent_strangers_at_a_destination_that_may_have_few_files() {
    assert_few_files_are_enough(&[]);
}

#[test]
fn strangers_that_greet_at_a_destination_that_may_have_few_files() {
    assert_few_files_are_enough(&[&control_preamble()[..], &frame(&hello(2))].concat());
}
