//! `rearm`: what re-arming KVM's dirty log costs, by a sender and by bare loops.

mod bare;
mod engine;

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use comfy_table::{Cell, CellAlignment, Table};
use pageferry::dirty::{DirtyBitmap, DirtySources, STRIPE_WORDS, WORD_PAGES};
use pageferry::memory::GuestMemory;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::say;
use pageferry_cli::units::size;
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::guest::{Guest, GuestConfig, GuestKind, KvmHandles, kvm_available};
use pageferry_vmm::layout::WORKING_SET;
use pageferry_vmm::ram::{Backing, Ram};
use pageferry_vmm::tracking::DirtyTracking;
use pageferry_vmm::workload::{WorkloadConfig, WorkloadKind};
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress};

use crate::output::{self, SCHEMA, median};

pub(crate) const METHOD: &str = "\
Example:
  pageferry-bench rearm --vcpus 1,16,64

What is measured:
  A KVM guest of so many vCPUs writes as fast as it can, all of them at pages of their own. Its memory is
  all dirty in KVM's log, and a part of it is re-armed: all pages (dense), one in 64 (scattered), or
  one in 512, which is one a stripe (single). In turn, each time from a log that is all dirty:

  a stripe at a time  a bare loop of KVM_CLEAR_DIRTY_LOG, one call for each stripe of 2 MiB with something
                      dirty: what senders did before
  engine              a sender's round over a link of --gigabits: how many calls it makes, and the time
                      that is spent in them
  bare                a bare loop of the very same calls
  at once             one call for all

  Each call takes a lock of the VM and, if it cleared something, has all vCPUs flush their TLBs. Figures
  are medians of the samples.";

#[derive(Debug, Args)]
pub(crate) struct RearmArgs {
    /// Virtual CPUs, one or more numbers.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 64], value_parser = clap::value_parser!(u8).range(1..=64))]
    vcpus: Vec<u8>,
    /// Speed of the channel in Gb/s; eight of the default make 100.
    #[arg(long, value_name = "GBITS", default_value_t = 12.5, value_parser = gigabits)]
    gigabits: f64,
    /// Guest memory, at least 128M and less than 3G.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = memory)]
    memory: u64,
    /// How often each is measured.
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..))]
    samples: u16,
    /// Print one JSON object and nothing else on stdout.
    #[arg(long)]
    json: bool,
}

/// What the guest works on.
const WORKING_SET_BYTES: u64 = 64 << 20;

fn gigabits(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.001..=1000.0).contains(&value) => Ok(value),
        _ => Err("it takes a number from 0.001 to 1000".to_owned()),
    }
}

fn memory(text: &str) -> Result<u64, String> {
    // One slot for KVM, whole stripes, and room for the working set.
    match size(text)? {
        bytes if bytes.is_multiple_of(2 << 20) && (128 << 20..3 << 30).contains(&bytes) => {
            Ok(bytes)
        }
        _ => Err("it takes a multiple of 2 MiB, at least 128M and less than 3G".to_owned()),
    }
}

/// Which pages are re-armed.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase")]
enum Pattern {
    Dense,
    Scattered,
    Single,
}

impl Pattern {
    fn step(self) -> u64 {
        match self {
            Self::Dense => 1,
            Self::Scattered => WORD_PAGES,
            Self::Single => WORD_PAGES * STRIPE_WORDS as u64,
        }
    }
}

/// Times are medians in milliseconds, for all pages together.
#[derive(Debug, Serialize)]
struct Row {
    vcpus: u8,
    pattern: Pattern,
    pages: u64,
    stripe_calls: usize,
    stripe_ms: f64,
    engine_calls: f64,
    engine_ms: f64,
    /// The engine's calls, by a bare loop.
    bare_ms: f64,
    at_once_ms: f64,
    /// A sender's whole round.
    round_ms: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    samples: u16,
    memory_bytes: u64,
    gigabits: f64,
    rows: Vec<Row>,
}

/// Measures, and prints the result.
pub(crate) fn run(args: &RearmArgs) -> Result<Outcome, Failure> {
    kvm_available().map_err(|reason| format!("failed to measure KVM's dirty log: {reason}"))?;
    let mut rows = Vec::new();
    for &vcpus in &args.vcpus {
        say!("a guest of {vcpus} vCPUs");
        let tracked = Tracked::new(args, vcpus)?;
        for pattern in [Pattern::Dense, Pattern::Scattered, Pattern::Single] {
            rows.push(tracked.measure(args, vcpus, pattern)?);
        }
        tracked.tracker.stop()?;
    }
    let report = Report {
        schema: SCHEMA,
        samples: args.samples,
        memory_bytes: args.memory,
        gigabits: args.gigabits,
        rows,
    };
    output::report(&report, &table(&report), args.json)?;
    Ok(Outcome::Completed)
}

/// A guest that runs, and is tracked.
struct Tracked {
    machine: GuestMachine,
    memory: Arc<GuestMemory>,
    tracker: Arc<DirtySources>,
    kvm: KvmHandles,
}

