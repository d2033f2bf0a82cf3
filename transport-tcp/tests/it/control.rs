//! The control channel keeps frames whole.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

use pageferry::transport::stream::{FRAME_HEADER_BYTES, FrameHeader, StreamError};
use pageferry::transport::{ControlReceiver, Link, MAX_FRAME_BYTES, TransportError};
use pageferry_tcp::preamble::Kind;
use pageferry_tcp::{TcpDestinationLink, TcpOptions};

use crate::support::{PATIENCE, Random, acceptor, pair, raw};

const SHORT: Option<Duration> = Some(Duration::from_millis(20));

/// A control channel whose other side is a plain socket.
fn with_raw_source() -> (TcpStream, TcpDestinationLink, Box<dyn ControlReceiver>) {
    let acceptor = acceptor(&TcpOptions::default());
    let stream = raw::dial(acceptor.local_addr(), Kind::Control);
    let mut link = acceptor.accept(Some(PATIENCE)).unwrap();
    assert_eq!(link.link_id(), raw::ID);
    let receiver = link.control().unwrap().receiver;
    (stream, link, receiver)
}

#[test]
fn frames_of_all_lengths_pass_both_ways() {
    let mut random = Random::seeded("frames");
    let mut link = pair(&TcpOptions::default());
    let mut here = link.source.control().unwrap();
    let mut there = link.destination.control().unwrap();
    for length in [1, 2, 5, 4096, 100_000, MAX_FRAME_BYTES - 1, MAX_FRAME_BYTES] {
        let frame: Vec<u8> = (0..length).map(|_| random.next_u64().to_le_bytes()[3]).collect();
        thread::scope(|scope| {
            scope.spawn(|| here.sender.send(&frame, PATIENCE).unwrap());
            scope.spawn(|| there.sender.send(&frame, PATIENCE).unwrap());
            assert!(there.receiver.receive(Some(PATIENCE)).unwrap() == frame);
            assert!(here.receiver.receive(None).unwrap() == frame);
        });
    }
    assert!(matches!(
        here.sender.send(&vec![0; MAX_FRAME_BYTES + 1], PATIENCE),
        Err(TransportError::TooLarge { .. })
    ));
    assert!(matches!(here.sender.send(&[], PATIENCE), Err(TransportError::Io { .. })));
    // Both refusals left the channel whole.
    here.sender.send(b"last", PATIENCE).unwrap();
    assert_eq!(there.receiver.receive(Some(PATIENCE)).unwrap(), b"last");
    assert!(matches!(
        there.receiver.receive(Some(Duration::ZERO)),
        Err(TransportError::TimedOut { .. })
    ));
    assert!(matches!(link.source.control(), Err(TransportError::OutOfOrder(_))));
    assert!(matches!(link.destination.control(), Err(TransportError::OutOfOrder(_))));
}

#[test]
fn a_timeout_in_the_middle_of_a_frame_loses_nothing() {
    let (mut stream, _link, mut receiver) = with_raw_source();
    let frame = b"a frame in many pieces";
    let bytes = [&FrameHeader::of(frame).encode()[..], frame].concat();
    for piece in bytes.chunks(3) {
        let error = receiver.receive(SHORT).unwrap_err();
        assert!(matches!(error, TransportError::TimedOut { .. }), "{error}");
        stream.write_all(piece).unwrap();
    }
    // And the next frame behind it.
    stream.write_all(&[&FrameHeader::of(b"!").encode()[..], b"!"].concat()).unwrap();
    assert_eq!(receiver.receive(Some(PATIENCE)).unwrap(), frame);
    assert_eq!(receiver.receive(Some(PATIENCE)).unwrap(), b"!");
}

#[test]
fn an_end_between_frames_is_closed_and_within_one_is_lost() {
    let (mut stream, _link, mut receiver) = with_raw_source();
    let whole = [&FrameHeader::of(b"ok").encode()[..], b"ok"].concat();
    stream.write_all(&whole).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(receiver.receive(None).unwrap(), b"ok");
    assert!(matches!(receiver.receive(Some(PATIENCE)), Err(TransportError::Closed)));
    assert!(matches!(receiver.receive(None), Err(TransportError::Closed)));

    for cut_short in [&whole[..2], &whole[..FRAME_HEADER_BYTES], &whole[..whole.len() - 1]] {
        let (mut stream, _link, mut receiver) = with_raw_source();
        stream.write_all(cut_short).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let error = receiver.receive(Some(PATIENCE)).unwrap_err();
        assert!(matches!(error, TransportError::Lost { .. }), "{error}");
    }
}

#[test]
fn dropping_a_half_or_a_link_closes_in_order() {
    let mut link = pair(&TcpOptions::default());
    let here = link.source.control().unwrap();
    let mut there = link.destination.control().unwrap();
    drop(here.sender);
    assert!(matches!(there.receiver.receive(Some(PATIENCE)), Err(TransportError::Closed)));
    // The other direction still works.
    let mut receiver = here.receiver;
    there.sender.send(b"still", PATIENCE).unwrap();
    assert_eq!(receiver.receive(Some(PATIENCE)).unwrap(), b"still");
    drop(there);
    drop(link.destination);
    assert!(matches!(receiver.receive(Some(PATIENCE)), Err(TransportError::Closed)));
}

#[test]
fn forbidden_lengths_are_malformed_for_good() {
    for length in [0, u32::try_from(MAX_FRAME_BYTES).unwrap() + 1, u32::MAX] {
        let (mut stream, _link, mut receiver) = with_raw_source();
        stream.write_all(&FrameHeader::with_length(length, b"x").encode()).unwrap();
        stream.write_all(&[&FrameHeader::of(b"x").encode()[..], b"x"].concat()).unwrap();
        for _ in 0..2 {
            let error = receiver.receive(Some(PATIENCE)).unwrap_err();
            assert!(
                matches!(error, TransportError::Malformed(StreamError::FrameLength(l)) if l == length),
                "{error}"
            );
        }
    }
}

/// Whichever bit it is: the link is lost then, and not the peer to blame.
#[test]
fn a_frame_that_is_changed_on_the_way_ends_its_link_and_nothing_of_it_is_heard() {
    let whole = [&FrameHeader::of(b"commit").encode()[..], b"commit"].concat();
    for bit in 0..whole.len() * 8 {
        let (mut stream, _link, mut receiver) = with_raw_source();
        let mut changed = whole.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        stream.write_all(&[changed, whole.clone()].concat()).unwrap();
        for _ in 0..2 {
            let error = receiver.receive(Some(PATIENCE)).unwrap_err();
            assert!(matches!(error, TransportError::Lost { .. }), "bit {bit}: {error:?}");
        }
    }
}
