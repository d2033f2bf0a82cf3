//! A process that has hardly any descriptors left. On its own, for the limit is the process's.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use pageferry::transport::LinkId;
use pageferry::transport::stream::FrameHeader;
use pageferry_tcp::preamble::{ANSWER_BYTES, Answer, Kind, Preamble, Status};
use pageferry_tcp::{TcpAcceptor, TcpOptions};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Socket, Type};

const SOON: Duration = Duration::from_secs(10);

/// More than there are descriptors for, and no more than the listener keeps until they are accepted.
const CROWD: usize = 40;
/// Descriptors that are left for those.
const LEFT: u64 = 8;

/// From an address of loopback, not connected yet.
fn socket(last: u8) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let from = IpAddr::V4(Ipv4Addr::new(127, 0, 0, last));
    socket.bind(&SocketAddr::from((from, 0)).into()).unwrap();
    socket
}

fn connect(socket: Socket, to: SocketAddr) -> TcpStream {
    socket.connect(&to.into()).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

fn read_answer(stream: &mut TcpStream) -> Answer {
    let mut bytes = [0; ANSWER_BYTES];
    stream.read_exact(&mut bytes).unwrap();
    Answer::decode(&bytes).unwrap()
}

fn greeting() -> Vec<u8> {
    let hello = pageferry::testing::greeting(Vec::new());
    [&FrameHeader::of(&hello).encode()[..], &hello].concat()
}

/// A crowd has them all, whether it has greeted or not: who comes from another address gets in.
#[test]
fn who_has_least_claim_gives_its_descriptor_to_who_comes() {
    let id = |last| LinkId([last; 16]);
    for says in ["nothing", "a preamble", "a greeting"] {
        let options = TcpOptions { preamble_timeout: 3 * SOON, ..TcpOptions::default() };
        let acceptor = TcpAcceptor::bind("127.0.0.1:0", options).unwrap();
        let to = acceptor.local_addr();
        let crowd: Vec<_> = (0..CROWD).map(|_| socket(3)).collect();
        let source = socket(1);
        let limit = getrlimit(Resource::Nofile);
        let used = u64::try_from(source.as_raw_fd()).unwrap() + 1;
        let current = Some(used + LEFT);
        setrlimit(Resource::Nofile, Rlimit { current, ..limit }).unwrap();

        let mut crowd: Vec<_> = crowd.into_iter().map(|socket| connect(socket, to)).collect();
        for stranger in &mut crowd {
            let preamble = Preamble { id: id(3), kind: Kind::Control }.encode();
            let said = match says {
                "nothing" => Vec::new(),
                "a preamble" => preamble.to_vec(),
                _ => [&preamble[..], &greeting()].concat(),
            };
            // The first ones are turned away while the last ones come.
            let _ = stranger.write_all(&said);
        }
        let mut source = connect(source, to);
        source.write_all(&Preamble { id: id(1), kind: Kind::Control }.encode()).unwrap();
        assert_eq!(read_answer(&mut source).status, Status::Ok, "a crowd that says {says}");
        source.write_all(&greeting()).unwrap();
        // One of the crowd may have its place before.
        let next = || acceptor.accept(Some(SOON)).unwrap().link_id();
        let mut before = 0;
        while next() != id(1) {
            before += 1;
        }
        assert!(before == 0 || says == "a greeting" && before < LEFT, "{before} of them");
        if says == "nothing" {
            let told = read_answer(&mut crowd[0]);
            assert_eq!(told.status, Status::Busy, "it has done nothing wrong");
            assert_eq!(told.reason, "too many connect, and of 32 bytes of the preamble 0 came");
        }
        setrlimit(Resource::Nofile, limit).unwrap();
    }
}
