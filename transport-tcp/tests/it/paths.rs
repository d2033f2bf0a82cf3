//! Which way connections go, and how their packets are marked.

use std::net::IpAddr;
use std::thread;

use pageferry::transport::{Admission, Link, TransportError};
use pageferry_tcp::{DataSocket, TcpAcceptor, TcpOptions, connect};
use socket2::SockRef;

use crate::support::PATIENCE;
use crate::support::memory::guest_memory;

/// A data connection's end at the source and at the destination, both by these options.
fn connection(options: &TcpOptions) -> [DataSocket; 2] {
    let there = TcpOptions { admission: Admission::Anyone, ..options.clone() };
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", there).expect("a port");
    let mut source = connect(acceptor.local_addr(), options.clone()).expect("it answers");
    let mut destination = acceptor.accept(Some(PATIENCE)).expect("a source came");
    source.register(&guest_memory(&[1])).expect("nothing to register");
    destination.register(&guest_memory(&[1])).expect("nothing to register");
    thread::scope(|scope| {
        let accepting = scope.spawn(|| destination.open_sockets(1, PATIENCE).expect("one"));
        let here = source.open_sockets(1).expect("one").remove(0);
        [here, accepting.join().expect("no panic").remove(0)]
    })
}

#[test]
fn connections_come_from_where_they_are_to() {
    let address = IpAddr::from([127, 0, 0, 5]);
    let options = TcpOptions { source_addresses: vec![address], ..TcpOptions::default() };
    let [_, there] = connection(&options);
    assert_eq!(there.peer_addr().ip(), address);
}

#[test]
fn both_ends_are_bound_to_their_interface() {
    let options = TcpOptions { interface: Some("lo".to_owned()), ..TcpOptions::default() };
    for end in connection(&options) {
        assert_eq!(SockRef::from(&end).device().expect("told").as_deref(), Some(&b"lo"[..]));
    }
}

#[test]
fn both_ends_mark_their_packets_and_control_congestion_as_they_are_to() {
    let options = TcpOptions {
        dscp: Some(10),
        // Every kernel has it.
        congestion_control: Some("reno".to_owned()),
        ..TcpOptions::default()
    };
    for end in connection(&options) {
        let socket = SockRef::from(&end);
        assert_eq!(socket.tos_v4().expect("told"), 10 << 2);
        let name = socket.tcp_congestion().expect("told");
        assert!(name.starts_with(b"reno"), "{name:?}");
    }
}

/// By whoever asks, with what it is: nobody waits for connections that cannot be set up.
#[test]
fn what_cannot_be_had_is_named() {
    let default = TcpOptions::default;
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", default()).expect("a port");
    let nowhere = || Some("nosuch0".to_owned());
    let cases = [
        (TcpOptions { interface: nowhere(), ..default() }, "interface nosuch0", true),
        (
            TcpOptions { congestion_control: nowhere(), ..default() },
            "congestion control nosuch0",
            true,
        ),
        (TcpOptions { dscp: Some(64), ..default() }, "64 is no code point", true),
        (
            TcpOptions { source_addresses: vec![IpAddr::from([203, 0, 113, 7])], ..default() },
            "from 203.0.113.7",
            false,
        ),
        (
            TcpOptions { source_addresses: vec!["::1".parse().unwrap()], ..default() },
            "an address of another kind",
            false,
        ),
    ];
    for (options, what, at_destination_too) in cases {
        let names = |error: &TransportError| {
            let text = pageferry::Chain::of(error).to_string();
            assert!(text.contains(what), "{text}");
        };
        let error = connect(acceptor.local_addr(), options.clone()).expect_err(what);
        assert!(matches!(error, TransportError::Connect { .. }), "{error:?}");
        names(&error);
        if at_destination_too {
            let error = TcpAcceptor::bind("127.0.0.1:0", options).expect_err(what);
            assert!(matches!(error, TransportError::Listen { .. }), "{error:?}");
            names(&error);
        }
    }
}
