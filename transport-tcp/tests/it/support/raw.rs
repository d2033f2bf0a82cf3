//! Peers made of plain sockets, which can say what no peer says.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use pageferry::transport::LinkId;
use pageferry_tcp::preamble::{ANSWER_BYTES, Answer, Kind, PREAMBLE_BYTES, Preamble, Status};

use super::PATIENCE;

pub(crate) const ID: LinkId = LinkId([42; 16]);

/// Connects, and fails instead of hanging.
pub(crate) fn stream(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

pub(crate) fn read_answer(mut stream: &TcpStream) -> Answer {
    let mut bytes = [0; ANSWER_BYTES];
    stream.read_exact(&mut bytes).unwrap();
    Answer::decode(&bytes).unwrap()
}

/// Connects as a source would; what the acceptor said to it.
pub(crate) fn try_dial(to: SocketAddr, id: LinkId, kind: Kind) -> (TcpStream, Answer) {
    let mut stream = stream(to);
    stream.write_all(&Preamble { id, kind }.encode()).unwrap();
    let answer = read_answer(&stream);
    (stream, answer)
}

/// Connects as a source would, and is let in.
pub(crate) fn dial(to: SocketAddr, kind: Kind) -> TcpStream {
    let (stream, answer) = try_dial(to, ID, kind);
    assert_eq!(answer.status, Status::Ok, "{}", answer.reason);
    stream
}

/// Accepts as a destination would, without an answer.
pub(crate) fn take(listener: &TcpListener) -> (TcpStream, Preamble) {
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut bytes = [0; PREAMBLE_BYTES];
    stream.read_exact(&mut bytes).unwrap();
    (stream, Preamble::decode(&bytes).unwrap())
}

/// Accepts as a destination would.
pub(crate) fn welcome(listener: &TcpListener) -> (TcpStream, Preamble) {
    let (mut stream, preamble) = take(listener);
    let answer = Answer { status: Status::Ok, reason: String::new() };
    stream.write_all(&answer.encode()).unwrap();
    (stream, preamble)
}
