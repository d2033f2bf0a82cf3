//! Who connects to the port and is no peer, or not one for now, disturbs nobody.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use pageferry::transport::{DestinationLink, Link, LinkId, SourceLink, TransportError};
use pageferry_tcp::preamble::{Kind, PREAMBLE_BYTES, Preamble, Status};
use pageferry_tcp::{MAX_CHANNELS, TcpAcceptor, TcpOptions, connect};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::support::memory::guest_memory;
use crate::support::{PATIENCE, acceptor, log, raw};

/// A migration gets through to its control channel.
fn assert_serves(acceptor: &TcpAcceptor) {
    let mut source = connect(acceptor.local_addr(), TcpOptions::default()).unwrap();
    let mut destination = acceptor.accept(Some(PATIENCE)).unwrap();
    assert_eq!(source.link_id(), destination.link_id());
    source.control().unwrap().sender.send(b"hello", PATIENCE).unwrap();
    let mut control = destination.control().unwrap();
    assert_eq!(control.receiver.receive(Some(PATIENCE)).unwrap(), b"hello");
}

/// Reads until the acceptor hangs up.
fn rest_of(mut stream: TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    rest
}

/// The acceptor may still be writing a line when its socket is closed already.
fn assert_logged(parts: &[&str]) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !log::has_line(parts) {
        assert!(std::time::Instant::now() < deadline, "nothing was logged with {parts:?}");
        thread::yield_now();
    }
}

#[test]
fn garbage_is_refused_at_once_and_logged() {
    log::capture();
    let acceptor = acceptor(&TcpOptions::default());
    for garbage in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0xff; 10_000], b"P?"] {
        let mut stream = raw::stream(acceptor.local_addr());
        let address = stream.local_addr().unwrap().to_string();
        stream.write_all(garbage).unwrap();
        let answer = raw::read_answer(&stream);
        assert_eq!(answer.status, Status::Malformed);
        assert!(answer.reason.contains("no pageferry"), "{}", answer.reason);
        assert_logged(&["WARN", &address, "no pageferry"]);
        assert_serves(&acceptor);
    }
}

#[test]
fn silent_and_slow_clients_are_closed_and_block_nobody() {
    log::capture();
    let options =
        TcpOptions { preamble_timeout: Duration::from_millis(200), ..TcpOptions::default() };
    let acceptor = acceptor(&options);
    let silent = raw::stream(acceptor.local_addr());
    let mut slow = raw::stream(acceptor.local_addr());
    slow.write_all(b"PFTCP").unwrap();
    let gone = raw::stream(acceptor.local_addr());
    let addresses = [&silent, &slow, &gone].map(|s| s.local_addr().unwrap().to_string());
    drop(gone);
    assert_serves(&acceptor);
    for stream in [silent, slow] {
        assert_eq!(raw::read_answer(&stream).status, Status::Malformed);
        assert!(rest_of(stream).is_empty());
    }
    for (address, why) in
        addresses.iter().zip(["preamble 0 came within", "preamble 5 came within", "it ended"])
    {
        assert_logged(&["WARN", address, why]);
    }
    assert_serves(&acceptor);
}

#[test]
fn many_silent_clients_lock_nobody_out() {
    let limits = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, ..limits }).unwrap();
    let options = TcpOptions { preamble_timeout: PATIENCE, ..TcpOptions::default() };
    let acceptor = acceptor(&options);
    let crowd: Vec<_> = (0..600).map(|_| raw::stream(acceptor.local_addr())).collect();
    assert_serves(&acceptor);
    // The first ones had to go for the last, each for one of them.
    for first in &crowd[..600 - 512] {
        let answer = raw::read_answer(first);
        assert_eq!(answer.status, Status::Busy, "it has done nothing wrong");
        assert_eq!(answer.reason, "too many connect, and of 32 bytes of the preamble 0 came");
    }
}

