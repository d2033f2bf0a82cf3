//! A destination that is reached by several ways: some may be closed, and data channels go by all that are not.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use pageferry::transport::{Link, Received, TransportError};
use pageferry_tcp::{TcpConnector, TcpDialler, TcpOptions};
use socket2::{Domain, Socket, Type};

use crate::support::memory::{assert_same, fill, guest_memory};
use crate::support::{PATIENCE, Pair, Random, acceptor, data};

/// Another way to a destination, and how many connections have gone by it.
fn another_way(to: SocketAddr) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    thread::spawn(move || {
        for here in listener.incoming().map_while(Result::ok) {
            counted.fetch_add(1, Ordering::Relaxed);
            let there = TcpStream::connect(to).unwrap();
            for (mut from, mut to) in
                [(here.try_clone().unwrap(), there.try_clone().unwrap()), (there, here)]
            {
                // Both ends see the end of the other.
                thread::spawn(move || {
                    let _ = io::copy(&mut from, &mut to);
                    to.shutdown(std::net::Shutdown::Write)
                });
            }
        }
    });
    (address, count)
}

/// A way that is closed, for as long as this is kept: nobody else gets its port.
fn closed() -> (String, Socket) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap().to_string();
    (address, socket)
}

/// A way that is reached, and on which nobody says anything.
fn silent() -> (String, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    (listener.local_addr().unwrap().to_string(), listener)
}

/// All of memory goes over a link with four channels.
fn assert_moves(pair: &mut Pair) {
    let (here, there) = (guest_memory(&[64]), guest_memory(&[64]));
    fill(&here, &mut Random::new(1));
    let mut ends = pair.open(&here, &there, 4);
    for (sender, first_page) in ends.senders.iter_mut().zip((0..).step_by(16)) {
        sender.send(&[data(0, first_page, 16)]).unwrap();
        sender.finish().unwrap();
    }
    for receiver in &mut ends.receivers {
        assert!(matches!(receiver.receive().unwrap(), Received::Batch(_)));
    }
    assert_same(&here, &there);
}

#[test]
fn data_channels_go_by_all_ways() {
    let acceptor = acceptor(&TcpOptions::default());
    let (other, connections) = another_way(acceptor.local_addr());
    let both = format!("{}, {other}", acceptor.local_addr());
    let source = TcpDialler::new(both, TcpOptions::default()).dial().unwrap();
    assert_eq!(source.peer_addr(), acceptor.local_addr());
    let destination = acceptor.accept(Some(PATIENCE)).unwrap();
    assert_moves(&mut Pair { source, destination });
    assert_eq!(connections.load(Ordering::Relaxed), 2);
}

/// From where the connections of so many data channels come.
fn sources(options: TcpOptions, channels: u16) -> (IpAddr, Vec<IpAddr>) {
    let acceptor = acceptor(&TcpOptions::default());
    let mut source = TcpConnector::new(options).connect(acceptor.local_addr()).unwrap();
    let mut destination = acceptor.accept(Some(PATIENCE)).unwrap();
    let control = destination.peer_addr().ip();
    let (here, there) = (guest_memory(&[1]), guest_memory(&[1]));
    source.register(&here).unwrap();
    destination.register(&there).unwrap();
    let sockets = thread::scope(|scope| {
        let accepting = scope.spawn(|| destination.open_sockets(channels, PATIENCE).unwrap());
        let _here = source.open_sockets(channels).unwrap();
        accepting.join().expect("no panic")
    });
    (control, sockets.iter().map(|socket| socket.peer_addr().ip()).collect())
}

#[test]
fn data_channels_come_from_all_addresses_in_turn_and_one_that_is_gone_is_done_without() {
    let ip = |host| IpAddr::from([127, 0, 0, host]);
    let gone = IpAddr::from([203, 0, 113, 7]);
    let from = |source_addresses: &[IpAddr]| {
        let source_addresses = source_addresses.to_vec();
        sources(TcpOptions { source_addresses, ..TcpOptions::default() }, 4)
    };
    assert_eq!(from(&[ip(5), ip(6)]), (ip(5), vec![ip(5), ip(6), ip(5), ip(6)]));
    assert_eq!(from(&[ip(5), gone]), (ip(5), vec![ip(5); 4]));
    assert_eq!(from(&[gone, ip(6)]), (ip(6), vec![ip(6); 4]));
    let three = (ip(5), vec![ip(5), ip(6), ip(7), ip(5)]);
    assert_eq!(from(&[ip(5), "::1".parse().unwrap(), ip(6), ip(7)]), three);
}

/// The first of one side with the first of the other.
#[test]
fn addresses_of_both_sides_are_paired() {
    let acceptor = acceptor(&TcpOptions::default());
    let (other, connections) = another_way(acceptor.local_addr());
    let both = format!("{},{other}", acceptor.local_addr());
    let source_addresses = [5, 6].map(|host| IpAddr::from([127, 0, 0, host])).to_vec();
    let options = TcpOptions { source_addresses, ..TcpOptions::default() };
    let source = TcpDialler::new(both, options).dial().unwrap();
    let destination = acceptor.accept(Some(PATIENCE)).unwrap();
    assert_eq!(destination.peer_addr().ip(), IpAddr::from([127, 0, 0, 5]));
    assert_moves(&mut Pair { source, destination });
    assert_eq!(connections.load(Ordering::Relaxed), 2);
}

#[test]
fn a_way_that_is_closed_is_done_without() {
    let acceptor = acceptor(&TcpOptions::default());
    let open = acceptor.local_addr().to_string();
    let ((closed, _held), (silent, _silent)) = (closed(), silent());
    for ways in [
        [open.clone(), closed.clone()],
        [closed, open.clone()],
        ["no.such.host.invalid:1".into(), open.clone()],
        [open, silent],
    ] {
        let source = TcpConnector::new(TcpOptions::default()).connect_by_any(&ways).unwrap();
        let destination = acceptor.accept(Some(PATIENCE)).unwrap();
        assert_moves(&mut Pair { source, destination });
    }
}

#[test]
fn where_every_way_is_closed_the_last_one_is_named() {
    let [(first, _one), (second, _other)] = [closed(), closed()];
    let ways = [first, second];
    let error = TcpConnector::new(TcpOptions::default()).connect_by_any(&ways).unwrap_err();
    let TransportError::Connect { address, .. } = &error else { panic!("{error}") };
    assert_eq!(*address, ways[1]);
}

/// What listens there is another host's: nobody knows this migration.
#[test]
fn ways_to_two_destinations_are_refused() {
    let [here, there] = [acceptor(&TcpOptions::default()), acceptor(&TcpOptions::default())];
    let ways = [&here, &there].map(|acceptor| acceptor.local_addr().to_string());
    let source = TcpConnector::new(TcpOptions::default()).connect_by_any(&ways).unwrap();
    let destination = here.accept(Some(PATIENCE)).unwrap();
    let mut pair = Pair { source, destination };
    let memory = guest_memory(&[8]);
    pair.source.register(&memory).unwrap();
    let error = pageferry::transport::SourceLink::open_senders(&mut pair.source, 2);
    let error = error.err().expect("one of them is elsewhere");
    assert!(matches!(error, TransportError::Refused { .. }), "{error}");
}
