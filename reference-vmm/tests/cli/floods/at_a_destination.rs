//! Connections that a destination lets in, or is still to let in, and that flood it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pageferry::protocol::Message;
use pageferry_tcp::preamble::{ANSWER_BYTES, Answer, Status};

use super::{assert_destination_stands, pour};
use crate::support::peer::{control_preamble, frame, hello};

/// Connects as a source; `None` if it is turned away, or the destination is gone.
fn try_let_in(address: &str) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
    stream.write_all(&control_preamble()).ok()?;
    let mut answer = [0; ANSWER_BYTES];
    stream.read_exact(&mut answer).ok()?;
    let answer = Answer::decode(&answer).ok()?;
    (answer.status == Status::Ok).then_some(stream)
}

#[test]
fn control_frames_at_a_destination() {
    let hello = frame(&hello(2));
    let chunk = frame(&Message::StateChunk(vec![7; 256 << 10]));
    assert_destination_stands(&[], |address, over| {
        let Some(mut stream) = try_let_in(address) else { return 0 };
        let greeted = stream.write_all(&hello).is_ok();
        if greeted { pour(&mut stream, &chunk, over) } else { 0 }
    });
}

#[test]
fn small_control_frames_at_a_destination() {
    let hello = frame(&hello(2));
    let pings = frame(&Message::Ping { number: 1 }).repeat(10_000);
    assert_destination_stands(&[], |address, over| {
        let Some(mut stream) = try_let_in(address) else { return 0 };
        let greeted = stream.write_all(&hello).is_ok();
        if greeted { pour(&mut stream, &pings, over) } else { 0 }
    });
}

#[test]
fn half_open_connections_at_a_destination() {
    assert_destination_stands(&[], |address, over| {
        let (mut held, mut opened) = (Vec::new(), 0);
        while !over.load(Ordering::Relaxed) {
            let Ok(mut stream) = TcpStream::connect(address) else { break };
            opened += 1;
            // Nothing, half a preamble, or a whole one and nothing more.
            let preamble = control_preamble();
            let said = stream.write_all(&preamble[..[0, 16, 32][opened % 3]]);
            if said.is_ok() {
                held.push(stream);
            }
            if held.len() > 100 {
                held.remove(0);
            }
        }
        opened as u64
    });
}
