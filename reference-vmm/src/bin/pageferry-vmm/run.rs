//! `run`: runs a guest, and migrates it away.

use crossbeam_channel::{Receiver, after, never, select_biased, unbounded};
use pageferry::Statistics;
use pageferry_cli::child::end_with_parent;
use pageferry_cli::departure::{Departure, Gone};
use pageferry_cli::events::Events;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::report::{GuestAt, Report, Timeline};
use pageferry_cli::say;
use pageferry_cli::wishes::{Wish, listen_to_signals, listen_to_stdin, wait_or_quit};
use pageferry_vmm::choice::decide_tracking;
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::error::GuestError;
use pageferry_vmm::guest::{Guest, GuestConfig, GuestKind};
use pageferry_vmm::ram::Ram;
use pageferry_vmm::tracking::DirtyTracking;
use pageferry_vmm::workload::WorkloadConfig;
use rustix::process::Signal;

use crate::args::{GuestArgs, RunArgs};
use crate::report::{check, describe, heartbeat, of_source};

pub(crate) fn config(args: &GuestArgs) -> GuestConfig {
    GuestConfig {
        kind: args.guest.decide(),
        regions: Ram::pc_regions(args.memory()),
        backing: args.backing,
        vcpus: args.vcpus,
        workload: WorkloadConfig {
            kind: args.workload,
            working_set_bytes: args.working_set(),
            dirty_rate_pages_per_second: args.dirty_rate,
            seed: args.seed,
        },
    }
}

/// What will track it, once it is known that this host can run it.
pub(crate) fn tracking(args: &GuestArgs, kind: GuestKind) -> Result<DirtyTracking, GuestError> {
    decide_tracking(kind, &[args.workload], args.dirty_source)
}

pub(crate) fn run(args: &RunArgs) -> Result<Outcome, Failure> {
    if args.with_parent {
        end_with_parent(Signal::TERM)?;
    }
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in.clone())?;
    listen_to_stdin(wishes_in)?;
    let events = args.events.open()?;
    let config = config(&args.guest);
    let tracking = tracking(&args.guest, config.kind)?;
    let mut guest = Guest::create_tracked(config, tracking)?;
    guest.boot()?;
    guest.resume()?;
    guest.await_beats(1).map_err(|reason| format!("the guest did not start: {reason}"))?;
    for line in String::from_utf8_lossy(&guest.serial_output()).lines() {
        say!("guest: {line}");
    }
    serve(args, GuestMachine { guest }, &events, &wishes)
}

/// Does what the operator wishes until the guest is gone or told to end.
fn serve(
    args: &RunArgs,
    mut machine: GuestMachine,
    events: &Events,
    wishes: &Receiver<Wish>,
) -> Result<Outcome, Failure> {
    let planned = args.migrate_to.is_some() && !args.on_demand;
    let mut timer = if planned { after(args.migrate_after) } else { never() };
    let mut last = None;
    loop {
        let wish = select_biased! {
            recv(wishes) -> wish => wish?,
            recv(timer) -> _ => Wish::Migrate(None),
        };
        match wish {
            Wish::Interrupt | Wish::Quit => {
                if let Some(last) = last {
                    return Ok(last);
                }
                // There will be none: whoever waits for its report is told.
                let report = called_off(args, &mut machine.guest)?;
                report.print(args.json)?;
                return Ok(report.outcome);
            }
            Wish::Cancel
            | Wish::Limit(_)
            | Wish::SwitchoverBandwidth(_)
            | Wish::DowntimeLimit(_)
            | Wish::DowntimeBound(_)
            | Wish::NotConverging(_)
            | Wish::Channels(_) => say!("no migration is under way"),
            Wish::Status => status(&machine.guest),
            Wish::Migrate(address) => {
                timer = never();
                let Some(address) = address.or_else(|| args.migrate_to.clone()) else {
                    say!("migrate where to? say \"migrate HOST:PORT\"");
                    continue;
                };
                let (report, left) = migrate(args, machine, &address, events, wishes)?;
                let outcome = report.outcome;
                last = Some(outcome);
                match left {
                    None => {
                        report.print(args.json)?;
                        return Ok(outcome);
                    }
                    Some(left) => {
                        machine = left;
                        if stay(args, &mut machine.guest, report, wishes)? {
                            return Ok(outcome);
                        }
                    }
                }
            }
        }
    }
}

