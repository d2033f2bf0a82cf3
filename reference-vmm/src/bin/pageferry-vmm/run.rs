//! `run`: runs a guest, and migrates it away.

use std::error::Error;
use std::thread;

use crossbeam_channel::{Receiver, after, bounded, never, select, unbounded};
use pageferry::machine::MachineOperation;
use pageferry::{Departed, GuestAtSource, Source, SourceFailure, Statistics};
use pageferry_tcp::{TcpOptions, connect};
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::guest::{Guest, GuestConfig};
use pageferry_vmm::ram::Ram;
use pageferry_vmm::workload::WorkloadConfig;

use crate::args::{GuestArgs, MigrationArgs, RunArgs, Transport};
use crate::outcome::Outcome;
use crate::receive::{await_beats, wait_or_quit};
use crate::report::{GuestAt, Report};
use crate::signals::{Wish, listen_to_signals, listen_to_stdin};
use crate::watch::Watch;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

pub(crate) fn config(args: &GuestArgs) -> GuestConfig {
    GuestConfig {
        kind: args.guest.decide(),
        regions: Ram::pc_regions(args.memory),
        backing: args.backing,
        vcpus: args.vcpus,
        workload: WorkloadConfig {
            kind: args.workload,
            working_set_bytes: args.working_set,
            dirty_rate_pages_per_second: args.dirty_rate,
            seed: args.seed,
        },
    }
}

pub(crate) fn run(args: &RunArgs) -> Result<Outcome> {
    if args.with_parent {
        crate::demo::end_with_parent()?;
    }
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in.clone())?;
    listen_to_stdin(wishes_in)?;
    let mut guest = Guest::create(config(&args.guest))?;
    guest.boot()?;
    guest.resume()?;
    if !await_beats(&guest, 1) {
        let reason = guest.failure().unwrap_or_else(|| "it does not beat".to_owned());
        return Err(format!("the guest did not start: {reason}").into());
    }
    for line in String::from_utf8_lossy(&guest.serial_output()).lines() {
        eprintln!("guest: {line}");
    }
    serve(args, GuestMachine { guest }, &wishes)
}

/// Does what the operator wishes until the guest is gone or told to end.
fn serve(args: &RunArgs, mut machine: GuestMachine, wishes: &Receiver<Wish>) -> Result<Outcome> {
    let by_itself = args.migrate_to.is_some() && !args.on_demand;
    let mut timer = if by_itself { after(args.migrate_after) } else { never() };
    let mut last = Outcome::Completed;
    loop {
        let wish = select! {
            recv(timer) -> _ => Wish::Migrate(None),
            recv(wishes) -> wish => wish?,
        };
        match wish {
            Wish::Interrupt | Wish::Quit => return Ok(last),
            Wish::Cancel => eprintln!("no migration is under way"),
            Wish::Status => status(&machine.guest),
            Wish::Migrate(address) => {
                timer = never();
                let Some(address) = address.or_else(|| args.migrate_to.clone()) else {
                    eprintln!("migrate where to? say \"migrate HOST:PORT\"");
                    continue;
                };
                let (report, left) = migrate(args, machine, &address, wishes)?;
                last = report.outcome;
                match left {
                    None => {
                        report.print(args.json)?;
                        return Ok(last);
                    }
                    Some(left) => {
                        machine = left;
                        if stay(args, &mut machine.guest, report, wishes)? {
                            return Ok(last);
                        }
                    }
                }
            }
        }
    }
}

fn status(guest: &Guest) {
    let beats = guest.heartbeat().beats;
    match guest.failure() {
        Some(failure) => eprintln!("the guest ended after {beats} heartbeats: {failure}"),
        None => eprintln!("the guest runs here, {beats} heartbeats so far"),
    }
}

