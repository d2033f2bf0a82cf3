//! Peers of other versions, both ways round.

use std::io::Write;

use pageferry::memory::{Layout, RegionLayout};
use pageferry::protocol::{
    FailureReason, Hello, Message, MigrationKey, PROTOCOL_VERSION, Welcome, negotiate,
};
use pageferry_tcp::preamble::{Answer, Status, VERSION};
use rustix::process::Signal;

use crate::support::peer::{
    control_preamble, dial, listen, ok_answer, read_answer, receive, send, take,
};
use crate::support::process::{Ended, Process};
use crate::support::sides::{destination, source};

/// A greeting whose versions are changed.
fn hello(oldest_version: u16, newest_version: u16) -> Vec<u8> {
    let region = RegionLayout { guest_addr: 0, len_bytes: 1 << 20, backing_page_bytes: 4096 };
    let layout = Layout::new(vec![region]).expect("a layout");
    let hello = Hello::new(MigrationKey::random().unwrap(), layout, 1, false, Vec::new());
    Message::Hello(Hello { oldest_version, newest_version, ..hello }).encode()
}

/// What a source says first, after the answer `then` has it do.
fn with_source(then: impl FnOnce(&std::net::TcpListener)) -> (Process, Ended, u64) {
    let (listener, address) = listen();
    let mut source = source(&[]);
    let beats = source.beats();
    source.say(format!("migrate {address}"));
    then(&listener);
    let ended = source.finish();
    (source, ended, beats)
}

#[test]
fn a_source_of_another_protocol_version() {
    let (mut destination, address) = destination(&[]);
    let mut source = dial(&address);
    source.write_all(&control_preamble()).expect("write");
    assert_eq!(read_answer(&mut source).status, Status::Ok);
    send(&mut source, &hello(PROTOCOL_VERSION + 1, PROTOCOL_VERSION + 4));
    let Message::Failed { reason, text } = receive(&mut source) else { panic!("no failure") };
    assert_eq!(reason, FailureReason::Incompatible);
    let why = [
        "protocol versions do not meet",
        &format!("{} to {}", PROTOCOL_VERSION + 1, PROTOCOL_VERSION + 4),
    ];
    assert!(why.iter().all(|part| text.contains(part)), "{text}");
    assert_waits_on(&mut destination, &why);
}

/// A destination says what was wrong with a source, and waits for the next.
fn assert_waits_on(destination: &mut Process, why: &[&str]) {
    destination.await_message("the next is waited for");
    let said = destination.messages();
    assert!(why.iter().all(|part| said.contains(part)), "no {why:?} in {said}");
    destination.signal(Signal::INT);
    let why = ["interrupted before a guest came"];
    destination.finish().report(3).assert_did_not_come("cancelled", &why);
}

/// A guest of the reference VMM, as a source says it.
const GUEST: &str = r#"{"kind":"process","regions":[[0,16777216]],"backing":"anonymous","vcpus":1,
    "workload":{"kind":"idle","working_set_bytes":4194304,"dirty_rate_pages_per_second":null,
    "seed":1}}"#;

#[test]
fn a_source_whose_device_state_is_another() {
    let schema = pageferry_vmm::state::schema().to_json();
    let newer = schema.replace(
        r#""name":"heartbeat","state":{"version":1"#,
        r#""name":"heartbeat","state":{"version":2"#,
    );
    assert_ne!(newer, schema);
    for (said, why) in [
        (newer, "heartbeat: the writer has version 2, the reader reads up to 1"),
        // That of the whole program: a guest of threads has no vCPUs.
        (schema, "vcpu: the reader does not know the section"),
        (String::new(), "failed to read a schema"),
    ] {
        let (mut destination, address) = destination(&[]);
        let mut source = dial(&address);
        source.write_all(&control_preamble()).expect("write");
        assert_eq!(read_answer(&mut source).status, Status::Ok);
        let region = RegionLayout { guest_addr: 0, len_bytes: 16 << 20, backing_page_bytes: 4096 };
        let layout = Layout::new(vec![region]).expect("a layout");
        let mut hello = Hello::new(MigrationKey::random().unwrap(), layout, 1, false, GUEST.into());
        hello.state_schema = said.into();
        send(&mut source, &Message::Hello(hello).encode());
        // Instead of a welcome: no page was asked for.
        let Message::Failed { reason, text } = receive(&mut source) else { panic!("no failure") };
        assert_eq!(reason, FailureReason::Incompatible);
        assert!(text.contains("device state"), "{text}");
        assert_waits_on(&mut destination, &["device state", why]);
    }
}

