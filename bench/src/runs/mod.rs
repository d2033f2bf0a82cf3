//! `runs`: what runs of each length cost their source, by io_uring, copied by the kernel and not.

mod args;

use std::sync::Arc;
use std::time::{Duration, Instant};

use comfy_table::{Cell, CellAlignment};
use indicatif::HumanBytes;
use pageferry::memory::{GuestMemory, PAGE_BYTES, PageRange};
use pageferry::transport::{
    Admission, DestinationLink, Link, PageSender, Received, Run, RunKind, SourceLink,
    TransportError, ZeroCopyCounts,
};
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::say;
use pageferry_iouring::{IoUringOptions, Rings, ZeroCopy};
use pageferry_rust_vmm::guest_memory;
use pageferry_tcp::{Security, TcpAcceptor, TcpOptions, TcpSourceLink, connect};
use pageferry_vmm::ram::{Backing, Ram};
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress};

use crate::output::{self, SCHEMA, median};
use crate::random::Random;
use crate::usage::process_cpu_nanoseconds;

pub(crate) use args::{METHOD, RunsArgs};

/// On either side. Runs are taken from it in turn.
const MEMORY_BYTES: u64 = 64 << 20;
/// As many as a batch may have, of either.
const BATCH_RUNS: usize = 512;
const BATCH_BYTES: u64 = 4 << 20;
/// For what answers at once where all is well.
const PATIENCE: Duration = Duration::from_secs(60);

/// How pages are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Way {
    /// The kernel copies them.
    Copied,
    /// Zero-copy, pinned for each send. Where it does not pay only the first ones are.
    Pinned,
    /// Zero-copy from registered buffers, also where the kernel copies after all.
    Registered,
}

impl Way {
    const ALL: [Self; 3] = [Self::Copied, Self::Pinned, Self::Registered];

    fn options(self) -> IoUringOptions {
        let zero_copy = match self {
            Self::Copied => ZeroCopy::Off,
            Self::Pinned => ZeroCopy::Auto,
            Self::Registered => ZeroCopy::On,
        };
        let zero_copy_threshold_bytes = PAGE_BYTES;
        IoUringOptions { zero_copy, zero_copy_threshold_bytes, ..IoUringOptions::default() }
    }
}

/// One way for one length. Times are medians.
#[derive(Debug, Serialize)]
struct Row {
    run_bytes: u64,
    way: Way,
    seconds_per_gib: f64,
    cpu_seconds_per_gib: f64,
    /// Shares of all bytes, of the last sample.
    zero_copy_share: f64,
    copied_by_kernel_share: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    samples: u16,
    bytes: u64,
    rows: Vec<Row>,
}

/// Takes runs, or sends them and prints what it cost.
pub(crate) fn run(args: &RunsArgs) -> Result<Outcome, Failure> {
    let ram = Ram::allocate(&[(0, MEMORY_BYTES)], Backing::Anonymous)?;
    let mut noise = vec![0; usize::try_from(MEMORY_BYTES)?];
    Random::new(1).fill(&mut noise);
    ram.memory().write_slice(&noise, GuestAddress(0))?;
    let memory = Arc::new(guest_memory(Arc::clone(ram.memory()))?);
    match (&args.listen, &args.connect) {
        (Some(address), _) => take(address, &memory),
        (None, Some(address)) => send_all(args, address, &memory),
        (None, None) => Err("neither --listen nor --connect".into()),
    }
}

/// It is noise that is sent: nothing of it is secret.
fn plain_text() -> TcpOptions {
    TcpOptions { security: Security::PlainText, ..TcpOptions::default() }
}

/// Takes one link after another, until somebody ends the process.
fn take(address: &str, memory: &Arc<GuestMemory>) -> Result<Outcome, Failure> {
    let acceptor =
        TcpAcceptor::bind(address, TcpOptions { admission: Admission::Anyone, ..plain_text() })?;
    say!("listening on {}", acceptor.local_addr());
    loop {
        let mut link = acceptor.accept(None)?;
        link.control()?.receiver.receive(Some(PATIENCE))?;
        link.register(memory)?;
        let mut receivers = link.open_receivers(1, PATIENCE)?;
        while let Received::Batch(_) = receivers[0].receive()? {}
    }
}

fn send_all(args: &RunsArgs, address: &str, memory: &Arc<GuestMemory>) -> Result<Outcome, Failure> {
    let mut rows = Vec::new();
    for &run_bytes in &args.sizes {
        let mut samples = Way::ALL.map(|way| (way, Vec::new()));
        for _ in 0..args.samples {
            for (way, samples) in &mut samples {
                samples.push(send(*way, run_bytes, args.bytes, address, memory)?);
            }
        }
        say!("runs of {}: measured", HumanBytes(run_bytes));
        rows.extend(samples.map(|(way, samples)| row(way, run_bytes, &samples)));
    }
    let report = Report { schema: SCHEMA, samples: args.samples, bytes: args.bytes, rows };
    output::report(&report, &table(&report.rows), args.json)?;
    Ok(Outcome::Completed)
}

