//! Finding each other, limits of time, and interrupts.

use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

use pageferry::transport::{DestinationLink, Link, Received, SourceLink, TransportError};
use pageferry_tcp::{TcpAcceptor, TcpConnector, TcpOptions, connect};

use crate::support::memory::guest_memory;
use crate::support::{Ends, PATIENCE, acceptor, data, interrupted, of_anyone, pair, raw, relay};

#[test]
fn nobody_there_is_a_connect_error_with_the_address() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = connect(free, TcpOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), format!("failed to connect to {free}"));
    let error = connect("no-such-host.invalid:1", TcpOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "failed to connect to no-such-host.invalid:1");
}

#[test]
fn the_next_address_is_tried() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let acceptor = acceptor(&TcpOptions::default());
    let addresses = [free, acceptor.local_addr()];
    let source = connect(&addresses[..], TcpOptions::default()).unwrap();
    assert_eq!(source.peer_addr(), acceptor.local_addr());
}

#[test]
fn a_silent_destination_is_a_connect_error_in_time() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let options =
        TcpOptions { connect_timeout: Duration::from_millis(50), ..TcpOptions::default() };
    let error = connect(listener.local_addr().unwrap(), options).unwrap_err();
    let TransportError::Connect { cause, .. } = error else { panic!("{error}") };
    assert_eq!(cause.kind(), std::io::ErrorKind::TimedOut);
}

/// A connection that is made and then held up is no refusal out of nothing: either side says what it waited
/// for, on which channel.
#[test]
fn a_data_connection_that_is_held_up_before_its_answer_says_so() {
    let (short, long) = (Duration::from_secs(2), PATIENCE);
    for (at_source, at_destination) in [(long, short), (short, long)] {
        let options = |connect_timeout, preamble_timeout| TcpOptions {
            connect_timeout,
            preamble_timeout,
            ..TcpOptions::default()
        };
        let acceptor = acceptor(&options(PATIENCE, at_destination));
        // The control connection, channel 0, and channel 1, which nothing gets through.
        let address = relay::holding(acceptor.local_addr(), 2);
        let mut source = connect(address, options(at_source, PATIENCE)).unwrap();
        let _destination = acceptor.accept(Some(PATIENCE)).unwrap();
        source.register(&guest_memory(&[1])).unwrap();
        let error = source.open_senders(2).err().expect("it is held up");
        match error {
            TransportError::Refused { reason, .. } if at_source == long => assert_eq!(
                reason,
                "data channel 1 is connected, and then: of 32 bytes of the preamble 0 came within \
                 2s"
            ),
            TransportError::Connect { cause, .. } if at_source == short => {
                assert_eq!(cause.kind(), std::io::ErrorKind::TimedOut);
                let what = "data channel 1 is connected, its preamble not answered: timed out";
                assert_eq!(cause.to_string(), what);
            }
            error => panic!("{error}"),
        }
    }
}

#[test]
fn a_port_in_use_is_a_listen_error() {
    let acceptor = acceptor(&TcpOptions::default());
    let error = TcpAcceptor::bind(acceptor.local_addr(), TcpOptions::default()).unwrap_err();
    let TransportError::Listen { address, cause } = error else { panic!("{error}") };
    assert_eq!(address, acceptor.local_addr().to_string());
    assert_eq!(cause.kind(), std::io::ErrorKind::AddrInUse);
}

#[test]
fn the_host_may_start_the_thread() {
    let acceptor =
        TcpAcceptor::bind_with("127.0.0.1:0", of_anyone(&TcpOptions::default()), |body| {
            thread::Builder::new().name("mine".to_owned()).spawn(body)
        })
        .unwrap();
    connect(acceptor.local_addr(), TcpOptions::default()).unwrap();
    let error = TcpAcceptor::bind_with("127.0.0.1:0", TcpOptions::default(), |_| {
        Err(std::io::ErrorKind::PermissionDenied.into())
    })
    .unwrap_err();
    assert_eq!(error.to_string(), "failed to start the acceptor's thread");
}

#[test]
fn interrupts_end_accept() {
    let acceptor = acceptor(&TcpOptions::default());
    let interrupter = acceptor.interrupter();
    interrupted(&*interrupter, || acceptor.accept(None));
    assert!(matches!(acceptor.accept(None), Err(TransportError::Interrupted)));
    drop(acceptor);
    interrupter.interrupt();
}