#[test]
fn a_source_of_another_transport_version() {
    let (mut destination, address) = destination(&[]);
    let mut preamble = control_preamble();
    preamble[8..10].copy_from_slice(&(VERSION + 1).to_le_bytes());
    let mut stranger = dial(&address);
    stranger.write_all(&preamble).expect("write");
    let answer = read_answer(&mut stranger);
    assert_eq!(answer.status, Status::Version);
    assert!(answer.reason.contains(&format!("version {}", VERSION + 1)), "{answer:?}");
    // It was no source: the next one is welcome.
    let mut source = source(&[]);
    source.say(format!("migrate {address}"));
    source.finish().report(0).assert_departed();
    destination.finish().report(0).assert_arrived();
}

#[test]
fn a_destination_that_chooses_a_version_nobody_offered() {
    let (_source, ended, beats) = with_source(|listener| {
        let mut stream = take(listener);
        stream.write_all(&ok_answer()).expect("write");
        let Message::Hello(hello) = receive(&mut stream) else { panic!("no greeting") };
        let version = PROTOCOL_VERSION + 1;
        let (_, welcome) = negotiate(&hello, hello.channels, false, false).expect("it fits");
        let welcome = Welcome { version, ..welcome }.to(&hello);
        send(&mut stream, &Message::Welcome(welcome).encode());
        let Message::Failed { reason, text } = receive(&mut stream) else { panic!("no failure") };
        assert_eq!(reason, FailureReason::Incompatible);
        assert!(text.contains("not offered"), "{text}");
    });
    let why = [format!("chose protocol version {}", PROTOCOL_VERSION + 1)];
    ended.report(1).assert_kept("failed", &[&why[0]], beats);
}

#[test]
fn a_destination_that_refuses_the_version() {
    let reason = "no such version here";
    let (_source, ended, beats) = with_source(|listener| {
        let mut stream = take(listener);
        let mut answer = Answer { status: Status::Version, reason: reason.to_owned() }.encode();
        // As a newer one would say it.
        answer[8..10].copy_from_slice(&(VERSION + 1).to_le_bytes());
        stream.write_all(&answer).expect("write");
    });
    ended.report(1).assert_kept("failed", &["refused by", reason], beats);
}

#[test]
fn a_destination_that_fails_in_its_own_words() {
    let (_source, ended, beats) = with_source(|listener| {
        let mut stream = take(listener);
        stream.write_all(&ok_answer()).expect("write");
        receive(&mut stream);
        let text = "out of \x1b[2Jcheese".to_owned();
        send(&mut stream, &Message::Failed { reason: FailureReason::Host, text }.encode());
    });
    let report = ended.report(1);
    report.assert_kept("failed", &["the other side failed", "out of  [2Jcheese"], beats);
}

#[test]
fn a_destination_that_talks_nonsense() {
    let frames: [&[u8]; 4] = [&[0xff; 40], &[], &[4, 0], &hello(1, 1)];
    for frame in frames {
        let (_source, ended, beats) = with_source(|listener| {
            let mut stream = take(listener);
            stream.write_all(&ok_answer()).expect("write");
            receive(&mut stream);
            send(&mut stream, frame);
        });
        ended.report(1).assert_kept("failed", &[], beats);
    }
}

#[test]
fn something_else_that_listens_there() {
    let (_source, ended, beats) = with_source(|listener| {
        let mut stream = take(listener);
        stream.write_all(&[b'x'; 200]).expect("write");
    });
    ended.report(1).assert_kept("failed", &["no pageferry transport"], beats);
}
