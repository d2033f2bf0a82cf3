//! Sources that are as good as any until they flood a destination.

use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use pageferry::memory::PageRange;
use pageferry::protocol::{FailureReason, MAX_DATA_RANGES, Message};
use pageferry::transport::stream::encode_batch;
use pageferry::transport::{MAX_BATCH_RUNS, MAX_BATCH_ZERO_PAGES, Run, RunKind};
use rustix::process::Signal;

use super::{FLOOD, SOON, assert_gets_in, assert_needs_little, pour_for};
use crate::support::peer::{Opened, frame, guest_of, hello_of, try_open, try_receive};
use crate::support::sides::{SMALL_BYTES, destination_that_stays, source_that_stays};

/// What a small guest of the tests has: all of it fits into one batch of zero pages.
const PAGES: u32 = 16 << 10;

/// What a source sends, over and over; or once, if it may not.
struct Flood {
    bytes: Vec<u8>,
    against_the_rules: bool,
}

/// Hears that it is thrown out, or is.
fn assert_thrown_out(control: &mut TcpStream) {
    control.set_read_timeout(Some(SOON)).expect("set a timeout");
    match try_receive(control) {
        Ok(Message::Failed {
            reason: FailureReason::PeerMisbehaved | FailureReason::Transport,
            ..
        }) => {}
        Err(error) if error.kind() != ErrorKind::WouldBlock => {}
        other => panic!("not thrown out: {other:?}"),
    }
}

/// Sources that are as good as any until they flood: they have the place until they break a rule or
/// leave, and then the next one has it, whatever they have left in the queues of their sockets. The
/// destination has the memory that they may write to, [`PAGES`], and little more.
fn assert_destination_stands_sources(
    more: &[&str],
    guest_bytes: u64,
    floods: &[Flood],
    way: impl Fn(&mut Opened) -> &mut TcpStream,
) {
    let (mut destination, address) = destination_that_stays(more);
    let idle_bytes = destination.peak_memory_bytes() + SMALL_BYTES;
    let mut source = source_that_stays(&["--workload=idle", "--verify"]);
    let hello = hello_of(guest_of(guest_bytes), 1);
    let (until, never) = (Instant::now() + FLOOD, AtomicBool::new(false));
    let (mut sent, mut last) = (0, None);
    for flood in floods.iter().cycle() {
        drop(last.take());
        // Gets the place of the one before, which has just left.
        let mut opened = try_open(&address, &hello).expect("it waits its turn");
        if flood.against_the_rules {
            // Once, for nothing else is to be what it is thrown out for. It may not even take it all.
            let _ = way(&mut opened).write_all(&flood.bytes);
            sent += flood.bytes.len() as u64;
            assert_thrown_out(&mut opened.control);
        } else {
            sent += pour_for(FLOOD / 8, way(&mut opened), &flood.bytes, &never);
        }
        assert_needs_little(&mut destination, idle_bytes);
        last = Some(opened);
        if Instant::now() >= until {
            break;
        }
    }
    eprintln!("{} KiB went out", sent >> 10);
    drop(last);
    assert_gets_in(&mut source, &address);
    source.finish().assert_status(0);
    let arrived = destination.await_report();
    assert_eq!((arrived.text("outcome"), arrived.text("guest_at")), ("completed", "destination"));
    assert_eq!(arrived.flag("memory_match"), Some(true), "{arrived:?}");
    // It stays for this: who has ended has no memory.
    assert_needs_little(&mut destination, idle_bytes);
    destination.await_message("the guest runs here; Ctrl-C ends it");
    destination.signal(Signal::INT);
    destination.finish().assert_status(0);
}

fn range(first_page: u32, pages: u32) -> PageRange {
    PageRange { region: 0, first_page: first_page.into(), pages }
}

fn zero_run(first_page: u32, pages: u32) -> Run {
    Run { range: range(first_page, pages), kind: RunKind::Zero }
}

/// Each batch is 128 bytes or 8 KiB, and 64 MiB to zero: a queue of a socket holds an hour of that.
/// Who comes next does not wait for it.
#[test]
fn zero_runs_at_a_destination() {
    let most = u32::try_from(MAX_BATCH_ZERO_PAGES).expect("few");
    assert_eq!(most, PAGES);
    let runs = u32::try_from(MAX_BATCH_RUNS).expect("few");
    let (each, all) = (PAGES / runs, vec![zero_run(0, PAGES)]);
    let pieces: Vec<_> = (0..runs).map(|run| zero_run(run * each, each)).collect();
    let the_same: Vec<_> = (0..runs).map(|_| zero_run(0, PAGES)).collect();
    let flood = |runs: &[Run], against_the_rules| {
        let batch = |ticket| {
            let mut batch = Vec::new();
            encode_batch(ticket, runs, false, &mut batch);
            batch
        };
        let batches = if against_the_rules { 1 } else { 2000 };
        Flood { bytes: (1..=batches).flat_map(batch).collect(), against_the_rules }
    };
    let floods = [
        flood(&all, false),
        flood(&pieces, false),
        flood(&the_same, true),
        flood(&[&all[..], &all[..]].concat(), true),
    ];
    assert_destination_stands_sources(&[], SMALL_BYTES, &floods, |opened| &mut opened.data[0]);
}

/// Each range is of one page, and there are as many as one message may have; more messages are against
/// the rules, and so are ranges over others, of which each is all memory.
#[test]
fn data_ranges_at_a_destination() {
    const ALL: u32 = 512 << 10;
    let most = u32::try_from(MAX_DATA_RANGES).expect("few");
    assert_eq!(most, PAGES);
    let flood = |of: &dyn Fn(u32) -> PageRange, times| {
        let ranges = (0..most).map(of).collect();
        let bytes = frame(&Message::DataRanges(ranges)).repeat(times);
        Flood { bytes, against_the_rules: true }
    };
    let floods = [flood(&|page| range(page, 1), 10), flood(&|_| range(0, ALL), 1)];
    assert_destination_stands_sources(
        &["--populate=2"],
        u64::from(ALL) * 4096,
        &floods,
        |opened| &mut opened.control,
    );
}