#[test]
fn interrupts_end_every_wait_of_a_destination() {
    let mut link = pair(&TcpOptions::default());
    let interrupter = link.destination.interrupter();
    link.destination.register(&guest_memory(&[1])).unwrap();
    assert!(matches!(
        link.destination.open_receivers(1, Duration::from_millis(20)),
        Err(TransportError::TimedOut { .. })
    ));
    let mut control = link.destination.control().unwrap();
    interrupted(&*interrupter, || link.destination.open_receivers(1, PATIENCE));
    assert!(matches!(control.receiver.receive(None), Err(TransportError::Interrupted)));
    assert!(matches!(control.sender.send(b"x", PATIENCE), Err(TransportError::Interrupted)));
    assert!(matches!(link.destination.control(), Err(TransportError::Interrupted)));
    drop(control);
    drop(link.destination);
    interrupter.interrupt();
}

#[test]
fn interrupts_end_a_wait_for_frames() {
    for timeout in [None, Some(PATIENCE)] {
        let mut link = pair(&TcpOptions::default());
        let mut control = link.source.control().unwrap();
        interrupted(&*link.source.interrupter(), || control.receiver.receive(timeout));
        // The other side is not interrupted, it lost its peer.
        let mut control = link.destination.control().unwrap();
        assert!(matches!(control.receiver.receive(None), Err(TransportError::Closed)));
    }
}

#[test]
fn interrupts_end_a_receiver_and_its_sender_is_lost() {
    let memory = guest_memory(&[1024]);
    let mut link = pair(&TcpOptions::default());
    let Ends { mut senders, mut receivers } = link.open(&memory, &guest_memory(&[1024]), 1);
    interrupted(&*link.destination.interrupter(), || receivers[0].receive());
    assert!(matches!(receivers[0].receive(), Err(TransportError::Interrupted)));
    let error = loop {
        if let Err(error) = senders[0].send(&[data(0, 0, 1024)]) {
            break error;
        }
    };
    assert!(matches!(error, TransportError::Lost { .. }), "{error}");
}

#[test]
fn interrupts_end_a_sender_on_a_full_socket() {
    let memory = guest_memory(&[1024]);
    let options = TcpOptions {
        send_buffer_bytes: Some(4096),
        receive_buffer_bytes: Some(4096),
        ..TcpOptions::default()
    };
    let mut link = pair(&options);
    let Ends { mut senders, mut receivers } = link.open(&memory, &guest_memory(&[1024]), 1);
    let interrupter = link.source.interrupter();
    interrupted(&*interrupter, || senders[0].send(&[data(0, 0, 1024)]));
    assert!(matches!(senders[0].watermarks(None), Err(TransportError::Interrupted)));
    assert!(matches!(senders[0].finish(), Err(TransportError::Interrupted)));
    assert!(matches!(receivers[0].receive(), Err(TransportError::Lost { .. })));
}

#[test]
fn interrupts_end_a_wait_for_watermarks() {
    let memory = guest_memory(&[1]);
    let mut link = pair(&TcpOptions::default());
    let Ends { mut senders, mut receivers } = link.open(&memory, &guest_memory(&[1]), 1);
    senders[0].send(&[data(0, 0, 1)]).unwrap();
    // Time over is no error.
    let marks = senders[0].watermarks(Some(Duration::from_millis(20))).unwrap();
    assert_eq!((marks.released, marks.landed), (1, 0));
    interrupted(&*link.source.interrupter(), || senders[0].watermarks(Some(PATIENCE)));
    // What was sent before arrives; then the channel is lost.
    assert!(matches!(receivers[0].receive(), Ok(Received::Batch(_))));
    assert!(matches!(receivers[0].receive(), Err(TransportError::Lost { .. })));
}

#[test]
fn interrupts_end_open_senders() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let source = thread::spawn(move || connect(address, TcpOptions::default()).unwrap());
    let _control = raw::welcome(&listener);
    let mut source = source.join().unwrap();
    assert!(matches!(source.open_senders(1), Err(TransportError::OutOfOrder(_))));
    source.register(&guest_memory(&[1])).unwrap();
    // Connections get no answer.
    let interrupter = source.interrupter();
    interrupted(&*interrupter, || source.open_senders(3));
    assert!(matches!(source.open_senders(3), Err(TransportError::Interrupted)));
}

