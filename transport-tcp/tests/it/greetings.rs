//! A source is who has greeted: whoever has not costs those nothing that have.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::protocol::Message;
use pageferry::testing::{data, greeting};
use pageferry::transport::stream::{FRAME_HEADER_BYTES, FrameHeader};
use pageferry::transport::{
    ControlChannel, DestinationLink, Link, LinkId, MAX_GREETING_BYTES, Returning, SourceLink,
    TransportError,
};
use pageferry_tcp::preamble::{ANSWER_BYTES, Answer, Kind, Preamble, Status};
use pageferry_tcp::{TcpAcceptor, TcpDestinationLink, TcpOptions, TcpSourceLink, connect};
use socket2::{Domain, Socket, Type};

use crate::support::memory::guest_memory;
use crate::support::{PATIENCE, log, raw};

/// A source's first word.
fn hello(description_bytes: usize) -> Vec<u8> {
    greeting(vec![7; description_bytes])
}

fn frame(message: &[u8]) -> Vec<u8> {
    [&FrameHeader::of(message).encode()[..], message].concat()
}

fn acceptor(options: TcpOptions) -> TcpAcceptor {
    TcpAcceptor::bind("127.0.0.1:0", options).unwrap()
}

/// A source that has greeted.
fn greet(acceptor: &TcpAcceptor) -> (TcpSourceLink, ControlChannel) {
    let mut source = connect(acceptor.local_addr(), TcpOptions::default()).unwrap();
    let mut control = source.control().unwrap();
    control.sender.send(&hello(0), PATIENCE).unwrap();
    (source, control)
}

/// Accepts one who has greeted, and hears the greeting.
fn accept(acceptor: &TcpAcceptor) -> (TcpDestinationLink, ControlChannel) {
    let mut link = acceptor.accept(Some(PATIENCE)).unwrap();
    let mut control = link.control().unwrap();
    assert_eq!(control.receiver.receive(Some(PATIENCE)).unwrap(), hello(0));
    (link, control)
}

/// The first attempt of a source succeeds.
fn assert_serves(acceptor: &TcpAcceptor) {
    let (source, _from) = greet(acceptor);
    let (link, mut to) = accept(acceptor);
    assert_eq!(link.link_id(), source.link_id());
    to.sender.send(b"welcome", PATIENCE).unwrap();
}

/// What a connection that was let in hears when it is turned away.
fn read_refusal(stream: &mut TcpStream) -> Answer {
    use std::io::Read;
    let mut bytes = [0; FRAME_HEADER_BYTES + ANSWER_BYTES];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[..4], [0; 4]);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "nothing follows");
    Answer::decode(bytes[FRAME_HEADER_BYTES..].try_into().unwrap()).unwrap()
}

fn assert_busy(control: &mut ControlChannel, reason: &str) {
    for _ in 0..2 {
        match control.receiver.receive(Some(PATIENCE)) {
            Err(TransportError::Refused { reason: told, .. }) => assert_eq!(told, reason),
            other => panic!("not refused: {other:?}"),
        }
    }
}

#[test]
fn who_has_not_greeted_keeps_nobody_out() {
    let acceptor = acceptor(TcpOptions { preamble_timeout: PATIENCE, ..TcpOptions::default() });
    let hello = frame(&hello(100));
    let said: [&[u8]; 4] = [b"", &hello[..2], &hello[..20], &hello[..hello.len() - 1]];
    let _strangers: Vec<_> = (0..40)
        .map(|stranger| {
            let mut stream = raw::dial(acceptor.local_addr(), Kind::Control);
            stream.write_all(said[stranger % said.len()]).unwrap();
            stream
        })
        .collect();
    assert!(matches!(
        acceptor.accept(Some(Duration::from_millis(20))),
        Err(TransportError::TimedOut { .. })
    ));
    assert_serves(&acceptor);
}

