//! `save` and `restore`: a guest that goes on from a file.

use std::error::Error;
use std::fs::File;
use std::io::{BufReader, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};
use pageferry_vmm::guest::Guest;
use pageferry_vmm::snapshot::{self, NewFile, SnapshotError, Written};
use serde::Serialize;
use signal_hook::consts::SIGXFSZ;

use crate::args::{RestoreArgs, SaveArgs};
use crate::outcome::Outcome;
use crate::resident::await_beats;
use crate::run::{config, tracking};
use crate::signals::{Wish, listen_to_signals, wait_or_quit};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Version of the JSON object. Fields are added, never repurposed.
const SCHEMA: u32 = 1;

/// What was done with a file.
#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    outcome: Outcome,
    /// Why it is not "completed".
    error: Option<String>,
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

/// The object of a command that has none to report on. Its fields are those of [`Report`].
#[derive(Debug, Serialize)]
struct Failure<'a> {
    schema: u32,
    outcome: Outcome,
    error: &'a str,
}

/// Prints it.
pub(crate) fn print_failure(why: &str) -> std::result::Result<(), serde_json::Error> {
    let failure = Failure { schema: SCHEMA, outcome: Outcome::Failed, error: why };
    print(&serde_json::to_string(&failure)?);
    Ok(())
}

fn print(text: &str) {
    if let Err(error) = std::io::stdout().write_all(format!("{text}\n").as_bytes()) {
        say!("failed to print the report: {error}");
    }
}

/// Runs a guest for a while and saves it. If that fails it runs on.
pub(crate) fn save(args: &SaveArgs) -> Result<Outcome> {
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in)?;
    // A limit on the length of files is an error of the write then, and not the end of the guest.
    signal_hook::flag::register(SIGXFSZ, Arc::default())?;
    let failed = |error: &SnapshotError| {
        let why = pageferry::Chain::of(error);
        format!("failed to save the guest to {}: {why}", args.file.display())
    };
    // Before there is a guest that could miss it.
    let mut file = NewFile::create(&args.file).map_err(|error| failed(&error))?;
    let config = config(&args.guest);
    let tracking = tracking(&args.guest, config.kind)?;
    let mut guest = Guest::create_tracked(config, tracking)?;
    guest.boot()?;
    run(&mut guest, args.run_for, &wishes)?;
    let began = Instant::now();
    let written = snapshot::save(&mut guest, &mut file)
        .and_then(|written| file.keep().map(|()| written))
        .map_err(|error| failed(&error));
    let took = began.elapsed();
    let mut report = Report::of(&guest, took);
    match written {
        Ok(written) => {
            report.file(written);
            report.print(args.json)?;
            Ok(report.outcome)
        }
        Err(why) => {
            report.outcome = Outcome::Failed;
            report.error = Some(why.clone());
            resume(&mut guest)?;
            report.heartbeats = guest.heartbeat().beats;
            report.print(args.json)?;
            say!("error: {why}");
            say!("the guest runs on here; Ctrl-C ends it");
            wait_or_quit(&wishes, None);
            Ok(report.outcome)
        }
    }
}

/// Runs the guest that a file holds for a while.
pub(crate) fn restore(args: &RestoreArgs) -> Result<Outcome> {
    let path = args.file.display();
    let began = Instant::now();
    let file = File::open(&args.file).map_err(|error| format!("failed to open {path}: {error}"))?;
    let (mut guest, read) = snapshot::restore(&mut BufReader::new(file), args.backing)
        .map_err(|error| format!("{path}: {}", pageferry::Chain::of(&error)))?;
    let took = began.elapsed();
    // Not before: the file may be a pipe that nobody writes to, and a signal ends the wait for it as
    // long as nobody hears it.
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in)?;
    // It is right before it has done anything here.
    let before = guest.check_oracle();
    if !before.ok {
        return Err(format!("the guest in {path} is wrong: {}", before.detail).into());
    }
    run(&mut guest, args.run_for, &wishes)?;
    let mut report = Report::of(&guest, took);
    report.file(read);
    report.print(args.json)?;
    Ok(report.outcome)
}

/// Lets the guest run for so long, or until a Ctrl-C, and pauses it.
fn run(guest: &mut Guest, time: Duration, wishes: &Receiver<Wish>) -> Result<()> {
    resume(guest)?;
    wait_or_quit(wishes, Some(time));
    guest.pause()?;
    match guest.failure() {
        Some(failure) => Err(format!("the guest ended: {failure}").into()),
        None => Ok(()),
    }
}

/// Lets the guest run, and sees it do so.
fn resume(guest: &mut Guest) -> Result<()> {
    let beats = guest.heartbeat().beats;
    guest.resume()?;
    if await_beats(guest, beats + 10) {
        return Ok(());
    }
    let reason = guest.failure().unwrap_or_else(|| "it does not beat".to_owned());
    Err(format!("the guest does not run: {reason}").into())
}

impl Report {
    /// Of a guest that is paused.
    fn of(guest: &Guest, file: Duration) -> Self {
        let oracle = guest.check_oracle();
        let config = guest.config();
        let error = (!oracle.ok).then(|| format!("the guest's memory is wrong: {}", oracle.detail));
        Self {
            schema: SCHEMA,
            outcome: if oracle.ok { Outcome::Completed } else { Outcome::Failed },
            error,
            guest: config.kind.to_string(),
            workload: config.workload.kind.to_string(),
            vcpus: config.vcpus,
            state_bytes: 0,
            memory_bytes: 0,
            file_ms: (file.as_secs_f64() * 1e6).round() / 1e3,
            heartbeats: guest.heartbeat().beats,
            oracle_ok: oracle.ok,
            oracle: oracle.detail,
        }
    }

    fn file(&mut self, Written { state_bytes, memory_bytes }: Written) {
        (self.state_bytes, self.memory_bytes) = (state_bytes, memory_bytes);
    }

    fn print(&self, json: bool) -> Result<()> {
        let text = if json { serde_json::to_string(self)? } else { self.to_string() };
        print(&text);
        Ok(())
    }
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
