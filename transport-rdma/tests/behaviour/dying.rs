//! Peers that die: they are noticed, and nothing is left behind.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::testing::settle;
use pageferry::transport::{
    ControlChannel, DestinationLink, Link, Received, SourceLink, TransportError,
};
use pageferry_rdma::{RdmaAcceptor, RdmaOptions, connect};

use crate::common::{alone, chain, data, expect_resources, memory, resources};
use crate::support::{SOON, address, of_anyone};

const OTHER_SIDE: &str = "PAGEFERRY_TEST_OTHER_SIDE";

/// This test program once more, as the other side. It has a link, and says so.
fn other_side(role: &str) -> (Child, String) {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "dying::the_other_side", "--ignored", "--nocapture"])
        .env(OTHER_SIDE, role)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program starts");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut lines = lines.map(|line| line.expect("text"));
    let said = lines.find_map(|line| line.split_once("other side: ").map(|(_, said)| said.into()));
    (child, said.expect("the other side says something"))
}

/// Holds its end of a link until it is killed.
#[test]
#[ignore = "the other side of two tests, which start it: ci/test rdma"]
fn the_other_side() {
    let (Some(address), Ok(role)) = (address(), std::env::var(OTHER_SIDE)) else { return };
    let memory = memory();
    let mut keep: Vec<Box<dyn std::any::Any>> = Vec::new();
    if role == "destination" {
        let acceptor =
            RdmaAcceptor::bind((&*address, 0), of_anyone(RdmaOptions::default())).expect("listens");
        println(&acceptor.local_addr().to_string());
        let mut link = acceptor.accept(Some(SOON)).expect("a source came");
        link.register(memory.memory()).expect("memory registers");
        let receivers = link.open_receivers(1, SOON).expect("a channel is accepted");
        for mut receiver in receivers {
            thread::spawn(move || while let Ok(Received::Batch(_)) = receiver.receive() {});
        }
        keep.push(Box::new(link));
    } else {
        let to = role.parse::<std::net::SocketAddr>().expect("an address");
        let mut link = connect(to, RdmaOptions::default()).expect("the acceptor answers");
        link.register(memory.memory()).expect("memory registers");
        keep.push(Box::new(link.open_senders(1).expect("a channel opens")));
        keep.push(Box::new(link));
        println("here");
    }
    // Until it is killed, or the test has ended.
    let _ = std::io::stdin().read(&mut [0]);
}

#[expect(clippy::print_stdout, reason = "what the other side says")]
fn println(what: &str) {
    println!("other side: {what}");
}

fn is_gone(error: &TransportError) -> bool {
    matches!(error, TransportError::Lost { .. } | TransportError::Closed)
}

#[test]
fn a_killed_destination_is_noticed() {
    let (_alone, Some(_)) = (alone(), address()) else { return };
    let before = resources();
    let (mut child, to) = other_side("destination");
    let to = to.parse::<std::net::SocketAddr>().expect("an address");
    let mut source = connect(to, RdmaOptions::default()).expect("the other side answers");
    let ControlChannel { sender: to_them, receiver: mut control } = source.control().expect("once");
    let here = memory();
    here.fill(5);
    source.register(here.memory()).expect("memory registers");
    let mut sender = source.open_senders(1).expect("a channel opens").remove(0);
    let ticket = sender.send(&[data(0, 16)]).expect("a batch goes out");
    settle(&mut *sender, ticket);
    child.kill().expect("it was alive");
    let killed = Instant::now();
    let error = loop {
        let sent = sender.send(&[data(0, 16)]);
        match sent.and_then(|_| sender.watermarks(Some(Duration::from_millis(10)))) {
            Ok(_) => assert!(killed.elapsed() < SOON, "never noticed"),
            Err(error) => break error,
        }
    };
    assert!(is_gone(&error), "{error:?}");
    let error = control.receive(Some(SOON)).expect_err("nobody is there");
    assert!(is_gone(&error), "{error:?}");
    eprintln!("noticed after {:?}: {}", killed.elapsed(), chain(&error));
    child.wait().expect("it has ended");
    drop((sender, control, to_them, source));
    expect_resources(&before);
}

#[test]
fn a_killed_source_is_noticed_by_those_who_only_wait() {
    let (_alone, Some(address)) = (alone(), address()) else { return };
    let before = resources();
    let acceptor =
        RdmaAcceptor::bind((&*address, 0), of_anyone(RdmaOptions::default())).expect("listens");
    let to = acceptor.local_addr().to_string();
    let there = memory();
    thread::scope(|scope| {
        let starting = scope.spawn(move || other_side(&to));
        let mut link = acceptor.accept(Some(SOON)).expect("a source came");
        let ControlChannel { sender: _kept, receiver: mut control } = link.control().expect("once");
        link.register(there.memory()).expect("memory registers");
        let mut receiver = link.open_receivers(1, SOON).expect("a channel").remove(0);
        let (mut child, _) = starting.join().expect("no panic");
        child.kill().expect("it was alive");
        let killed = Instant::now();
        for error in [
            receiver.receive().map(drop).expect_err("nobody is there"),
            control.receive(Some(SOON)).map(drop).expect_err("nobody is there"),
        ] {
            assert!(is_gone(&error), "{error:?}");
            assert!(killed.elapsed() < SOON, "only noticed after {:?}", killed.elapsed());
            eprintln!("noticed after {:?}: {}", killed.elapsed(), chain(&error));
        }
        child.wait().expect("it has ended");
    });
    drop(acceptor);
    expect_resources(&before);
}