#[test]
fn nonsense_is_told_so_at_once_and_costs_nobody_else_anything() {
    let acceptor = acceptor(TcpOptions { preamble_timeout: PATIENCE, ..TcpOptions::default() });
    let other = frame(&Message::Ping { number: 1 }.encode());
    let mut magic = frame(&hello(0));
    magic[FRAME_HEADER_BYTES + 4] ^= 1;
    let with_length = |length| FrameHeader::with_length(length, &[]).encode();
    let long = with_length(u32::try_from(MAX_GREETING_BYTES + 1).unwrap());
    let mut layout = frame(&hello(0));
    layout[FRAME_HEADER_BYTES + 14 + 7 + 48 + 4] = 1;
    for (said, told) in [
        (&[0xff; 44][..], "no greeting: the header of a control frame was changed on the way"),
        (&long[..], "no greeting: field hello has length"),
        (&with_length(0), "no greeting: message ends inside"),
        (
            &other[..FRAME_HEADER_BYTES + 2],
            "no greeting: message of type 20 where a greeting is due",
        ),
        (&magic[..FRAME_HEADER_BYTES + 10], "no greeting: not a pageferry peer"),
        (&layout[..], "no greeting: memory map"),
    ] {
        let mut stream = raw::dial(acceptor.local_addr(), Kind::Control);
        stream.write_all(said).unwrap();
        let answer = read_refusal(&mut stream);
        assert_eq!(answer.status, Status::Malformed);
        assert!(answer.reason.starts_with(told), "{}", answer.reason);
        assert_serves(&acceptor);
    }
}

#[test]
fn who_is_about_to_say_who_it_is_when_nobody_is_accepted_any_more_is_told_to_come_later() {
    let acceptor = acceptor(TcpOptions { preamble_timeout: PATIENCE, ..TcpOptions::default() });
    let silent = raw::stream(acceptor.local_addr());
    let mut let_in = raw::dial(acceptor.local_addr(), Kind::Control);
    let_in.write_all(&frame(&hello(0))[..20]).unwrap();
    // Whoever is served now, these two have come and done nothing wrong.
    assert_serves(&acceptor);
    drop(acceptor);
    let why = "nobody is accepted here any more, and of";
    for answer in [raw::read_answer(&silent), read_refusal(&mut let_in)] {
        assert_eq!(answer.status, Status::Busy);
        assert!(answer.reason.starts_with(why), "{}", answer.reason);
    }
}

/// It takes longer than anybody may say nothing for.
#[test]
fn a_greeting_that_goes_on_arriving_is_heard() {
    let options = TcpOptions { preamble_timeout: Duration::from_secs(2), ..TcpOptions::default() };
    let silence = options.preamble_timeout;
    let acceptor = acceptor(options);
    let began = Instant::now();
    let mut slow = raw::dial(acceptor.local_addr(), Kind::Control);
    let hello = frame(&hello(100));
    let pause = 2 * silence / u32::try_from(hello.len()).unwrap();
    for byte in &hello {
        slow.write_all(&[*byte]).unwrap();
        thread::sleep(pause);
    }
    assert!(began.elapsed() > silence);
    let mut link = acceptor.accept(Some(PATIENCE)).unwrap();
    assert_eq!(link.link_id(), raw::ID);
    // What follows it is the link's.
    slow.write_all(&frame(b"more")).unwrap();
    let mut control = link.control().unwrap();
    assert_eq!(control.receiver.receive(Some(PATIENCE)).unwrap(), hello[FRAME_HEADER_BYTES..]);
    assert_eq!(control.receiver.receive(Some(PATIENCE)).unwrap(), b"more");
}

#[test]
fn half_a_greeting_is_given_up_and_told_so() {
    let options =
        TcpOptions { preamble_timeout: Duration::from_millis(200), ..TcpOptions::default() };
    let acceptor = acceptor(options);
    for said in [0, 50] {
        let mut half = raw::dial(acceptor.local_addr(), Kind::Control);
        half.write_all(&frame(&hello(100))[..said]).unwrap();
        let answer = read_refusal(&mut half);
        assert_eq!(answer.reason, format!("of the greeting {said} bytes came within 200ms"));
    }
}