fn short_listener() -> TcpListener {
    let listener =
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    listener.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(0).unwrap();
    TcpListener::from(listener)
}

/// An address that does not answer, for as long as what comes with it lives.
fn silent() -> (std::net::SocketAddr, (TcpListener, std::net::TcpStream)) {
    let listener = short_listener();
    let address = listener.local_addr().unwrap();
    // The queue has room for one.
    let fills = std::net::TcpStream::connect(address).unwrap();
    (address, (listener, fills))
}

/// A listener whose queue is full ignores further attempts: a connection that hangs in SYN_SENT.
#[test]
fn interrupts_end_a_hanging_connection_attempt() {
    let listener = short_listener();
    let address = listener.local_addr().unwrap();
    let source = thread::spawn(move || connect(address, TcpOptions::default()).unwrap());
    let _control = raw::welcome(&listener);
    let mut source = source.join().unwrap();
    source.register(&guest_memory(&[1])).unwrap();
    let interrupter = source.interrupter();
    interrupted(&*interrupter, || source.open_senders(8));
}

#[test]
fn interrupts_end_connect() {
    let (address, _held) = silent();
    let options = TcpOptions { connect_timeout: 10 * PATIENCE, ..TcpOptions::default() };
    let connector = TcpConnector::new(options);
    let interrupter = connector.interrupter();
    interrupted(&*interrupter, || connector.connect(address));
}

/// The second address of a name is tried while the first one is silent, and nothing is said to
/// those that lose.
#[test]
fn a_silent_address_does_not_hold_up_the_next() {
    let (silent, _held) = silent();
    let acceptor = acceptor(&TcpOptions::default());
    let options = TcpOptions { connect_timeout: PATIENCE, ..TcpOptions::default() };
    let began = Instant::now();
    let source = connect(&[silent, acceptor.local_addr()][..], options).unwrap();
    assert!(began.elapsed() < PATIENCE / 2, "{:?}", began.elapsed());
    assert_eq!(source.peer_addr(), acceptor.local_addr());
    assert_eq!(acceptor.accept(Some(PATIENCE)).unwrap().peer_addr().ip(), silent.ip());
}

/// A name whose addresses are all dead says the last one's error.
#[test]
fn addresses_that_refuse_are_gone_through_at_once() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let acceptor = acceptor(&TcpOptions::default());
    let options = TcpOptions::default();
    connect(&[closed, closed, acceptor.local_addr()][..], options.clone()).unwrap();
    let error = connect(&[closed, closed][..], options).unwrap_err();
    assert!(matches!(error, TransportError::Connect { .. }), "{error}");
}

/// The scope of a link-local address by name, as `ip` and other programs write it.
#[test]
fn scopes_have_names() {
    let error = TcpAcceptor::bind("[fe80::1:2:3%lo]:0", TcpOptions::default()).unwrap_err();
    // Nobody has that address, but it was understood.
    let TransportError::Listen { address, cause } = error else { panic!("{error}") };
    assert!(address.starts_with("[fe80::1:2:3%"), "{address}");
    assert_eq!(cause.kind(), std::io::ErrorKind::AddrNotAvailable, "{cause}");
}

/// A connection that timed out says so to everybody who asks, and not that the pipe is broken or
/// the other side has gone in order.
#[test]
fn what_timed_out_stays_timed_out() {
    let options =
        TcpOptions { user_timeout: Some(Duration::from_secs(1)), ..TcpOptions::default() };
    let mut link = pair(&options);
    let mut here = link.source.control().unwrap();
    let _there = link.destination.control().unwrap();
    let frame = vec![1; 1 << 20];
    // Nobody reads, and nothing makes room: the kernel gives up.
    let sent = (0..64).find_map(|_| here.sender.send(&frame, 4 * PATIENCE).err()).unwrap();
    let again = here.sender.send(&frame, PATIENCE).unwrap_err();
    let received = here.receiver.receive(Some(PATIENCE)).unwrap_err();
    for error in [sent, again, received] {
        let TransportError::Lost { cause, .. } = &error else { panic!("{error:?}") };
        assert_eq!(cause.kind(), std::io::ErrorKind::TimedOut, "{error:?}");
    }
}
