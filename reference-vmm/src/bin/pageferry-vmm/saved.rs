//! `save` and `restore`: a guest that goes on from a file.

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;
use pageferry_vmm::guest::Guest;
use pageferry_vmm::snapshot::{self, Written};
use serde::Serialize;

use crate::args::{RestoreArgs, SaveArgs};
use crate::outcome::Outcome;
use crate::resident::await_beats;
use crate::run::{config, tracking};
use crate::signals::{listen_to_signals, wait_or_quit};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Version of the JSON object. Fields are added, never repurposed.
const SCHEMA: u32 = 1;

/// What was done with a file.
#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    outcome: Outcome,
    guest: String,
    workload: String,
    vcpus: u8,
    /// Device state in the file.
    state_bytes: u64,
    /// Memory in the file.
    memory_bytes: u64,
    /// To write or to read it, the guest's making included.
    file_ms: f64,
    heartbeats: u64,
    oracle_ok: bool,
    oracle: String,
}

/// Runs a guest for a while and saves it.
pub(crate) fn save(args: &SaveArgs) -> Result<Outcome> {
    let config = config(&args.guest);
    let tracking = tracking(&args.guest, config.kind)?;
    let mut guest = Guest::create_tracked(config, tracking)?;
    guest.boot()?;
    run(&mut guest, args.run_for)?;
    let began = Instant::now();
    let written = write(&mut guest, &args.file)?;
    report(&guest, written, began.elapsed(), args.json)
}

/// Under another name until it is whole, so that nobody takes half a guest for one.
fn write(guest: &mut Guest, path: &Path) -> Result<Written> {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    let partial = Path::new(&name);
    let failed = |what: &str, error: &std::io::Error| {
        format!("failed to {what} {}: {error}", path.display())
    };
    let file = File::create(partial).map_err(|error| failed("create", &error))?;
    let mut out = BufWriter::new(file);
    let written = snapshot::save(guest, &mut out)
        .map_err(Box::<dyn Error + Send + Sync>::from)
        .and_then(|written| {
            out.get_ref()
                .sync_all()
                .and_then(|()| fs::rename(partial, path))
                .map_err(|error| failed("write", &error))?;
            Ok(written)
        });
    if written.is_err() {
        // What is not there need not be removed.
        let _ = fs::remove_file(partial);
    }
    written
}

/// Runs the guest that a file holds for a while.
pub(crate) fn restore(args: &RestoreArgs) -> Result<Outcome> {
    let path = args.file.display();
    let file = File::open(&args.file).map_err(|error| format!("failed to open {path}: {error}"))?;
    let began = Instant::now();
    let (mut guest, read) = snapshot::restore(&mut BufReader::new(file), args.backing)?;
    let took = began.elapsed();
    // It is right before it has done anything here.
    let before = guest.check_oracle();
    if !before.ok {
        return Err(format!("the guest in {path} is wrong: {}", before.detail).into());
    }
    run(&mut guest, args.run_for)?;
    report(&guest, read, took, args.json)
}

/// Lets the guest run for so long, or until a Ctrl-C, and pauses it.
fn run(guest: &mut Guest, time: Duration) -> Result<()> {
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in)?;
    let beats = guest.heartbeat().beats;
    guest.resume()?;
    if !await_beats(guest, beats + 10) {
        let reason = guest.failure().unwrap_or_else(|| "it does not beat".to_owned());
        return Err(format!("the guest does not run: {reason}").into());
    }
    wait_or_quit(&wishes, Some(time));
    guest.pause()?;
    match guest.failure() {
        Some(failure) => Err(format!("the guest ended: {failure}").into()),
        None => Ok(()),
    }
}

fn report(guest: &Guest, file: Written, took: Duration, json: bool) -> Result<Outcome> {
    let oracle = guest.check_oracle();
    let outcome = if oracle.ok { Outcome::Completed } else { Outcome::Failed };
    let config = guest.config();
    let report = Report {
        schema: SCHEMA,
        outcome,
        guest: config.kind.to_string(),
        workload: config.workload.kind.to_string(),
        vcpus: config.vcpus,
        state_bytes: file.state_bytes,
        memory_bytes: file.memory_bytes,
        file_ms: (took.as_secs_f64() * 1e6).round() / 1e3,
        heartbeats: guest.heartbeat().beats,
        oracle_ok: oracle.ok,
        oracle: oracle.detail,
    };
    let text = if json { serde_json::to_string(&report)? } else { report.to_string() };
    if let Err(error) = std::io::stdout().write_all(format!("{text}\n").as_bytes()) {
        say!("failed to print the report: {error}");
    }
    Ok(outcome)
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { guest, workload, vcpus, state_bytes, memory_bytes, .. } = self;
        let Self { file_ms, heartbeats, oracle_ok, oracle, .. } = self;
        let verdict = if *oracle_ok { "right" } else { "WRONG" };
        write!(
            f,
            "{guest} guest, {vcpus} vCPU, {workload}, {heartbeats} heartbeats\n\
             in the file: {state_bytes} bytes of device state, {memory_bytes} bytes of memory, in \
             {file_ms:.1} ms\noracle in the guest: {verdict}: {oracle}"
        )
    }
}