/// Migrates the guest, on a thread of its own so that wishes are heard meanwhile. Gives the
/// machine back if the guest is still here.
fn migrate(
    args: &RunArgs,
    machine: GuestMachine,
    address: &str,
    wishes: &Receiver<Wish>,
) -> Result<(Report, Option<GuestMachine>)> {
    let migration = &args.migration;
    let config = machine.guest.config().clone();
    let source = Source::new()
        .channels(migration.channels)
        .downtime_limit(migration.downtime_limit)
        .max_rounds(migration.max_rounds)
        .verify(args.verify)
        .description(serde_json::to_vec(&config)?);
    let handle = source.handle();
    let watch = Watch::start(handle.clone())?;
    let source = source.on_event(watch.sink());
    machine.guest.reset_heartbeat_gap();
    let (done, ended) = bounded(1);
    let result = thread::scope(|scope| {
        scope.spawn(move || {
            // The receiver waits below for just this.
            let _ = done.send(depart(source, machine, address, migration));
        });
        loop {
            select! {
                recv(ended) -> result => break result,
                recv(wishes) -> wish => match wish {
                    Ok(Wish::Interrupt | Wish::Cancel) => {
                        eprintln!("cancelling; the guest stays here unless it is gone already");
                        handle.cancel();
                    }
                    Ok(Wish::Quit) => eprintln!("a migration is under way: cancel it first"),
                    Ok(_) => eprintln!("a migration is under way"),
                    Err(_) => {}
                }
            }
        }
    })?;
    drop(watch);
    let memory_bytes: u64 = config.regions.iter().map(|(_, len_bytes)| len_bytes).sum();
    let report = |outcome, at, statistics: &Statistics| {
        let mut report =
            Report::new(outcome, at, "tcp", migration.channels, memory_bytes, statistics);
        report.guest(&config);
        report.limit(migration);
        report
    };
    Ok(match result {
        Ok(departed) => {
            let mut report = report(Outcome::Completed, GuestAt::Destination, &departed.statistics);
            report.memory_match = args.verify.then_some(true);
            (report, None)
        }
        Err(failure) => {
            let SourceFailure { machine, guest, error, statistics } = *failure;
            let at = match &guest {
                GuestAtSource::Running => GuestAt::Source,
                GuestAtSource::Paused(_) => GuestAt::Paused,
                _ => GuestAt::Unknown,
            };
            let mut report = report(Outcome::of(&error), at, &statistics);
            report.error = Some(error.chain().to_string());
            if matches!(error, pageferry::Error::MemoryDiffers { .. }) {
                report.memory_match = Some(false);
            }
            if let GuestAtSource::Paused(why) = guest {
                eprintln!("error: the guest could not be resumed: {}", why.chain());
            }
            (report, Some(machine))
        }
    })
}

/// Connects and hands the guest to the engine.
fn depart(
    source: Source,
    machine: GuestMachine,
    address: &str,
    migration: &MigrationArgs,
) -> std::result::Result<Departed<GuestMachine>, Box<SourceFailure<GuestMachine>>> {
    let prepared = || -> std::result::Result<_, pageferry::Error> {
        let refused =
            |cause| pageferry::Error::Machine { operation: MachineOperation::Describe, cause };
        let memory = machine.memory().map_err(refused)?;
        let dirty = machine.dirty_sources(&memory).map_err(refused)?;
        let Transport::Tcp = migration.transport;
        let link = connect(address, TcpOptions::default())?;
        Ok((memory, dirty, link))
    };
    match prepared() {
        Ok((memory, dirty, link)) => source.migrate(machine, &memory, dirty, Box::new(link)),
        // Nothing has touched the guest yet.
        Err(error) => Err(Box::new(SourceFailure {
            machine,
            guest: GuestAtSource::Running,
            error,
            statistics: Statistics::default(),
        })),
    }
}

/// After a migration that failed: shows that the guest goes on, and reports. Returns whether the
/// program should end.
fn stay(
    args: &RunArgs,
    guest: &mut Guest,
    mut report: Report,
    wishes: &Receiver<Wish>,
) -> Result<bool> {
    if report.guest_at != GuestAt::Source {
        report.heartbeat(guest.heartbeat());
        report.print(args.json)?;
        eprintln!("the guest's copy is kept here, paused; Ctrl-C destroys it");
        wait_or_quit(wishes, None);
        return Ok(true);
    }
    let beats = guest.heartbeat().beats;
    if !await_beats(guest, beats + 10) {
        report.fail("the guest does not beat any more".to_owned());
    }
    if let Some(time) = args.run_for {
        wait_or_quit(wishes, Some(time));
        guest.pause()?;
        report.oracle(&guest.check_oracle());
    }
    report.heartbeat(guest.heartbeat());
    report.print(args.json)?;
    if args.run_for.is_some() {
        return Ok(true);
    }
    eprintln!("the guest runs on here; \"migrate [ADDR]\" tries again, Ctrl-C ends it");
    Ok(false)
}
