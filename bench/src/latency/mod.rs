//! `latency`: how long things take that a migration does over and over.

mod args;
mod page_writes;
mod report;
mod serve;
mod source;
mod timed;

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use indicatif::HumanCount;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::say;
use pageferry_cli::transport::facts::transports;
use pageferry_report::document::{Document, Kind, median};
use pageferry_report::facts::Facts;
use pageferry_report::latency::{Interval, Latencies, Recording, What, by_kind, keep};
use pageferry_vmm::ram::Ram;
use vm_memory::{Bytes, GuestAddress};

use crate::links::Way;
use crate::random::Random;
use crate::sides::{self, NoAnswer, SideName, Sides};
use crate::words::Transport;

pub(crate) use args::{EXAMPLES, LatencyArgs, METHOD};
pub(crate) use serve::serve;
use serve::{Answer, Serve};
use source::Moved;

/// Page bytes of the memory that single pages are taken from, in turn.
const PAGES_BYTES: u64 = 64 << 20;

/// Measures, and prints the result.
pub(crate) fn run(args: &LatencyArgs) -> Result<Outcome, Failure> {
    sides::outcome(measure(args).and_then(|(document, intervals)| {
        if let Some(directory) = &args.histograms {
            keep(directory, &args.transport.to_string(), &intervals)?;
            say!("histograms are in {}", directory.display());
        }
        report::print(&document, args.json)
    }))
}

fn measure(args: &LatencyArgs) -> Result<(Document, Vec<Interval>), Failure> {
    let way = args.way();
    let facts = Facts::here(transports());
    let mut destination = Sides::start("latency")?;
    let mut intervals = Vec::new();

    say!("{way}: {} round trips of the control channel", HumanCount(args.pings.into()));
    let began = SystemTime::now();
    let latencies = with(&mut destination, way, Serve::Control { way }, |address| {
        source::control(way, address, args.pings, args.rate)
    })?;
    intervals.push(interval(What::Control, began, latencies));

    say!("{way}: {} single pages", HumanCount(args.pings.into()));
    let began = SystemTime::now();
    let ram = filled(PAGES_BYTES, args)?;
    let serving = Serve::Pages { way, memory_bytes: PAGES_BYTES, backing: args.backing };
    let latencies = with(&mut destination, way, serving, |address| {
        source::pages(way, address, &ram, args.pings, args.rate)
    })?;
    intervals.push(interval(What::Page, began, latencies));
    drop(ram);

    let (batches, recording) = migrations(args, &mut destination)?;
    intervals.extend(batches);

    let mut document = Document::new(Kind::Latency, facts);
    for (what, latencies) in by_kind(&intervals) {
        let rate = args.rate.filter(|_| matches!(what, What::Control | What::Page));
        let mut summary = latencies.summary(what, &way.to_string(), rate);
        if what == What::Batch {
            summary.recording = Some(recording);
        }
        document.latencies.push(summary);
    }
    if way.transport == Transport::Rdma {
        document.page_writes = Some(page_writes::measure(args.rdma, args.writes, args.pairs)?);
    }
    Ok((document, intervals))
}

fn interval(what: What, began: SystemTime, latencies: Latencies) -> Interval {
    Interval { what, began, took: began.elapsed().unwrap_or_default(), latencies }
}

fn filled(memory_bytes: u64, args: &LatencyArgs) -> Result<Ram, Failure> {
    const CHUNK_BYTES: usize = 1 << 20;
    let ram = Ram::allocate(&[(0, memory_bytes)], args.backing)?;
    let mut random = Random::new(1);
    let mut chunk = vec![0; CHUNK_BYTES];
    for at in (0..memory_bytes).step_by(CHUNK_BYTES) {
        let len = CHUNK_BYTES.min(usize::try_from(memory_bytes - at)?);
        random.fill(&mut chunk[..len]);
        ram.memory().write_slice(&chunk[..len], GuestAddress(at))?;
    }
    Ok(ram)
}

/// Has the destination do its part of something, and does ours.
fn with<T>(
    destination: &mut Sides<Answer>,
    way: Way,
    serving: Serve,
    here: impl FnOnce(SocketAddr) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let side = SideName::Destination;
    destination.tell(side, &serving)?;
    let address = destination.answer(side, |answer| match answer {
        Answer::Listening(address) => Some(address),
        Answer::Served => None,
    })?;
    let result = here(address);
    let served = destination.answer(side, |answer| matches!(answer, Answer::Served).then_some(()));
    match (result, served) {
        // It may know better why.
        (Err(error), Err(NoAnswer::Failed(why))) => {
            Err(format!("{way}: {}; {why}", pageferry::Chain::of(&*error)).into())
        }
        (_, Err(error)) => Err(error.into()),
        (result, Ok(())) => result,
    }
}

/// Whole migrations, with and without recording in turn.
fn migrations(
    args: &LatencyArgs,
    destination: &mut Sides<Answer>,
) -> Result<(Vec<Interval>, Recording), Failure> {
    let LatencyArgs { memory, backing, migrations, .. } = *args;
    let way = args.way();
    let ram = filled(memory, args)?;
    let mut intervals = Vec::new();
    let mut commits = Latencies::new();
    let began = SystemTime::now();
    let mut gbps = [Vec::new(), Vec::new()];
    let mut batches = 0;
    let mut transfers = Duration::ZERO;
    for number in 0..2 * u32::from(migrations) {
        // In turn, and each first as often as the other.
        let recorded = (number + number / 2).is_multiple_of(2);
        let at = SystemTime::now();
        let serving = Serve::Migration { way, memory_bytes: memory, backing };
        let Moved { batches: measured, statistics } = with(destination, way, serving, |address| {
            source::migration(args, address, &ram, recorded)
        })?;
        let bits = (statistics.pages.data * pageferry::memory::PAGE_BYTES * 8) as f64;
        let seconds = statistics.transfer.as_secs_f64();
        gbps[usize::from(recorded)].push(bits / seconds.max(1e-9) / 1e9);
        commits.record(statistics.downtime.commit);
        if let Some(measured) = measured {
            batches += measured.count();
            transfers += statistics.transfer;
            intervals.push(interval(What::Batch, at, measured));
        }
    }
    intervals.push(interval(What::Commit, began, commits));
    let [plain, recorded] = gbps.map(|figures| median(figures).unwrap_or(0.0));
    let each = source::cost_of_recording();
    let spent = each.as_secs_f64() * batches as f64;
    let recording = Recording {
        ns_each: each.as_secs_f64() * 1e9,
        share_of_transfer: spent / transfers.as_secs_f64().max(1e-9),
        plain_gbps_median: plain,
        recorded_gbps_median: recorded,
    };
    say!(
        "{way}: {migrations} migrations recorded at {recorded:.2} Gb/s, as many not at \
         {plain:.2} Gb/s"
    );
    Ok((intervals, recording))
}

/// Waits until then; the last stretch awake, since a sleep ends late.
fn wait_until(due: Instant) {
    const LATE: Duration = Duration::from_micros(200);
    while let Some(left) = due.checked_duration_since(Instant::now()) {
        match left.checked_sub(LATE) {
            Some(sleep) if !sleep.is_zero() => std::thread::sleep(sleep),
            _ => std::hint::spin_loop(),
        }
        if left.is_zero() {
            break;
        }
    }
}
