//! `save` and `restore`: a guest that goes on from a file.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};
use pageferry_cli::observers::Observers;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::output;
use pageferry_cli::say;
use pageferry_cli::wishes::{
    Wish, listen_to_signals, listen_to_stdin, unless_given_up, unless_interrupted, wait_or_quit,
};
use pageferry_report::document::ms;
use pageferry_rust_vmm::time::Meanwhile;
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::guest::Guest;
use pageferry_vmm::ram::Backing;
use pageferry_vmm::snapshot::{self, Fate, NewFile, Snapshot, SnapshotError, Written};
use serde::Serialize;
use signal_hook::consts::SIGXFSZ;

use crate::args::{RestoreArgs, SaveArgs};
use crate::onward::Onward;
use crate::run::{config, tracking};

/// Version of the JSON object. Fields are added, never repurposed.
const SCHEMA: u32 = 1;

/// How long a write that was called off is waited for, so that nothing is left of the file when that is
/// said. A file system that has not answered by then may never.
const PATIENCE: Duration = Duration::from_secs(3);

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
    /// To write it, or to read and check it, the guest's making included.
    file_ms: f64,
    heartbeats: u64,
    oracle_ok: bool,
    oracle: String,
}

/// The object of a command that has none to report on. Its fields are those of [`Report`].
#[derive(Debug, Serialize)]
struct Ended<'a> {
    schema: u32,
    outcome: Outcome,
    error: &'a str,
}

/// Prints it.
pub(crate) fn print_failure(outcome: Outcome, why: &str) -> Result<(), serde_json::Error> {
    let failure = Ended { schema: SCHEMA, outcome, error: why };
    print(&serde_json::to_string(&failure)?);
    Ok(())
}

fn print(text: &str) {
    if let Err(error) = output::line(text) {
        say!("failed to print the report: {error}");
    }
}

