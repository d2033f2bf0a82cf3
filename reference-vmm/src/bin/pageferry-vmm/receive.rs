//! `receive`: waits for a guest, and runs it.

use std::sync::Arc;

use crossbeam_channel::unbounded;
use pageferry::memory::GuestMemory;
use pageferry::{Offer, Statistics};
use pageferry_cli::arrival::Reception;
use pageferry_cli::child::end_with_parent;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::report::{GuestAt, Report};
use pageferry_cli::room;
use pageferry_cli::say;
use pageferry_cli::wishes::{listen_to_signals, listen_to_stdin, wait_or_quit};
use pageferry_rust_vmm::cpu::CpuProfile;
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::guest::{Guest, GuestConfig, GuestKind};
use pageferry_vmm::ram::Backing;
use rustix::process::Signal;

use crate::args::ReceiveArgs;
use crate::cpu::limited_to;
use crate::onward::Onward;
use crate::report::{check, describe, heartbeat};
use crate::uncertain;

pub(crate) fn receive(args: &ReceiveArgs) -> Result<Outcome, Failure> {
    if args.with_parent {
        end_with_parent(Signal::TERM)?;
    }
    let most = limited_to(args.cpu_baseline.as_deref())?;
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in.clone())?;
    listen_to_stdin(wishes_in)?;
    let observers = args.observers.open()?;
    let migration = &args.onward.migration;
    let chosen = migration.choose()?;
    let transport = chosen.name();
    let (link, pin, populate) = (&migration.link, &migration.pin, args.populate);
    let reception = Reception { link, pin, populate, observers: &observers };
    let home = |offer: &Offer| machine_for(args, most.as_ref(), offer);
    let arrival = match reception.await_guest(chosen, &args.listen, &wishes, home)? {
        Ok(arrival) => arrival,
        Err(why) => return nobody_came(args, transport, why),
    };
    let mut report = arrival.report();
    let onward = Onward {
        args: &args.onward,
        run_for: args.run_for,
        json: args.json,
        timeline: args.timeline,
        observers: &observers,
        wishes: &wishes,
    };
    match arrival.result {
        Ok(arrived) => {
            describe(&mut report, arrived.machine.guest.config());
            run_on(args, arrived.machine, report, &onward)
        }
        Err(failure) => {
            let mut machine = failure.machine;
            describe(&mut report, machine.guest.config());
            let outcome = finish(&report, args.json)?;
            if report.guest_at == GuestAt::Unknown
                && uncertain::decide(&mut machine.guest, &wishes)?
            {
                say!("the guest runs here; Ctrl-C ends it, \"migrate ADDR\" moves it on");
                return onward.serve(machine, Some(outcome));
            }
            Ok(outcome)
        }
    }
}

/// Ends a destination that was told to, before a guest was on its way.
fn nobody_came(args: &ReceiveArgs, transport: &str, why: String) -> Result<Outcome, Failure> {
    say!("{why}");
    let (ended, memory_bytes) = (Outcome::Cancelled, args.memory.unwrap_or_default());
    let statistics = Statistics::default();
    let mut report = Report::new(ended, GuestAt::Source, transport, 0, memory_bytes, &statistics);
    report.error = Some(why);
    finish(&report, args.json)
}

/// Builds the machine that the source describes, with no more in its virtual CPUs than that.
fn machine_for(
    args: &ReceiveArgs,
    most: Option<&CpuProfile>,
    offer: &Offer,
) -> Result<(GuestMachine, Arc<GuestMemory>), Failure> {
    let memory_bytes = offer.layout().len_bytes();
    if let Some(wanted) = args.memory
        && wanted != memory_bytes
    {
        return Err(format!(
            "the source has {memory_bytes} bytes of guest memory, --memory here takes only {wanted}"
        )
        .into());
    }
    if args.memory.is_none() {
        let huge = (args.backing == Backing::Hugetlb).then_some(args.backing.page_bytes());
        room::check(memory_bytes, huge).map_err(|error| {
            format!("{error}; --memory {memory_bytes} here takes it all the same")
        })?;
    }
    let mut config: GuestConfig = serde_json::from_slice(offer.description()).map_err(|error| {
        format!("the source's description of the guest makes no sense: {error}")
    })?;
    let described: Vec<_> = config.regions.clone();
    let offered =
        offer.layout().regions().iter().map(|region| (region.guest_addr, region.len_bytes));
    if !offered.eq(described) {
        return Err("the source's description of the guest does not fit its memory map".into());
    }
    config.backing = args.backing;
    match (&config.cpu, most) {
        (Some(had), Some(most)) => had.check_on(most)?,
        (None, Some(_)) if config.kind == GuestKind::Kvm => {
            return Err("the source does not say what the guest's virtual CPUs are made of".into());
        }
        _ => {}
    }
    let machine = GuestMachine { guest: Guest::create(config)? };
    let memory = machine.memory()?;
    Ok((machine, memory))
}

/// Runs the guest that arrived: for as long as asked, or until it has moved on or is told to end.
fn run_on(
    args: &ReceiveArgs,
    mut machine: GuestMachine,
    mut report: Report,
    onward: &Onward<'_>,
) -> Result<Outcome, Failure> {
    let guest = &mut machine.guest;
    let before = guest.heartbeat().beats;
    let paused = guest.is_paused();
    if !paused && guest.await_beats(before + 10).is_err() {
        report.fail("the guest does not beat at the destination".to_owned());
    }
    if let (Some(time), false) = (args.run_for, args.onward.is_planned()) {
        wait_or_quit(onward.wishes, Some(time));
        check(guest, &mut report)?;
        heartbeat(&mut report, guest.heartbeat());
        if args.timeline {
            report.timeline.get_or_insert_default().gaps = guest.heartbeat_gaps();
        }
        return finish(&report, args.json);
    }
    heartbeat(&mut report, guest.heartbeat());
    let outcome = finish(&report, args.json)?;
    if paused {
        say!("the guest is paused here, as it was; \"resume\" lets it run, Ctrl-C ends it");
    } else {
        say!("the guest runs here; Ctrl-C ends it, \"migrate ADDR\" moves it on");
    }
    onward.serve(machine, Some(outcome))
}

fn finish(report: &Report, json: bool) -> Result<Outcome, Failure> {
    report.print(json)?;
    Ok(report.outcome)
}