/// They have nearly all of a greeting that is as long as one may be.
#[test]
fn greetings_that_do_not_end_have_a_bounded_share_of_memory() {
    let acceptor = acceptor(TcpOptions { preamble_timeout: PATIENCE, ..TcpOptions::default() });
    let length = u32::try_from(MAX_GREETING_BYTES).unwrap();
    let header = FrameHeader::with_length(length, &[]).encode();
    let mut said = [&header[..], &hello(64 << 10)].concat();
    said.resize(MAX_GREETING_BYTES, 0);
    let mut strangers: Vec<_> = (0..40)
        .map(|_| {
            let mut stream = raw::dial(acceptor.local_addr(), Kind::Control);
            // The first ones are turned away while the last ones come.
            let _ = stream.write_all(&said);
            stream
        })
        .collect();
    let answer = read_refusal(&mut strangers[0]);
    assert_eq!(answer.status, Status::Busy);
    assert!(
        answer.reason.starts_with("too many connect, and of the greeting "),
        "{}",
        answer.reason
    );
    assert_serves(&acceptor);
}

/// Nobody waits for what does not come any more.
#[test]
fn who_waits_when_nobody_is_accepted_any_more_is_told_to_come_later() {
    let acceptor = acceptor(TcpOptions::default());
    let (_source, _from) = greet(&acceptor);
    let (link, to) = accept(&acceptor);
    let (_waits, mut control) = greet(&acceptor);
    drop((acceptor, link, to));
    // Whether its greeting was read by then or not.
    let error = control.receiver.receive(Some(PATIENCE)).unwrap_err();
    assert!(matches!(error, TransportError::Refused { .. }), "{error}");
}

/// A data channel has no place for words: it ends. What was said on it was taken for an acknowledgement, and for the fault
/// of a destination that breaks the protocol.
#[test]
fn a_link_that_is_displaced_is_lost_on_its_data_channels_too() {
    let acceptor = acceptor(TcpOptions::default());
    let (mut source, _from) = greet(&acceptor);
    let (mut link, _to) = accept(&acceptor);
    link.expect_return(Returning::new(|_| true));
    let memory = guest_memory(&[4]);
    source.register(&memory).unwrap();
    link.register(&memory).unwrap();
    let mut senders = source.open_senders(1).unwrap();
    let _receivers = link.open_receivers(1, PATIENCE).unwrap();
    senders[0].send(&[data(0, 0, 1)]).unwrap();
    let (_back, _control) = greet(&acceptor);
    let error = loop {
        if let Err(error) = senders[0].watermarks(Some(PATIENCE)) {
            break error;
        }
    };
    assert!(matches!(error, TransportError::Lost { .. } | TransportError::Closed), "{error:?}");
}

/// As far away as it seems by the time it took to greet.
#[test]
fn who_is_far_away_keeps_its_place_until_it_can_have_answered() {
    const ROUND_TRIP: Duration = Duration::from_millis(1200);
    let acceptor = acceptor(TcpOptions::default());
    let mut far = raw::dial(acceptor.local_addr(), Kind::Control);
    thread::sleep(ROUND_TRIP);
    far.write_all(&frame(&hello(0))).unwrap();
    let (_link, mut to) = accept(&acceptor);
    to.sender.send(b"welcome", PATIENCE).unwrap();
    let (_near, mut control) = greet(&acceptor);
    // Later than who is near may answer, and long before who is so far away must have.
    thread::sleep(ROUND_TRIP * 2 / 3);
    far.write_all(&frame(b"agreed")).unwrap();
    assert_eq!(to.receiver.receive(Some(PATIENCE)).unwrap(), b"agreed");
    assert_busy(&mut control, "another migration is being served");
}

/// It was let in as early as the one that is near, and has begun to wait for an answer not much later.
#[test]
fn who_is_far_away_does_not_wait_for_longer_than_who_is_near() {
    const ROUND_TRIP: Duration = Duration::from_secs(4);
    let acceptor = acceptor(TcpOptions { preamble_timeout: PATIENCE, ..TcpOptions::default() });
    // Nobody accepts it, and so it owes nothing.
    let _holder = greet(&acceptor);
    let mut far = raw::dial(acceptor.local_addr(), Kind::Control);
    let mut near = raw::dial(acceptor.local_addr(), Kind::Control);
    near.write_all(&frame(&hello(0))).unwrap();
    thread::sleep(ROUND_TRIP);
    far.write_all(&frame(&hello(0))).unwrap();
    let mut told = [near, far].map(|mut stream| {
        assert_eq!(read_refusal(&mut stream).reason, "another migration is being served");
        Instant::now()
    });
    told.sort();
    assert!(told[1] - told[0] < ROUND_TRIP / 2, "it hears that so much later");
}