impl Tracked {
    fn new(args: &RearmArgs, vcpus: u8) -> Result<Self, Failure> {
        let config = GuestConfig {
            kind: GuestKind::Kvm,
            regions: Ram::pc_regions(args.memory),
            backing: Backing::Anonymous,
            vcpus,
            cpu: None,
            workload: WorkloadConfig {
                kind: WorkloadKind::Random,
                working_set_bytes: WORKING_SET_BYTES,
                dirty_rate_pages_per_second: None,
                seed: 1,
            },
        };
        let mut guest = Guest::create_tracked(config, DirtyTracking::Log)?;
        guest.boot()?;
        // Something to send in what the guest does not use, too.
        let unused = WORKING_SET + WORKING_SET_BYTES..args.memory;
        for addr in unused.step_by(4096) {
            guest.ram().memory().write_obj(addr | 1, GuestAddress(addr))?;
        }
        guest.resume()?;
        let machine = GuestMachine { guest };
        let memory = machine.memory().map_err(|error| error.to_string())?;
        let tracker = machine.dirty_sources(&memory).map_err(|error| error.to_string())?;
        tracker.start()?;
        let kvm = machine.guest.kvm().ok_or("the guest is no virtual machine")?;
        Ok(Self { machine, memory, tracker: Arc::new(tracker), kvm })
    }

    /// Makes all pages dirty in KVM's log.
    fn begin(&self) -> Result<(), Failure> {
        if let Some(failure) = self.machine.guest.failure() {
            return Err(format!("the guest ended: {failure}").into());
        }
        self.tracker.stop()?;
        self.tracker.start()?;
        let mut dirty = DirtyBitmap::new(self.memory.layout());
        self.tracker.harvest(&mut dirty)?;
        if dirty.count() < self.memory.layout().pages() {
            return Err("this kernel's dirty log does not begin with all pages dirty \
                        (KVM_DIRTY_LOG_INITIALLY_SET, Linux 5.7)"
                .into());
        }
        Ok(())
    }

    fn measure(&self, args: &RearmArgs, vcpus: u8, pattern: Pattern) -> Result<Row, Failure> {
        let mut pages = DirtyBitmap::new(self.memory.layout());
        let last = self.memory.layout().pages();
        (0..last).step_by(usize::try_from(pattern.step())?).for_each(|page| pages.set(0, page));
        let words = pages.region_words(0);
        let stripes: Vec<(u64, &[u64])> = (0..)
            .step_by(STRIPE_WORDS)
            .map(|word: u64| word * WORD_PAGES)
            .zip(words.chunks(STRIPE_WORDS))
            .collect();
        let [mut by_stripe, mut by_engine, mut bare, mut at_once, mut rounds, mut calls] =
            [const { Vec::new() }; 6];
        for _ in 0..args.samples {
            self.begin()?;
            by_stripe.push(self.clear(stripes.iter().copied())?);
            self.begin()?;
            let (made, took) = engine::round(&self.memory, &pages, &self.tracker, args.gigabits);
            by_engine.push(milliseconds(made.iter().map(|call| call.took).sum()));
            rounds.push(milliseconds(took));
            calls.push(made.len() as f64);
            self.begin()?;
            bare.push(self.clear(made.iter().map(|call| (call.first_page, &*call.words)))?);
            self.begin()?;
            at_once.push(self.clear([(0, words)].into_iter())?);
        }
        let middle = |samples| median(samples).unwrap_or(0.0);
        Ok(Row {
            vcpus,
            pattern,
            pages: pages.count(),
            stripe_calls: stripes.len(),
            stripe_ms: middle(by_stripe),
            engine_calls: middle(calls),
            engine_ms: middle(by_engine),
            bare_ms: middle(bare),
            at_once_ms: middle(at_once),
            round_ms: middle(rounds),
        })
    }

    /// Clears by these calls, and nothing else; milliseconds.
    fn clear<'w>(&self, calls: impl Iterator<Item = (u64, &'w [u64])>) -> Result<f64, Failure> {
        let began = Instant::now();
        for (first_page, words) in calls {
            bare::clear(&self.kvm, first_page, words)?;
        }
        Ok(milliseconds(began.elapsed()))
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn table(report: &Report) -> Table {
    let mut table = output::table();
    table.set_header([
        "vCPUs",
        "",
        "pages",
        "a stripe at a time",
        "engine",
        "bare, same calls",
        "at once",
        "round",
    ]);
    for row in &report.rows {
        let of = |calls: f64, ms: f64| format!("{calls} calls, {ms:.2} ms");
        let figures = [
            row.pages.to_string(),
            of(row.stripe_calls as f64, row.stripe_ms),
            of(row.engine_calls, row.engine_ms),
            format!(
                "{:.2} ms ({:.2} x)",
                row.bare_ms,
                row.engine_ms / row.bare_ms.max(f64::EPSILON)
            ),
            format!("{:.2} ms", row.at_once_ms),
            format!("{:.1} ms", row.round_ms),
        ];
        let mut cells = vec![
            Cell::new(row.vcpus),
            Cell::new(match row.pattern {
                Pattern::Dense => "dense",
                Pattern::Scattered => "scattered",
                Pattern::Single => "single",
            }),
        ];
        cells.extend(figures.map(|text| Cell::new(text).set_alignment(CellAlignment::Right)));
        table.add_row(cells);
    }
    table
}