#[test]
fn another_version_is_told_so_however_long_its_preamble() {
    let acceptor = acceptor(&TcpOptions::default());
    let preamble = Preamble { id: raw::ID, kind: Kind::Control }.encode();
    for length in [10, PREAMBLE_BYTES, 5_000] {
        let mut bytes = preamble.to_vec();
        bytes[8] = 2;
        bytes.resize(length, 7);
        let mut stream = raw::stream(acceptor.local_addr());
        stream.write_all(&bytes).unwrap();
        let answer = raw::read_answer(&stream);
        assert_eq!(answer.status, Status::Version);
        assert_eq!(answer.reason, "preamble version 2 is not supported, only 1 is");
        drop(stream);
        assert_serves(&acceptor);
    }
}

#[test]
fn a_second_source_is_told_to_come_later() {
    let acceptor = acceptor(&TcpOptions::default());
    let mut source = connect(acceptor.local_addr(), TcpOptions::default()).unwrap();
    let mut control = source.control().unwrap();
    control.sender.send(b"hello", PATIENCE).unwrap();
    let assert_busy = || {
        let error = connect(acceptor.local_addr(), TcpOptions::default()).unwrap_err();
        let TransportError::Refused { address, reason } = error else { panic!("{error}") };
        assert_eq!(address, acceptor.local_addr().to_string());
        assert_eq!(reason, "another migration is being served");
    };
    // Before it is accepted, while it is served, and while its source is gone already.
    assert_busy();
    let mut destination = acceptor.accept(Some(PATIENCE)).unwrap();
    destination.control().unwrap().receiver.receive(Some(PATIENCE)).unwrap();
    assert_busy();
    assert!(matches!(
        acceptor.accept(Some(Duration::from_millis(20))),
        Err(TransportError::TimedOut { .. })
    ));
    drop((control, source));
    assert_busy();
    drop(destination);
    assert_serves(&acceptor);
}

/// Found by a flood: a source that had its place taken as it was accepted ended a `receive` as if somebody
/// had interrupted it.
#[test]
fn sources_that_come_and_go_end_their_links_and_not_the_acceptor() {
    const SOURCES: usize = 4;
    const TIMES: usize = 300;
    let acceptor = acceptor(&TcpOptions::default());
    let (left, failed) = (AtomicUsize::new(SOURCES), AtomicBool::new(false));
    let (mut accepted, mut error) = (0, None);
    thread::scope(|scope| {
        for _ in 0..SOURCES {
            scope.spawn(|| {
                for _ in (0..TIMES).take_while(|_| !failed.load(Ordering::Relaxed)) {
                    // May be told that another one is being served.
                    if let Ok(mut source) = connect(acceptor.local_addr(), TcpOptions::default()) {
                        let _ = source.control().unwrap().sender.send(b"hello", PATIENCE);
                    }
                }
                if left.fetch_sub(1, Ordering::SeqCst) == 1 {
                    acceptor.interrupter().interrupt();
                }
            });
        }
        while left.load(Ordering::SeqCst) > 0 {
            match acceptor.accept(Some(PATIENCE)) {
                Ok(_) => accepted += 1,
                Err(TransportError::Interrupted) if left.load(Ordering::SeqCst) == 0 => {}
                Err(other) => {
                    failed.store(true, Ordering::Relaxed);
                    error = Some(other);
                    break;
                }
            }
        }
    });
    assert!(error.is_none(), "after {accepted} sources: {error:?}");
    assert!(accepted > 0);
}

#[test]
fn a_source_that_comes_while_one_is_served_waits_its_turn() {
    let acceptor = acceptor(&TcpOptions::default());
    let mut first = connect(acceptor.local_addr(), TcpOptions::default()).unwrap();
    let mut control = first.control().unwrap();
    control.sender.send(b"hello", PATIENCE).unwrap();
    let mut link = acceptor.accept(Some(PATIENCE)).unwrap();
    link.control().unwrap().receiver.receive(Some(PATIENCE)).unwrap();
    let mut second = raw::stream(acceptor.local_addr());
    second.write_all(&Preamble { id: raw::ID, kind: Kind::Control }.encode()).unwrap();
    // The acceptor answers one after the other: by now it has looked at the second.
    let mut garbage = raw::stream(acceptor.local_addr());
    garbage.write_all(b"GET /").unwrap();
    assert_eq!(raw::read_answer(&garbage).status, Status::Malformed);
    drop(link);
    assert_eq!(raw::read_answer(&second).status, Status::Ok);
}

