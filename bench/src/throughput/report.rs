//! What was measured, as one JSON object and as a table for people.

use std::ops::Add;

use comfy_table::Cell;
use indicatif::HumanBytes;
use pageferry_cli::outcome::Failure;
use pageferry_report::document::ZeroCopy;
use serde::Serialize;

use crate::links::slice_bytes;
use crate::output::{self, SCHEMA, median};
use crate::transfer::{Measured, Setup, Transfer};
use crate::words::{RdmaRegistration, Transport};

/// What the engine is compared with.
#[derive(Debug, Clone, Copy)]
pub(super) enum Other {
    /// The bare loop.
    Bare(Transfer),
    /// perftest's ib_write_bw, which says nothing else.
    Perftest { gbps: f64 },
}

impl Other {
    pub(super) fn gbps(&self) -> f64 {
        match self {
            Self::Bare(transfer) => transfer.gbps(),
            Self::Perftest { gbps } => *gbps,
        }
    }

    fn bare(&self) -> Option<Transfer> {
        match self {
            Self::Bare(transfer) => Some(*transfer),
            Self::Perftest { .. } => None,
        }
    }
}

/// The engine and the other, one right after the other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    pub(super) engine: Transfer,
    pub(super) other: Other,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct PairReport {
    engine_gbps: f64,
    /// Null over RDMA.
    bare_gbps: Option<f64>,
    /// Null but over RDMA.
    perftest_gbps: Option<f64>,
    /// Engine to the other.
    ratio: Option<f64>,
    engine_payload_bytes: u64,
    engine_ms: f64,
    bare_ms: Option<f64>,
}

/// A figure of either side; null where it cannot be had.
#[derive(Debug, Clone, Copy, Serialize)]
struct BothSides<T> {
    source: Option<T>,
    destination: Option<T>,
}

/// The JSON object. Figures over all pairs are medians, unless they say otherwise.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    schema: u32,
    transport: Transport,
    channels: u16,
    backing: String,
    memory_bytes: u64,
    zero_share: f64,
    dirty_rate: u32,
    /// As asked for; null is the engine's own choice.
    batch_bytes: Option<u64>,
    populate_threads: u16,
    rdma_registration: Option<RdmaRegistration>,
    /// Most bytes of one write.
    rdma_slice_bytes: Option<u32>,
    pairs: Vec<PairReport>,
    engine_gbps_median: Option<f64>,
    bare_gbps_median: Option<f64>,
    perftest_gbps_median: Option<f64>,
    ratio_min: Option<f64>,
    ratio_median: Option<f64>,
    ratio_max: Option<f64>,
    cpu_s_per_gib: BothSides<f64>,
    bare_cpu_s_per_gib: BothSides<f64>,
    /// Of both sides together.
    syscalls_per_gib: Option<f64>,
    bare_syscalls_per_gib: Option<f64>,
    syscalls_per_gib_by_side: BothSides<f64>,
    bare_syscalls_per_gib_by_side: BothSides<f64>,
    /// Looks for completions: a side that sleeps until there are some looks a few times for each.
    polls_per_gib: BothSides<f64>,
    /// The most of any measurement, both sides together.
    user_copied_bytes: u64,
    /// The most of any measurement and either side.
    engine_peak_bytes: Option<u64>,
    engine_peak_bytes_by_side: BothSides<u64>,
    /// Of all measurements and both sides together.
    zero_copy: ZeroCopy,
    /// Both sides' memory was the same after the first measurement; there is no report if not.
    memory_match: bool,
}

impl Report {
    pub(super) fn new(setup: &Setup, pairs: &[Pair]) -> Self {
        let engine: Vec<_> = pairs.iter().map(|pair| pair.engine).collect();
        let bare: Vec<_> = pairs.iter().filter_map(|pair| pair.other.bare()).collect();
        let rdma = (setup.way.transport == Transport::Rdma).then_some(setup.way.rdma);
        let reports: Vec<_> = pairs.iter().map(Pair::report).collect();
        let ratios: Vec<_> = reports.iter().filter_map(|pair| pair.ratio).collect();
        let peak = |side: fn(&Transfer) -> Measured| {
            engine.iter().filter_map(|transfer| side(transfer).peak_bytes).max()
        };
        let peaks = BothSides {
            source: peak(|transfer| transfer.source),
            destination: peak(|transfer| transfer.destination),
        };
        Self {
            schema: SCHEMA,
            transport: setup.way.transport,
            channels: setup.channels,
            backing: setup.backing.to_string(),
            memory_bytes: setup.memory_bytes,
            zero_share: setup.zero_share,
            dirty_rate: setup.dirty_rate,
            batch_bytes: setup.batch_bytes,
            populate_threads: setup.populate_threads,
            rdma_registration: rdma.map(|rdma| rdma.rdma_registration),
            rdma_slice_bytes: rdma.map(slice_bytes),
            engine_gbps_median: median(engine.iter().map(Transfer::gbps)),
            bare_gbps_median: median(bare.iter().map(Transfer::gbps)),
            perftest_gbps_median: median(reports.iter().filter_map(|pair| pair.perftest_gbps)),
            ratio_min: ratios.iter().copied().reduce(f64::min),
            ratio_median: median(ratios.iter().copied()),
            ratio_max: ratios.iter().copied().reduce(f64::max),
            pairs: reports,
            cpu_s_per_gib: cpu_s_per_gib(&engine),
            bare_cpu_s_per_gib: cpu_s_per_gib(&bare),
            syscalls_per_gib: syscalls_per_gib(&engine),
            bare_syscalls_per_gib: syscalls_per_gib(&bare),
            syscalls_per_gib_by_side: by_side(&engine, |measured| measured.system_calls),
            bare_syscalls_per_gib_by_side: by_side(&bare, |measured| measured.system_calls),
            polls_per_gib: by_side(&engine, |measured| measured.polls),
            user_copied_bytes: engine
                .iter()
                .map(|transfer| {
                    transfer.source.user_copied_bytes + transfer.destination.user_copied_bytes
                })
                .max()
                .unwrap_or(0),
            engine_peak_bytes: peaks.source.max(peaks.destination),
            engine_peak_bytes_by_side: peaks,
            zero_copy: engine
                .iter()
                .flat_map(|transfer| [transfer.source.zero_copy, transfer.destination.zero_copy])
                .fold(ZeroCopy::default(), Add::add),
            memory_match: true,
        }
    }