struct Sample {
    bytes: u64,
    seconds: f64,
    cpu_seconds: f64,
    zero_copy: ZeroCopyCounts,
}

/// Sends so many bytes on a link of their own; its making and registration do not count.
fn send(
    way: Way,
    run_bytes: u64,
    bytes: u64,
    address: &str,
    memory: &Arc<GuestMemory>,
) -> Result<Sample, Failure> {
    let rings = Rings::new(way.options())?;
    let mut link = rings.source_link(connect_when_free(address)?);
    link.control()?.sender.send(b"runs", PATIENCE)?;
    link.register(memory)?;
    let mut senders = link.open_senders(1)?;
    let sender = &mut *senders[0];
    let (began, cpu) = (Instant::now(), process_cpu_nanoseconds());
    let (sent, last) = send_runs(sender, run_bytes, bytes)?;
    while sender.watermarks(Some(PATIENCE))?.landed < last {}
    let (took, cpu) = (began.elapsed(), process_cpu_nanoseconds() - cpu);
    sender.finish()?;
    Ok(Sample {
        bytes: sent,
        seconds: took.as_secs_f64(),
        cpu_seconds: Duration::from_nanos(cpu).as_secs_f64(),
        zero_copy: sender.counters().zero_copy,
    })
}

/// Connects as soon as the other side is done with the link before.
fn connect_when_free(address: &str) -> Result<TcpSourceLink, Failure> {
    let began = Instant::now();
    loop {
        match connect(address, plain_text()) {
            Err(TransportError::Refused { .. }) if began.elapsed() < PATIENCE => {}
            other => return Ok(other?),
        }
    }
}

/// How many bytes went out, and the last batch. No run touches the one before it.
fn send_runs(
    sender: &mut dyn PageSender,
    run_bytes: u64,
    bytes: u64,
) -> Result<(u64, u64), Failure> {
    let run_pages = run_bytes / PAGE_BYTES;
    let first_pages =
        (0..MEMORY_BYTES / PAGE_BYTES - run_pages).step_by(usize::try_from(run_pages + 1)?);
    let pages = u32::try_from(run_pages)?;
    let runs: Vec<Run> = first_pages
        .map(|first_page| PageRange { region: 0, first_page, pages })
        .map(|range| Run { range, kind: RunKind::Data })
        .collect();
    let batch = usize::try_from(BATCH_BYTES / run_bytes)?.clamp(1, BATCH_RUNS);
    let (mut sent, mut last) = (0, 0);
    for runs in runs.chunks(batch).cycle() {
        last = sender.send(runs)?;
        sent += runs.iter().map(Run::payload_bytes).sum::<u64>();
        if sent >= bytes {
            break;
        }
        // As an engine does: no more than a queue or two are under way.
        sender.watermarks(None)?;
    }
    Ok((sent, last))
}

fn row(way: Way, run_bytes: u64, samples: &[Sample]) -> Row {
    let per_gib = |figure: fn(&Sample) -> f64| {
        let figures = samples.iter().map(|sample| figure(sample) * gibs(sample.bytes).recip());
        median(figures).unwrap_or(0.0)
    };
    let share = |bytes: fn(&ZeroCopyCounts) -> u64| {
        samples.last().map_or(0.0, |last| bytes(&last.zero_copy) as f64 / last.bytes as f64)
    };
    Row {
        run_bytes,
        way,
        seconds_per_gib: per_gib(|sample| sample.seconds),
        cpu_seconds_per_gib: per_gib(|sample| sample.cpu_seconds),
        zero_copy_share: share(|counts| counts.sent_bytes),
        copied_by_kernel_share: share(|counts| counts.copied_bytes),
    }
}

fn gibs(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

fn table(rows: &[Row]) -> comfy_table::Table {
    let mut table = output::table();
    table.set_header(["run", "way", "s/GiB", "CPU s/GiB", "zero-copy", "copied after all"]);
    for row in rows {
        let figures = [
            format!("{:.3}", row.seconds_per_gib),
            format!("{:.3}", row.cpu_seconds_per_gib),
            format!("{:.0} %", row.zero_copy_share * 100.0),
            format!("{:.0} %", row.copied_by_kernel_share * 100.0),
        ];
        let mut cells = vec![
            Cell::new(HumanBytes(row.run_bytes)),
            Cell::new(format!("{:?}", row.way).to_lowercase()),
        ];
        cells.extend(figures.map(|text| Cell::new(text).set_alignment(CellAlignment::Right)));
        table.add_row(cells);
    }
    table
}
