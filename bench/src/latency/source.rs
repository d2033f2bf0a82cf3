//! The source's part: it measures.

use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;
use pageferry::dirty::{DirtySource, DirtySources};
use pageferry::memory::PageRange;
use pageferry::testing::IdleMachine;
use pageferry::transport::{OneLink, Run, RunKind};
use pageferry::{Source, Statistics};
use pageferry_cli::outcome::Failure;
use pageferry_cli::transport::ZeroCopyChoice;
use pageferry_report::latency::{Latencies, Pacer};
use pageferry_rust_vmm::guest_memory;
use pageferry_vmm::ram::Ram;

use super::args::LatencyArgs;
use super::timed::{Rearms, timed};
use super::wait_until;
use crate::links::{Way, connect};

/// For what answers at once where all is well.
const PATIENCE: Duration = Duration::from_secs(60);
/// As long as the shorter ones of the engine's control messages.
const FRAME_BYTES: usize = 16;

/// Does something so often, one after the other or at a rate, and measures each.
fn times(
    count: u32,
    rate: Option<u32>,
    mut once: impl FnMut(u32) -> Result<(), Failure>,
) -> Result<Latencies, Failure> {
    let mut latencies = Latencies::new();
    let mut pacer = rate.map(|rate| Pacer::new(Instant::now(), rate));
    for number in 0..count {
        let due = pacer.as_mut().map_or_else(Instant::now, Pacer::next_due);
        wait_until(due);
        once(number)?;
        latencies.record(due.elapsed());
    }
    Ok(latencies)
}

/// Round trips of control frames.
pub(super) fn control(
    way: Way,
    address: SocketAddr,
    count: u32,
    rate: Option<u32>,
) -> Result<Latencies, Failure> {
    let mut link = connect(way, ZeroCopyChoice::Auto, address)?;
    let mut control = link.control()?;
    let mut frame = [0; FRAME_BYTES];
    times(count, rate, |number| {
        frame[..4].copy_from_slice(&number.to_le_bytes());
        control.sender.send(&frame, PATIENCE)?;
        let echo = control.receiver.receive(Some(PATIENCE))?;
        if echo == frame { Ok(()) } else { Err("the destination answered nonsense".into()) }
    })
}

/// Single pages, each sent when the one before it has landed.
pub(super) fn pages(
    way: Way,
    address: SocketAddr,
    ram: &Ram,
    count: u32,
    rate: Option<u32>,
) -> Result<Latencies, Failure> {
    let memory = Arc::new(guest_memory(Arc::clone(ram.memory()))?);
    let pages = memory.layout().pages();
    let mut link = connect(way, ZeroCopyChoice::Auto, address)?;
    link.register(&memory)?;
    let mut senders = link.open_senders(1)?;
    let sender = &mut senders[0];
    let latencies = times(count, rate, |number| {
        let range = PageRange { region: 0, first_page: u64::from(number) % pages, pages: 1 };
        let ticket = sender.send(&[Run { range, kind: RunKind::Data }])?;
        let sent = Instant::now();
        while sender.watermarks(Some(PATIENCE))?.landed < ticket {
            if sent.elapsed() >= PATIENCE {
                return Err("a page did not land".into());
            }
        }
        Ok(())
    })?;
    sender.finish()?;
    Ok(latencies)
}

/// What came of a migration.
#[derive(Debug)]
pub(super) struct Moved {
    /// If they were recorded.
    pub(super) batches: Option<Latencies>,
    pub(super) statistics: Statistics,
}

/// A migration of memory that nobody writes to.
pub(super) fn migration(
    args: &LatencyArgs,
    address: SocketAddr,
    ram: &Ram,
    recorded: bool,
) -> Result<Moved, Failure> {
    let memory = Arc::new(guest_memory(Arc::clone(ram.memory()))?);
    let mut link = connect(args.way(), ZeroCopyChoice::Auto, address)?;
    let mut trackers: Vec<Box<dyn DirtySource>> = Vec::new();
    let (done, measured) = unbounded();
    if recorded {
        trackers.push(Box::new(Rearms));
        link = Box::new(timed(link, done));
    } else {
        drop(done);
    }
    let departed = Source::new()
        .channels(args.channels)
        .migrate(IdleMachine, &memory, DirtySources::new(trackers), OneLink::source(link))
        .map_err(|failure| failure.error)?;
    // Threads have ended, so each has handed over what it measured.
    let batches = recorded.then(|| {
        let mut all = Latencies::new();
        measured.try_iter().for_each(|one: Latencies| all.add(&one));
        all
    });
    Ok(Moved { batches, statistics: departed.statistics })
}

/// What recording costs a sender for each batch: looking at the clock twice, and the histogram.
pub(super) fn cost_of_recording() -> Duration {
    const TIMES: u32 = 100_000;
    let mut latencies = Latencies::new();
    let began = Instant::now();
    for number in 0..TIMES {
        let rearmed = black_box(Instant::now());
        // Of various sizes, as those of batches are.
        let shift = Duration::from_nanos(u64::from(number) * 997 % 10_000_000);
        latencies.record(black_box(rearmed.elapsed() + shift));
    }
    black_box(latencies.count());
    began.elapsed() / TIMES
}