#[test]
fn a_source_that_gave_up_before_it_was_accepted_is_forgotten() {
    let acceptor = acceptor(&TcpOptions::default());
    drop(connect(acceptor.local_addr(), TcpOptions::default()).unwrap());
    assert_serves(&acceptor);
    drop(connect(acceptor.local_addr(), TcpOptions::default()).unwrap());
    assert!(matches!(
        acceptor.accept(Some(Duration::from_millis(20))),
        Err(TransportError::TimedOut { .. })
    ));
    assert_serves(&acceptor);
}

#[test]
fn data_connections_must_name_the_migration_and_a_free_channel() {
    let acceptor = acceptor(&TcpOptions::default());
    let address = acceptor.local_addr();
    let data = |channel| Kind::Data { channel };
    let status = |id, kind| raw::try_dial(address, id, kind).1.status;

    assert_eq!(status(raw::ID, data(0)), Status::UnknownMigration);
    let _control = raw::dial(address, Kind::Control);
    let mut link = acceptor.accept(Some(PATIENCE)).unwrap();
    assert_eq!(status(LinkId([1; 16]), data(0)), Status::UnknownMigration);
    assert_eq!(status(raw::ID, data(MAX_CHANNELS)), Status::ChannelOutOfRange);

    // Out of order, and one too many.
    let _second = raw::dial(address, data(1));
    let fifth = raw::dial(address, data(5));
    let _first = raw::dial(address, data(0));
    assert_eq!(status(raw::ID, data(1)), Status::ChannelTaken);
    assert!(matches!(
        link.open_receivers(2, PATIENCE),
        Err(TransportError::OutOfOrder("guest memory is not registered"))
    ));
    link.register(&guest_memory(&[1])).unwrap();
    assert!(matches!(
        link.open_receivers(MAX_CHANNELS + 1, PATIENCE),
        Err(TransportError::TooLarge { .. })
    ));
    assert_eq!(link.open_receivers(2, PATIENCE).unwrap().len(), 2);
    assert!(rest_of(fifth).is_empty());
    assert_eq!(status(raw::ID, data(1)), Status::ChannelTaken);
    assert_eq!(status(raw::ID, data(2)), Status::ChannelOutOfRange);
    assert!(matches!(link.open_receivers(2, PATIENCE), Err(TransportError::OutOfOrder(_))));

    drop(link);
    assert_eq!(status(raw::ID, data(0)), Status::UnknownMigration);
    assert_serves(&acceptor);
}

#[test]
fn a_listener_that_is_no_destination_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    for (speech, cause_says) in [(&[b'x'; 200][..], "no pageferry transport"), (b"SSH-2.0", "")] {
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = raw::take(&listener);
                stream.write_all(speech).unwrap();
            });
            let error = connect(address, TcpOptions::default()).unwrap_err();
            let TransportError::Connect { address: named, cause } = error else {
                panic!("{error}")
            };
            assert_eq!(named, address.to_string());
            assert!(cause.to_string().contains(cause_says), "{cause}");
        });
    }
}

#[test]
fn a_link_outlives_its_acceptor() {
    let acceptor = acceptor(&TcpOptions::default());
    let address = acceptor.local_addr();
    let mut source = connect(address, TcpOptions::default()).unwrap();
    let mut destination = acceptor.accept(Some(PATIENCE)).unwrap();
    drop(acceptor);
    let memory = guest_memory(&[1]);
    source.register(&memory).unwrap();
    destination.register(&Arc::clone(&memory)).unwrap();
    assert_eq!(source.open_senders(2).unwrap().len(), 2);
    assert_eq!(destination.open_receivers(2, PATIENCE).unwrap().len(), 2);
    drop(destination);
    // With the link the port is free: nobody listens, and it can be bound at once.
    let error = connect(address, TcpOptions::default()).unwrap_err();
    assert!(matches!(error, TransportError::Connect { .. }), "{error}");
    TcpAcceptor::bind(address, TcpOptions::default()).unwrap();
}
