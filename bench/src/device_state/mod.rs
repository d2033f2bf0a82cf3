//! `device-state`: what saving a guest's device state costs, and what encoding and decoding a large
//! device does.

mod args;

use std::hint::black_box;
use std::time::Instant;

use comfy_table::{Cell, CellAlignment, Table};
use indicatif::HumanBytes;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::say;
use pageferry_device_state::{DeviceState, from_bytes, to_bytes};
use pageferry_vmm::choice::GuestChoice;
use pageferry_vmm::guest::{Guest, GuestConfig, GuestKind};
use pageferry_vmm::ram::{Backing, Ram};
use pageferry_vmm::workload::{WorkloadConfig, WorkloadKind};
use serde::Serialize;

use crate::output::{self, SCHEMA, median};
use crate::random::Random;

pub(crate) use args::{DeviceStateArgs, METHOD};

const MEMORY_BYTES: u64 = 64 << 20;
const WORKING_SET_BYTES: u64 = 16 << 20;

/// A device that is all memory.
#[derive(DeviceState)]
#[device_state(name = "blob")]
struct Blob {
    #[device_state(tag = 1, max_len = u32::MAX)]
    bytes: Vec<u8>,
}

/// Saving with so many threads.
#[derive(Debug, Serialize)]
struct Save {
    threads: usize,
    /// Median, and the longest.
    ms: f64,
    worst_ms: f64,
}

/// Times are medians.
#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    samples: u16,
    guest: String,
    vcpus: u8,
    state_bytes: usize,
    saves: Vec<Save>,
    load_ms: f64,
    blob_bytes: u64,
    encode_gigabytes_per_second: f64,
    decode_gigabytes_per_second: f64,
    /// What copying the same bytes into fresh memory does.
    copy_gigabytes_per_second: f64,
}

/// Measures, and prints the result.
pub(crate) fn run(args: &DeviceStateArgs) -> Result<Outcome, Failure> {
    let kind = GuestChoice::Auto.decide();
    let mut guest = guest(kind, args.vcpus)?;
    let state = guest.save()?;
    let mut saves = Vec::new();
    for threads in [1, 2, 4] {
        let sample = |_| {
            milliseconds(|| {
                Ok(if threads == 1 { guest.save() } else { guest.save_by_threads(threads) }?)
            })
        };
        let times = (0..args.samples).map(sample).collect::<Result<Vec<_>, Failure>>()?;
        let worst_ms = times.iter().copied().fold(0.0, f64::max);
        saves.push(Save { threads, ms: median(times).unwrap_or(0.0), worst_ms });
    }
    let loads = (0..args.samples).map(|_| milliseconds(|| Ok(guest.load(&state)?)));
    let load_ms = median(loads.collect::<Result<Vec<_>, Failure>>()?).unwrap_or(0.0);
    say!("a guest of {} vCPUs: measured", args.vcpus);

    let mut bytes = vec![0; usize::try_from(args.blob)?];
    Random::new(1).fill(&mut bytes);
    let mut blob = Blob { bytes };
    let stream = to_bytes(&mut blob)?;
    if from_bytes::<Blob>(&stream)?.bytes != blob.bytes {
        return Err("what was decoded is not what was encoded".into());
    }
    let encode = rate(args, || Ok(to_bytes(&mut blob)?))?;
    let decode = rate(args, || Ok(from_bytes::<Blob>(&stream)?))?;
    let copy = rate(args, || Ok(black_box(&stream).clone()))?;
    let report = Report {
        schema: SCHEMA,
        samples: args.samples,
        guest: kind.to_string(),
        vcpus: args.vcpus,
        state_bytes: state.len(),
        saves,
        load_ms,
        blob_bytes: args.blob,
        encode_gigabytes_per_second: encode,
        decode_gigabytes_per_second: decode,
        copy_gigabytes_per_second: copy,
    };
    output::report(&report, &table(&report), args.json)?;
    Ok(Outcome::Completed)
}

/// A paused guest that has run, so that its registers hold something.
fn guest(kind: GuestKind, vcpus: u8) -> Result<Guest, Failure> {
    let mut guest = Guest::create(GuestConfig {
        kind,
        regions: Ram::pc_regions(MEMORY_BYTES),
        backing: Backing::Anonymous,
        vcpus,
        cpu: None,
        workload: WorkloadConfig {
            kind: WorkloadKind::Random,
            working_set_bytes: WORKING_SET_BYTES,
            dirty_rate_pages_per_second: None,
            seed: 1,
        },
    })?;
    guest.boot()?;
    guest.resume()?;
    let lives = guest.await_beats(10 * u64::from(vcpus));
    lives.map_err(|reason| format!("the guest does not run: {reason}"))?;
    guest.pause()?;
    Ok(guest)
}

/// How long it takes, without the drop of its result.
fn milliseconds<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<f64, Failure> {
    let began = Instant::now();
    let result = work()?;
    let took = began.elapsed();
    drop(black_box(result));
    Ok(took.as_secs_f64() * 1e3)
}

/// Bytes of the blob in 10⁹ a second.
fn rate<T>(
    args: &DeviceStateArgs,
    mut work: impl FnMut() -> Result<T, Failure>,
) -> Result<f64, Failure> {
    let times = (0..args.samples).map(|_| milliseconds(&mut work));
    let ms = median(times.collect::<Result<Vec<_>, Failure>>()?).unwrap_or(0.0);
    Ok(args.blob as f64 / ms.max(f64::EPSILON) / 1e6)
}

fn table(report: &Report) -> Table {
    let mut table = output::table();
    let mut row = |name: String, figure: String| {
        let figure = Cell::new(figure).set_alignment(CellAlignment::Right);
        table.add_row(vec![Cell::new(name), figure]);
    };
    let Report { guest, vcpus, state_bytes, .. } = report;
    row(
        format!("device state of a {guest} guest of {vcpus} vCPUs"),
        HumanBytes(*state_bytes as u64).to_string(),
    );
    for Save { threads, ms, worst_ms } in &report.saves {
        row(format!("save, {threads} threads"), format!("{ms:.2} ms (at most {worst_ms:.2} ms)"));
    }
    row("load".to_owned(), format!("{:.2} ms", report.load_ms));
    let blob = HumanBytes(report.blob_bytes);
    row(format!("encode {blob}"), format!("{:.2} GB/s", report.encode_gigabytes_per_second));
    row(format!("decode {blob}"), format!("{:.2} GB/s", report.decode_gigabytes_per_second));
    row(format!("copy {blob}"), format!("{:.2} GB/s", report.copy_gigabytes_per_second));
    table
}
