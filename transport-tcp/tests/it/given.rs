//! Links over sockets that the host has connected.

use std::io::{ErrorKind, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use pageferry::transport::{DestinationLink, Link, SourceLink, TransportError};
use pageferry_tcp::{GivenSockets, TcpDestinationLink, TcpOptions, TcpSourceLink};
use socket2::{Domain, Socket, Type};

use crate::support::PATIENCE;
use crate::support::memory::guest_memory;

fn pairs(count: usize) -> (Vec<OwnedFd>, Vec<OwnedFd>) {
    let pair = |_| {
        let (here, there) = UnixStream::pair().expect("two sockets");
        (OwnedFd::from(here), OwnedFd::from(there))
    };
    (0..count).map(pair).unzip()
}

/// The first is for control.
fn given(mut sockets: Vec<OwnedFd>) -> GivenSockets {
    let control = sockets.remove(0);
    GivenSockets::new(control, sockets, TcpOptions::default()).expect("connected streams")
}

fn link(here: Vec<OwnedFd>, there: Vec<OwnedFd>) -> (TcpSourceLink, TcpDestinationLink) {
    let (here, there) = (given(here), given(there));
    thread::scope(|scope| {
        let destination = scope.spawn(|| there.destination().expect("a source"));
        (here.source().expect("a destination"), destination.join().expect("no panic"))
    })
}

fn refused(control: impl Into<OwnedFd>) -> std::io::Error {
    let given = GivenSockets::new(control.into(), Vec::new(), TcpOptions::default());
    match given.expect_err("it will not do") {
        TransportError::Io { cause, .. } => cause,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_no_connected_stream_is_refused() {
    let datagrams = UdpSocket::bind("127.0.0.1:0").expect("a port");
    assert_eq!(refused(datagrams).kind(), ErrorKind::InvalidInput);
    let alone = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    assert_eq!(refused(TcpStream::from(alone)).kind(), ErrorKind::NotConnected);
    let file = std::fs::File::open("/dev/null").expect("a file");
    assert_eq!(refused(file).raw_os_error(), Some(libc::ENOTSOCK));
}

#[test]
fn more_channels_than_sockets_are_refused_on_both_sides() {
    let (here, there) = pairs(2);
    let (mut source, mut destination) = link(here, there);
    source.register(&guest_memory(&[1])).expect("nothing to register");
    destination.register(&guest_memory(&[1])).expect("nothing to register");
    for error in [
        source.open_senders(2).map(drop).expect_err("one socket"),
        destination.open_receivers(2, PATIENCE).map(drop).expect_err("one socket"),
    ] {
        let text = pageferry::Chain::of(&error).to_string();
        assert!(text.contains("1 sockets are left, for 2 data channels"), "{text}");
    }
}

#[test]
fn sockets_in_another_order_are_noticed_by_both_sides() {
    let (here, mut there) = pairs(3);
    there.swap(1, 2);
    let (mut source, mut destination) = link(here, there);
    source.register(&guest_memory(&[1])).expect("nothing to register");
    destination.register(&guest_memory(&[1])).expect("nothing to register");
    thread::scope(|scope| {
        let opening = scope.spawn(|| {
            let error = destination.open_receivers(2, PATIENCE).map(drop).expect_err("swapped");
            drop(destination);
            error
        });
        let error = source.open_senders(2).map(drop).expect_err("swapped");
        let said = matches!(&error, TransportError::Refused { reason, .. } if reason.contains("another order"));
        assert!(said, "{error:?}");
        let theirs = opening.join().expect("no panic");
        assert!(matches!(theirs, TransportError::Violation(_)), "{theirs:?}");
    });
}

#[test]
fn who_says_something_else_or_nothing_is_no_source() {
    let (control, mut theirs) = UnixStream::pair().expect("two sockets");
    theirs.write_all(b"GET / HTTP/1.1\r\n").expect("room");
    let options =
        TcpOptions { preamble_timeout: Duration::from_millis(50), ..TcpOptions::default() };
    let given =
        |control: UnixStream| GivenSockets::new(control.into(), Vec::new(), options.clone());
    let error = given(control).expect("a stream").destination().map(drop).expect_err("no source");
    assert!(matches!(error, TransportError::Violation(_)), "{error:?}");

    let (control, _silent) = UnixStream::pair().expect("two sockets");
    let error = given(control).expect("a stream").destination().map(drop).expect_err("no source");
    assert!(matches!(error, TransportError::TimedOut { .. }), "{error:?}");

    let (control, gone) = UnixStream::pair().expect("two sockets");
    drop(gone);
    let error = given(control).expect("a stream").destination().map(drop).expect_err("no source");
    assert!(matches!(error, TransportError::Lost { .. }), "{error:?}");
}
