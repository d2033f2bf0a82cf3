//! A link ends for one cause, and tells that one whatever fails for it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use pageferry::transport::stream::StreamError;
use pageferry::transport::{
    ControlChannel, ControlSender, Interrupt, Link, SourceLink, TransportError,
};
use pageferry_tcp::preamble::{ANSWER_BYTES, Answer, Kind, Status};
use pageferry_tcp::{TcpOptions, TcpSourceLink, connect};

use crate::support::memory::guest_memory;
use crate::support::{PATIENCE, acceptor, raw};

const WHY: &str = "no answer to the welcome, and another source waits";

fn frame(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_le_bytes(), bytes].concat()
}

fn refusal() -> Vec<u8> {
    let answer = Answer { status: Status::Busy, reason: WHY.to_owned() };
    [&[0; 4], &answer.encode()[..]].concat()
}

/// A source whose destination says something, and is gone.
fn told(said: &[u8]) -> (TcpSourceLink, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (link, mut destination) = std::thread::scope(|scope| {
        let source = scope.spawn(|| connect(address, TcpOptions::default()).unwrap());
        let (destination, _) = raw::welcome(&listener);
        (source.join().unwrap(), destination)
    });
    destination.write_all(said).unwrap();
    (link, destination)
}

/// Sends until that fails. The destination's kernel has to say so first.
fn fails(sender: &mut dyn ControlSender) -> TransportError {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        if let Err(error) = sender.send(b"agreed", PATIENCE) {
            return error;
        }
    }
    panic!("it does not fail");
}

fn assert_refused(error: &TransportError) {
    let TransportError::Refused { reason, .. } = error else { panic!("{error:?}") };
    assert_eq!(reason, WHY);
}

/// Found by holding up what a destination says: whose *welcome* came together with the refusal read that
/// its own link was lost.
#[test]
fn who_is_turned_away_while_it_sends_hears_why() {
    let (mut link, destination) = told(&[frame(b"welcome"), refusal()].concat());
    let mut control = link.control().unwrap();
    drop(destination);
    assert_refused(&fails(&mut *control.sender));
    assert_refused(&control.receiver.receive(Some(PATIENCE)).unwrap_err());
    assert_refused(&link.register(&guest_memory(&[1])).unwrap_err());
}

#[test]
fn who_has_read_that_it_is_turned_away_hears_so_whatever_it_calls() {
    let (mut link, _destination) = told(&[frame(b"welcome"), refusal()].concat());
    let mut control = link.control().unwrap();
    assert_eq!(control.receiver.receive(Some(PATIENCE)).unwrap(), b"welcome");
    assert_refused(&control.receiver.receive(Some(PATIENCE)).unwrap_err());
    assert_refused(&control.sender.send(b"agreed", PATIENCE).unwrap_err());
    assert_refused(&control.receiver.receive(Some(PATIENCE)).unwrap_err());
    assert_refused(&link.open_senders(1).err().unwrap());
}

/// The migration is not there any more when its data channels come.
#[test]
fn who_is_turned_away_while_it_opens_channels_hears_why() {
    let (mut link, mut destination) = told(b"");
    link.register(&guest_memory(&[1])).unwrap();
    // Nobody listens there any more.
    destination.write_all(&refusal()).unwrap();
    assert_refused(&link.open_senders(2).err().unwrap());
}

#[test]
fn what_was_said_before_a_link_broke_is_heard_also_by_who_sent_meanwhile() {
    let (mut link, destination) = told(&[frame(b"welcome"), frame(b"farewell")].concat());
    let mut control = link.control().unwrap();
    drop(destination);
    let error = fails(&mut *control.sender);
    assert!(matches!(error, TransportError::Lost { .. }), "{error:?}");
    for said in [&b"welcome"[..], b"farewell"] {
        assert_eq!(control.receiver.receive(Some(PATIENCE)).unwrap(), said);
    }
    control.receiver.receive(Some(PATIENCE)).unwrap_err();
}

/// No frame of that length comes, and the other half still carries a last word.
fn is_malformed_and_told(
    control: &mut ControlChannel,
    length: u32,
    other_side: &mut TcpStream,
    interrupter: &dyn Interrupt,
) {
    for _ in 0..2 {
        let error = control.receiver.receive(Some(PATIENCE)).unwrap_err();
        let expected = StreamError::FrameLength(length);
        assert!(matches!(error, TransportError::Malformed(why) if why == expected), "{error:?}");
    }
    control.sender.send(b"farewell", PATIENCE).unwrap();
    // As the engine does at its end.
    interrupter.interrupt();
    let mut heard = vec![0; frame(b"farewell").len()];
    other_side.read_exact(&mut heard).unwrap();
    assert_eq!(heard, frame(b"farewell"));
}

/// Found by a flood: the destination blamed a broken pipe, and the stranger heard nothing.
#[test]
fn a_destination_that_hears_frames_that_are_none_can_say_so() {
    let acceptor = acceptor(&TcpOptions::default());
    let mut stranger = raw::dial(acceptor.local_addr(), Kind::Control);
    // More of it than is read at once.
    stranger.write_all(&[frame(b"hello"), vec![0xff; 100_000]].concat()).unwrap();
    let mut link = acceptor.accept(Some(PATIENCE)).unwrap();
    let mut control = link.control().unwrap();
    assert_eq!(control.receiver.receive(Some(PATIENCE)).unwrap(), b"hello");
    is_malformed_and_told(&mut control, u32::MAX, &mut stranger, &*link.interrupter());
    drop((control, link));
    assert_eq!(stranger.read(&mut [0]).unwrap(), 0, "nothing follows");
}

#[test]
fn a_source_that_hears_frames_that_are_none_can_say_so() {
    // A length of 0 says that it is turned away, and what follows does not.
    for (length, then) in [(u32::MAX, vec![7; 100_000]), (0, vec![7; ANSWER_BYTES])] {
        let said = [frame(b"welcome"), length.to_le_bytes().to_vec(), then].concat();
        let (mut link, mut destination) = told(&said);
        let mut control = link.control().unwrap();
        assert_eq!(control.receiver.receive(Some(PATIENCE)).unwrap(), b"welcome");
        is_malformed_and_told(&mut control, length, &mut destination, &*link.interrupter());
    }
}
