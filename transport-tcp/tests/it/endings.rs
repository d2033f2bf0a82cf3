//! Frames that are none end what is received, and nothing else.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use pageferry::transport::stream::{FrameHeader, StreamError};
use pageferry::transport::{ControlChannel, Interrupt, Link, TransportError};
use pageferry_tcp::preamble::{ANSWER_BYTES, Kind};
use pageferry_tcp::{TcpOptions, TcpSourceLink, connect};

use crate::support::{PATIENCE, acceptor, raw};

fn frame(bytes: &[u8]) -> Vec<u8> {
    [&FrameHeader::of(bytes).encode()[..], bytes].concat()
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
    let none = FrameHeader::with_length(u32::MAX, &[]).encode().to_vec();
    stranger.write_all(&[frame(b"hello"), none, vec![0xff; 100_000]].concat()).unwrap();
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
        let header = FrameHeader::with_length(length, &then).encode().to_vec();
        let said = [frame(b"welcome"), header, then].concat();
        let (mut link, mut destination) = told(&said);
        let mut control = link.control().unwrap();
        assert_eq!(control.receiver.receive(Some(PATIENCE)).unwrap(), b"welcome");
        is_malformed_and_told(&mut control, length, &mut destination, &*link.interrupter());
    }
}