/// The report of a migration that was cancelled before it began.
fn called_off(args: &RunArgs, guest: &mut Guest) -> Result<Report, Failure> {
    let mut report = of_source(
        (Outcome::Cancelled, GuestAt::Source),
        args.migration.transport.name(),
        (guest.config(), guest.tracking()),
        &args.migration,
        &Statistics::default(),
    );
    report.error = Some("cancelled before the migration began".to_owned());
    if args.run_for.is_some() {
        check(guest, &mut report)?;
    }
    heartbeat(&mut report, guest.heartbeat());
    Ok(report)
}

fn status(guest: &Guest) {
    let beats = guest.heartbeat().beats;
    if let Some(failure) = guest.failure() {
        say!("the guest ended after {beats} heartbeats: {failure}");
    } else {
        say!("the guest runs here, {beats} heartbeats so far");
    }
}

/// Migrates the guest. Gives the machine back if the guest is still here.
fn migrate(
    args: &RunArgs,
    machine: GuestMachine,
    address: &str,
    events: &Events,
    wishes: &Receiver<Wish>,
) -> Result<(Report, Option<GuestMachine>), Failure> {
    let migration = &args.migration;
    let config = machine.guest.config().clone();
    let tracking = machine.guest.tracking().to_string();
    let departure = Departure {
        migration,
        description: serde_json::to_vec(&config)?,
        memory_bytes: config.memory_bytes(),
        verify: args.verify,
        record: args.timeline,
        events,
    };
    machine.guest.reset_heartbeat_gap();
    let describe_memory = |machine: &GuestMachine| {
        let memory = machine.memory()?;
        let dirty = machine.dirty_sources(&memory)?;
        Ok((memory, dirty))
    };
    let Gone { mut report, statistics, machine, recorder } =
        departure.migrate(machine, describe_memory, address, wishes)?;
    describe(&mut report, &config);
    report.timeline = recorder.map(|recorder| {
        let setting = config.setting(&report.transport, migration.channels, &tracking);
        let timeline = Timeline::of_source(recorder, setting, &statistics);
        Timeline { gaps: machine.guest.heartbeat_gaps(), ..timeline }
    });
    report.dirty_source = Some(tracking);
    let left = (report.outcome != Outcome::Completed).then_some(machine);
    Ok((report, left))
}

/// After a migration that failed: shows that the guest goes on, and reports. Returns whether the
/// program should end.
fn stay(
    args: &RunArgs,
    guest: &mut Guest,
    mut report: Report,
    wishes: &Receiver<Wish>,
) -> Result<bool, Failure> {
    if report.guest_at != GuestAt::Source {
        heartbeat(&mut report, guest.heartbeat());
        report.print(args.json)?;
        say!("the guest's copy is kept here, paused; Ctrl-C destroys it");
        wait_or_quit(wishes, None);
        return Ok(true);
    }
    let beats = guest.heartbeat().beats;
    if guest.await_beats(beats + 10).is_err() {
        report.fail("the guest does not beat any more".to_owned());
    }
    if let Some(time) = args.run_for {
        wait_or_quit(wishes, Some(time));
        check(guest, &mut report)?;
    }
    heartbeat(&mut report, guest.heartbeat());
    report.print(args.json)?;
    if args.run_for.is_some() {
        return Ok(true);
    }
    say!("the guest runs on here; \"migrate [ADDR]\" tries again, Ctrl-C ends it");
    Ok(false)
}
