//! A link ends for one cause, and tells that one whatever fails for it; where there is an RDMA device.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use pageferry::memory::GuestMemory;
use pageferry::testing::TestMemory;
use pageferry::transport::{ControlChannel, ControlSender, Link, SourceLink, TransportError};

use crate::strangers::{SOON, acceptor, serve};
use crate::{RdmaAcceptor, RdmaDestinationLink, RdmaSourceLink};

const WHY: &str = "no answer to the welcome, and another source waits";

fn guest_memory() -> Arc<GuestMemory> {
    Arc::clone(TestMemory::new(&[16]).memory())
}

/// The destination gives the place to another source.
fn turn_away(destination: RdmaDestinationLink, control: ControlChannel) {
    destination.workshop.state.displace();
    let ControlChannel { sender, receiver } = control;
    // Each half has a thread of its own there.
    drop(receiver);
    drop(sender);
    drop(destination);
}

/// A source that was welcomed, and a destination that has turned it away; neither was read.
fn turned_away(acceptor: &RdmaAcceptor) -> (RdmaSourceLink, ControlChannel) {
    let (mut source, mut destination) = serve(acceptor);
    let mut there = destination.control().expect("once");
    let here = source.control().expect("once");
    there.sender.send(b"welcome", SOON).expect("it goes out");
    turn_away(destination, there);
    (source, here)
}

/// Sends until that fails.
fn fails(sender: &mut dyn ControlSender) -> TransportError {
    let began = Instant::now();
    while began.elapsed() < SOON {
        if let Err(error) = sender.send(b"agreed", SOON) {
            return error;
        }
    }
    panic!("it does not fail");
}

fn assert_refused(error: &TransportError) {
    let TransportError::Refused { reason, .. } = error else { panic!("{error:?}") };
    assert_eq!(reason, WHY);
}

#[test]
fn who_is_turned_away_while_it_sends_hears_why() {
    let Some(acceptor) = acceptor() else { return };
    let (mut source, mut control) = turned_away(&acceptor);
    assert_refused(&fails(&mut *control.sender));
    assert_refused(&control.receiver.receive(Some(SOON)).unwrap_err());
    assert_refused(&source.register(&guest_memory()).unwrap_err());
    assert_refused(&source.open_senders(1).err().unwrap());
    assert_refused(&source.grant_reads().err().unwrap());
}

#[test]
fn who_has_read_that_it_is_turned_away_hears_so_whatever_it_calls() {
    let Some(acceptor) = acceptor() else { return };
    let (mut source, mut control) = turned_away(&acceptor);
    assert_eq!(control.receiver.receive(Some(SOON)).unwrap(), b"welcome");
    assert_refused(&control.receiver.receive(Some(SOON)).unwrap_err());
    assert_refused(&control.sender.send(b"agreed", SOON).unwrap_err());
    assert_refused(&control.receiver.receive(Some(SOON)).unwrap_err());
    assert_refused(&source.register(&guest_memory()).unwrap_err());
    assert_refused(&source.open_senders(1).err().unwrap());
}

/// The migration is not there any more when its data channels come, or reads.
#[test]
fn who_is_turned_away_while_it_opens_channels_hears_why() {
    let Some(acceptor) = acceptor() else { return };
    let opens: [fn(&mut RdmaSourceLink) -> Option<TransportError>; 2] =
        [|source| source.open_senders(2).err(), |source| source.grant_reads().err()];
    for open in opens {
        let (mut source, _control) = {
            let (mut source, mut destination) = serve(&acceptor);
            source.register(&guest_memory()).unwrap();
            let control = source.control().unwrap();
            let there = destination.control().unwrap();
            turn_away(destination, there);
            (source, control)
        };
        assert_refused(&open(&mut source).expect("nobody listens there any more"));
    }
}

/// One thread waits for frames and another one sends, as in a migration.
#[test]
fn who_is_turned_away_while_it_sends_and_receives_hears_why_twice() {
    let Some(acceptor) = acceptor() else { return };
    let (mut source, mut destination) = serve(&acceptor);
    let there = destination.control().unwrap();
    let ControlChannel { mut sender, mut receiver } = source.control().unwrap();
    thread::scope(|scope| {
        let receiving = scope.spawn(move || receiver.receive(None).unwrap_err());
        let sending = scope.spawn(move || fails(&mut *sender));
        turn_away(destination, there);
        for half in [receiving, sending] {
            assert_refused(&half.join().unwrap());
        }
    });
}

#[test]
fn what_was_said_before_a_link_broke_is_heard_also_by_who_sent_meanwhile() {
    let Some(acceptor) = acceptor() else { return };
    let (mut source, mut destination) = serve(&acceptor);
    let mut there = destination.control().unwrap();
    let mut here = source.control().unwrap();
    for said in [&b"welcome"[..], b"farewell"] {
        there.sender.send(said, SOON).unwrap();
    }
    // Without a last word.
    destination.interrupter().interrupt();
    drop((there, destination));
    let error = fails(&mut *here.sender);
    assert!(matches!(error, TransportError::Lost { .. }), "{error:?}");
    for said in [&b"welcome"[..], b"farewell"] {
        assert_eq!(here.receiver.receive(Some(SOON)).unwrap(), said);
    }
    here.receiver.receive(Some(SOON)).unwrap_err();
}
