//! Peers that say more than anybody could want: a process that listens to them needs little more
//! memory than one that does not, and serves others meanwhile.

mod at_a_destination;
mod at_a_source;
mod sources;
mod strangers;

use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

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
    flooded_by(FLOODERS, flood, meanwhile)
}

fn flooded_by(
    flooders: usize,
    flood: impl Fn(&AtomicBool) -> u64 + Sync,
    meanwhile: impl FnOnce(),
) -> u64 {
    let (over, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..flooders {
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
    pour_for(FLOOD, stream, bytes, over)
}

fn pour_for(time: Duration, stream: &mut TcpStream, bytes: &[u8], over: &AtomicBool) -> u64 {
    stream.set_write_timeout(Some(Duration::from_millis(100))).expect("set a timeout");
    let until = Instant::now() + time;
    let mut sent = 0;
    while !over.load(Ordering::Relaxed) && Instant::now() < until {
        match stream.write(bytes) {
            // A part of a frame is as good as a frame: nobody has to take either.
            Ok(written) => sent += written as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
    }
    sent
}

/// A guest gets from a source to a destination that others disturb, soon, and at the first attempt.
fn assert_gets_in(source: &mut Process, address: &str) {
    let began = Instant::now();
    source.say(format!("migrate {address}"));
    let report = source.await_report();
    let took = began.elapsed();
    report.assert_departed();
    assert!(took < SOON, "after {took:?}");
}

/// What a process needs beyond `idle_bytes` is little.
fn assert_needs_little(process: &mut Process, idle_bytes: u64) {
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
                assert_needs_little(&mut destination, idle_bytes);
                thread::yield_now();
            }
            assert_gets_in(&mut source, &address);
        },
    );
    eprintln!("{} KiB went out", sent >> 10);
    source.finish().assert_status(0);
    destination.finish().report(0).assert_arrived();
}
