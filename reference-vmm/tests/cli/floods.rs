//! Peers that say more than anybody could want: a process that listens to them needs little more
//! memory than one that does not, and serves others meanwhile.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::protocol::Message;
use pageferry_tcp::preamble::{ANSWER_BYTES, Answer, Status};

use crate::support::peer::{control_preamble, hello, listen, ok_answer, receive, take};
use crate::support::process::Process;
use crate::support::sides::{destination, source_that_stays};

/// More than a process that is idle has, at most.
const MOST_MORE_BYTES: u64 = 64 << 20;

/// How long a flood goes on before anything else happens.
const FLOOD: Duration = Duration::from_secs(2);

/// How long an honest side may take while others flood.
const SOON: Duration = Duration::from_secs(5);

/// Ends a flood when dropped, and so also when a test panics.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Floods by several threads as long as `meanwhile` takes, each connecting again whenever it is
/// thrown out. Bytes that went out.
fn flooded(flood: impl Fn(&AtomicBool) -> u64 + Sync, meanwhile: impl FnOnce()) -> u64 {
    const FLOODERS: usize = 3;
    let (over, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..FLOODERS {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    sent.fetch_add(flood(&over), Ordering::Relaxed);
                }
            });
        }
        let _stop = Stop(&over);
        meanwhile();
    });
    sent.into_inner()
}

/// Writes until the other side has had enough, or time is over.
fn pour(stream: &mut TcpStream, bytes: &[u8], over: &AtomicBool) -> u64 {
    stream.set_write_timeout(Some(Duration::from_millis(100))).expect("set a timeout");
    let until = Instant::now() + FLOOD;
    let mut sent = 0;
    while !over.load(Ordering::Relaxed) && Instant::now() < until {
        match stream.write(bytes) {
            // A part of a frame is as good as a frame: nobody has to take either.
            Ok(written) => sent += written as u64,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
    }
    sent
}

fn frame(message: &Message) -> Vec<u8> {
    let message = message.encode();
    let length = u32::try_from(message.len()).expect("a short frame").to_le_bytes();
    [&length[..], &message].concat()
}

/// A guest gets from a source to a destination that others disturb, soon.
fn assert_gets_in(source: &mut Process, address: &str) {
    let began = Instant::now();
    loop {
        source.say(format!("migrate {address}"));
        let report = source.await_report();
        let took = began.elapsed();
        assert!(took < SOON, "after {took:?}: {report:?}");
        if report.text("outcome") == "completed" {
            return report.assert_departed();
        }
    }
}

/// What a process needs beyond `idle_bytes` is little.
fn assert_needs_little(process: &Process, idle_bytes: u64) {
    let more = process.peak_memory_bytes().saturating_sub(idle_bytes);
    assert!(more < MOST_MORE_BYTES, "{} MiB more than idle", more >> 20);
}

/// A destination is flooded, and meanwhile a real guest comes.
fn assert_destination_stands(more: &[&str], flood: impl Fn(&str, &AtomicBool) -> u64 + Sync) {
    let (mut destination, address) = destination(more);
    let idle_bytes = destination.peak_memory_bytes();
    let mut source = source_that_stays(&["--workload=idle"]);
    let sent = flooded(
        |over| flood(&address, over),
        || {
            let until = Instant::now() + FLOOD;
            while Instant::now() < until && destination.lives() {
                assert_needs_little(&destination, idle_bytes);
                thread::yield_now();
            }
            assert_gets_in(&mut source, &address);
        },
    );
    eprintln!("{} KiB went out", sent >> 10);
    source.finish().assert_status(0);
    destination.finish().report(0).assert_arrived();
}

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

/// A destination that answers the greeting of a source with a flood.
#[test]
fn control_frames_at_a_source() {
    let chunk = Message::StateChunk(vec![7; 256 << 10]);
    let mut source = source_that_stays(&["--workload=idle"]);
    let idle_bytes = source.peak_memory_bytes();
    for flood in [frame(&Message::Pong { number: 1 }).repeat(10_000), frame(&chunk)] {
        let (listener, address) = listen();
        source.say(format!("migrate {address}"));
        let mut stream = take(&listener);
        stream.write_all(&ok_answer()).expect("answer");
        assert!(matches!(receive(&mut stream), Message::Hello(_)));
        pour(&mut stream, &flood, &AtomicBool::new(false));
        assert_needs_little(&source, idle_bytes);
        drop(stream);
        let report = source.await_report();
        assert_eq!((report.text("outcome"), report.text("guest_at")), ("failed", "source"));
    }
    let (mut destination, address) = destination(&[]);
    assert_gets_in(&mut source, &address);
    source.finish().assert_status(0);
    destination.finish().report(0).assert_arrived();
}