    /// The object on stdout, or the table.
    pub(super) fn print(&self, json: bool) -> Result<(), Failure> {
        let mut table = output::table();
        for (name, engine, bare) in self.rows() {
            table.add_row([name, engine, bare].map(Cell::new));
        }
        output::report(self, &table, json)
    }

    fn rows(&self) -> Vec<(String, String, String)> {
        let mut rows = Vec::new();
        let mut row = |name: &str, engine: String, bare: String| {
            rows.push((name.to_owned(), engine, bare));
        };
        let memory = format!("{} {}", HumanBytes(self.memory_bytes), self.backing);
        row("memory", memory, format!("{} x {}", self.channels, self.transport));
        let rdma = self.transport == Transport::Rdma;
        let other = if rdma { "ib_write_bw" } else { "bare loop" };
        row("", "engine".into(), other.into());
        for (number, pair) in (1..).zip(&self.pairs) {
            let name = format!("pair {number}");
            let other = pair.bare_gbps.or(pair.perftest_gbps);
            row(&name, gbps(Some(pair.engine_gbps)), gbps(other));
        }
        let other_median = self.bare_gbps_median.or(self.perftest_gbps_median);
        row("median", gbps(self.engine_gbps_median), gbps(other_median));
        let ratio = format!(
            "{} ({} to {})",
            figure(self.ratio_median, 3),
            figure(self.ratio_min, 3),
            figure(self.ratio_max, 3)
        );
        row(&format!("engine / {other}"), ratio, String::new());
        let (cpu, bare_cpu) = (self.cpu_s_per_gib, self.bare_cpu_s_per_gib);
        row("CPU s/GiB, source", figure(cpu.source, 3), figure(bare_cpu.source, 3));
        row("CPU s/GiB, destination", figure(cpu.destination, 3), figure(bare_cpu.destination, 3));
        let (calls, bare_calls) =
            (self.syscalls_per_gib_by_side, self.bare_syscalls_per_gib_by_side);
        row("system calls/GiB, source", figure(calls.source, 0), figure(bare_calls.source, 0));
        row(
            "system calls/GiB, destination",
            figure(calls.destination, 0),
            figure(bare_calls.destination, 0),
        );
        row("copied in user space", HumanBytes(self.user_copied_bytes).to_string(), String::new());
        let zero_copy = format!(
            "{}, {} copied by the kernel",
            HumanBytes(self.zero_copy.sent_bytes),
            HumanBytes(self.zero_copy.copied_bytes)
        );
        row("sent zero-copy", zero_copy, String::new());
        let peak = |peak: Option<u64>| {
            peak.map_or_else(|| "unknown".to_owned(), |bytes| HumanBytes(bytes).to_string())
        };
        let peaks = self.engine_peak_bytes_by_side;
        row("peak memory, source", peak(peaks.source), String::new());
        row("peak memory, destination", peak(peaks.destination), String::new());
        rows
    }
}

impl Pair {
    fn report(&self) -> PairReport {
        let (engine_gbps, other_gbps) = (self.engine.gbps(), self.other.gbps());
        let bare = self.other.bare();
        PairReport {
            engine_gbps,
            bare_gbps: bare.map(|bare| bare.gbps()),
            perftest_gbps: bare.is_none().then_some(other_gbps),
            ratio: (other_gbps > 0.0).then(|| engine_gbps / other_gbps),
            engine_payload_bytes: self.engine.source.payload_bytes,
            engine_ms: self.engine.source.nanoseconds as f64 / 1e6,
            bare_ms: bare.map(|bare| bare.source.nanoseconds as f64 / 1e6),
        }
    }
}

fn by_side(transfers: &[Transfer], figure: fn(&Measured) -> u64) -> BothSides<f64> {
    let per_gib = |side: fn(&Transfer) -> Measured| {
        median(transfers.iter().filter_map(|transfer| transfer.per_gib(figure(&side(transfer)))))
    };
    BothSides {
        source: per_gib(|transfer| transfer.source),
        destination: per_gib(|transfer| transfer.destination),
    }
}

fn cpu_s_per_gib(transfers: &[Transfer]) -> BothSides<f64> {
    let BothSides { source, destination } = by_side(transfers, |measured| measured.cpu_nanoseconds);
    let seconds = |nanoseconds: f64| nanoseconds / 1e9;
    BothSides { source: source.map(seconds), destination: destination.map(seconds) }
}

fn syscalls_per_gib(transfers: &[Transfer]) -> Option<f64> {
    median(transfers.iter().filter_map(|transfer| {
        transfer.per_gib(transfer.source.system_calls + transfer.destination.system_calls)
    }))
}

fn figure(figure: Option<f64>, decimals: usize) -> String {
    figure.map_or_else(|| "-".to_owned(), |figure| format!("{figure:.decimals$}"))
}

fn gbps(gbps: Option<f64>) -> String {
    gbps.map_or_else(|| "-".to_owned(), |gbps| format!("{gbps:.2} Gb/s"))
}