/// Runs a guest for a while and saves it. If that fails, or is cancelled, it runs on.
pub(crate) fn save(args: &SaveArgs) -> Result<Outcome, Failure> {
    let config = config(&args.guest)?;
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in)?;
    // A limit on the length of files is an error of the write then, and not the end of the guest.
    signal_hook::flag::register(SIGXFSZ, Arc::default())?;
    let failed = |why: &str| format!("failed to save the guest to {}: {why}", args.file.display());
    let path = args.file.clone();
    // Before there is a guest that could miss it. The file system may not answer.
    let Some(file) = unless_interrupted(&wishes, move || NewFile::create(&path))? else {
        return ended(args.json, "interrupted before there was a guest to save");
    };
    let file = file.map_err(|error| failed(&chain(&error)))?;
    let tracking = tracking(&args.guest, config.kind)?;
    let mut guest = Guest::create_tracked(config, tracking)?;
    guest.boot()?;
    run(&mut guest, args.run_for, &wishes)?;
    let began = Instant::now();
    let (outcome, written) = match Snapshot::of(&mut guest) {
        Ok(snapshot) => write(snapshot, file, &wishes)?,
        Err(error) => (Outcome::Failed, Err(chain(&error))),
    };
    let took = began.elapsed();
    let mut report = Report::of(&guest, took);
    match written {
        Ok(written) => {
            report.file(written);
            report.print(args.json)?;
            Ok(report.outcome)
        }
        Err(why) => {
            let why = failed(&why);
            report.not_saved(outcome, &why);
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

/// Writes the file, on a thread of its own since a disk may be slow and a file system not answer at all:
/// a Ctrl-C calls it off, and who called it off does not wait for ever.
fn write(
    snapshot: Snapshot,
    mut file: NewFile,
    wishes: &Receiver<Wish>,
) -> Result<(Outcome, Result<Written, String>), Failure> {
    let fate = Fate::default();
    let write = {
        let fate = fate.clone();
        move || {
            let written = snapshot.write(&mut file, &fate)?;
            file.keep(&fate).map(|()| written)
        }
    };
    let mut too_late = false;
    let (written, called_off) = unless_given_up(wishes, PATIENCE, write, |wish| {
        let ends = wish == Wish::Interrupt;
        too_late = ends && !fate.decide();
        ends
    })?;
    let outcome = if called_off { Outcome::Cancelled } else { Outcome::Failed };
    let written = if let Some(written) = written {
        written.map_err(|error| chain(&error))
    } else {
        let left = if too_late {
            "the file may have its name all the same"
        } else {
            "if it does while this program runs, nothing is left of the file"
        };
        Err(format!("interrupted, and the file system has not answered yet: {left}"))
    };
    Ok((outcome, written))
}

fn chain(error: &SnapshotError) -> String {
    pageferry::Chain::of(error).to_string()
}

/// Runs the guest that a file holds for a while.
pub(crate) fn restore(args: &RestoreArgs) -> Result<Outcome, Failure> {
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in.clone())?;
    let moves = args.onward.migrate_to.is_some() || args.onward.on_demand;
    if moves {
        listen_to_stdin(wishes_in)?;
    }
    let began = Instant::now();
    let (path, backing, clock) = (args.file.clone(), args.backing, args.clock);
    // The file may be a pipe that nobody writes to, which not even opening it would get past.
    let Some(read) = unless_interrupted(&wishes, move || read(&path, backing, clock.into()))?
    else {
        return ended(args.json, "interrupted before the guest ran");
    };
    let (mut guest, read) = read?;
    let took = began.elapsed();
    if !moves {
        run(&mut guest, args.run_for, &wishes)?;
    }
    let mut report = Report::of(&guest, took);
    report.file(read);
    report.print(args.json)?;
    if !moves || report.outcome != Outcome::Completed {
        return Ok(report.outcome);
    }
    resume(&mut guest)?;
    let onward = Onward {
        args: &args.onward,
        run_for: (!args.onward.on_demand).then_some(args.run_for),
        json: args.json,
        timeline: false,
        observers: &Observers::default(),
        wishes: &wishes,
    };
    onward.serve(GuestMachine { guest }, Some(report.outcome))
}

/// Makes the guest that a file holds, which is right before it has done anything here.
fn read(path: &Path, backing: Backing, meanwhile: Meanwhile) -> Result<(Guest, Written), Failure> {
    let name = path.display();
    let file = File::open(path).map_err(|error| format!("failed to open {name}: {error}"))?;
    let (guest, read) = snapshot::restore(&mut BufReader::new(file), backing, meanwhile)
        .map_err(|error| format!("{name}: {}", pageferry::Chain::of(&error)))?;
    let oracle = guest.check_oracle();
    if oracle.ok {
        Ok((guest, read))
    } else {
        Err(format!("the guest in {name} is wrong: {}", oracle.detail).into())
    }
}

/// Ends a command that was told to, before it had a guest.
fn ended(json: bool, why: &str) -> Result<Outcome, Failure> {
    say!("{why}");
    if json {
        print_failure(Outcome::Cancelled, why)?;
    }
    Ok(Outcome::Cancelled)
}

/// Lets the guest run for so long, or until a Ctrl-C, and pauses it.
fn run(guest: &mut Guest, time: Duration, wishes: &Receiver<Wish>) -> Result<(), Failure> {
    resume(guest)?;
    wait_or_quit(wishes, Some(time));
    guest.pause()?;
    match guest.failure() {
        Some(failure) => Err(format!("the guest ended: {failure}").into()),
        None => Ok(()),
    }
}

/// Lets the guest run, and sees it do so.
fn resume(guest: &mut Guest) -> Result<(), Failure> {
    let beats = guest.heartbeat().beats;
    guest.resume()?;
    let beats = guest.await_beats(beats + 10);
    Ok(beats.map_err(|reason| format!("the guest does not run: {reason}"))?)
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
            file_ms: ms(file),
            heartbeats: guest.heartbeat().beats,
            oracle_ok: oracle.ok,
            oracle: oracle.detail,
        }
    }

    /// A guest that is wrong is worse than one that was not saved.
    fn not_saved(&mut self, outcome: Outcome, why: &str) {
        if self.oracle_ok {
            self.outcome = outcome;
        }
        let wrong = self.error.take().map_or_else(String::new, |wrong| format!("; {wrong}"));
        self.error = Some(format!("{why}{wrong}"));
    }

    fn file(&mut self, Written { state_bytes, memory_bytes }: Written) {
        (self.state_bytes, self.memory_bytes) = (state_bytes, memory_bytes);
    }

    fn print(&self, json: bool) -> Result<(), Failure> {
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