/// A connection from an address that the other tests do not have.
fn from_elsewhere(to: SocketAddr) -> TcpStream {
    const ELSEWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 77));
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((ELSEWHERE, 0)).into()).unwrap();
    socket.connect(&to.into()).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A stranger that has greeted, and says something more.
fn stranger(acceptor: &TcpAcceptor, more: &[u8]) -> TcpStream {
    let mut stream = raw::dial(acceptor.local_addr(), Kind::Control);
    stream.write_all(&[&frame(&hello(0)), more].concat()).unwrap();
    stream
}

/// Found by a flood: twenty were too many.
#[test]
fn who_comes_last_of_many_waits_and_is_served() {
    const MANY: usize = 40;
    let acceptor = acceptor(TcpOptions::default());
    let (_holder, _from) = greet(&acceptor);
    let (mut link, mut to) = accept(&acceptor);
    let _many: Vec<_> = (0..MANY).map(|_| stranger(&acceptor, b"")).collect();
    let (last, _control) = greet(&acceptor);
    for _ in 0..MANY {
        drop((link, to));
        (link, to) = accept(&acceptor);
        assert_eq!(link.link_id(), raw::ID);
    }
    drop((link, to));
    assert_eq!(accept(&acceptor).0.link_id(), last.link_id());
}

/// What they have said beyond their greeting hides nothing.
#[test]
fn strangers_that_greet_and_leave_keep_nobody_out() {
    let acceptor = acceptor(TcpOptions::default());
    let (_holder, _from) = greet(&acceptor);
    let (link, to) = accept(&acceptor);
    for _ in 0..200 {
        drop(stranger(&acceptor, b"and more"));
    }
    let (source, _control) = greet(&acceptor);
    drop((link, to));
    assert_eq!(accept(&acceptor).0.link_id(), source.link_id());
}

/// Also where IPv4 addresses are written as IPv6, all in one network.
#[test]
fn a_crowd_from_one_address_costs_who_comes_from_another_nothing() {
    const ROOM: usize = 64;
    for listening in ["127.0.0.1:0", "[::]:0"] {
        let acceptor = match TcpAcceptor::bind(listening, TcpOptions::default()) {
            Ok(acceptor) => acceptor,
            Err(error) if listening.starts_with('[') => {
                eprintln!("without IPv6: {error}");
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, acceptor.local_addr().port()));
        let greets = |id, mut stream: TcpStream| {
            stream.write_all(&Preamble { id, kind: Kind::Control }.encode()).unwrap();
            assert_eq!(raw::read_answer(&stream).status, Status::Ok);
            stream.write_all(&frame(&hello(0))).unwrap();
            stream
        };
        let holder = LinkId([1; 16]);
        let _holder = greets(holder, raw::stream(to));
        let (link, control) = accept(&acceptor);
        assert_eq!(link.link_id(), holder);
        let mut crowd: Vec<_> = (0..ROOM).map(|_| greets(raw::ID, raw::stream(to))).collect();
        let id = LinkId([77; 16]);
        let _elsewhere = greets(id, from_elsewhere(to));
        let answer = read_refusal(&mut crowd[0]);
        assert_eq!(answer.status, Status::Busy);
        assert_eq!(answer.reason, "another migration is being served, and too many wait");
        drop((link, control));
        assert_eq!(accept(&acceptor).0.link_id(), id);
    }
}

#[test]
fn strangers_have_a_bounded_share_of_the_log() {
    log::capture();
    let acceptor = acceptor(TcpOptions::default());
    let began = Instant::now();
    for _ in 0..300 {
        let mut stream = from_elsewhere(acceptor.local_addr());
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert_eq!(raw::read_answer(&stream).status, Status::Malformed);
    }
    let seconds = usize::try_from(began.elapsed().as_secs()).unwrap();
    let lines = log::count_lines(&["WARN", "127.0.0.77"]);
    assert!((1..=11 + seconds).contains(&lines), "{lines} lines");
    // The next one tells of the others.
    thread::sleep(Duration::from_secs(1));
    let mut stream = from_elsewhere(acceptor.local_addr());
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(raw::read_answer(&stream).status, Status::Malformed);
    assert!(log::has_line(&["WARN", "127.0.0.77", "left_out="]));
}
