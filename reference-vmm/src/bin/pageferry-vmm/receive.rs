//! `receive`: waits for a guest, and runs it.

use std::sync::Arc;

use crossbeam_channel::{Receiver, unbounded};
use pageferry::memory::GuestMemory;
use pageferry::{Offer, Statistics};
use pageferry_cli::arrival::Reception;
use pageferry_cli::child::end_with_parent;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::report::{GuestAt, Report};
use pageferry_cli::room;
use pageferry_cli::say;
use pageferry_cli::wishes::{Wish, listen_to_signals, wait_or_quit};
use pageferry_tcp::ZeroCopy;
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::guest::{Guest, GuestConfig};
use pageferry_vmm::ram::Backing;
use rustix::process::Signal;

use crate::args::ReceiveArgs;
use crate::report::{check, describe, heartbeat};

pub(crate) fn receive(args: &ReceiveArgs) -> Result<Outcome, Failure> {
    if args.with_parent {
        end_with_parent(Signal::TERM)?;
    }
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in)?;
    let events = args.events.open()?;
    let chosen = args.transport.choose(args.link.tcp(ZeroCopy::default()), &args.rdma)?;
    let transport = chosen.name();
    let (link, pin, populate) = (&args.link, &args.pin, args.populate);
    let reception = Reception { link, pin, populate, events: &events };
    let home = |offer: &Offer| machine_for(args, offer);
    let arrival = match reception.await_guest(chosen, &args.listen, &wishes, home)? {
        Ok(arrival) => arrival,
        Err(why) => return nobody_came(args, transport, why),
    };
    let mut report = arrival.report();
    match arrival.result {
        Ok(arrived) => {
            describe(&mut report, arrived.machine.guest.config());
            run_on(args, arrived.machine.guest, report, &wishes)
        }
        Err(failure) => {
            describe(&mut report, failure.machine.guest.config());
            let outcome = finish(&report, args.json)?;
            if report.guest_at == GuestAt::Unknown {
                keep_copy(&wishes);
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

/// Builds the machine that the source describes.
fn machine_for(
    args: &ReceiveArgs,
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
    let machine = GuestMachine { guest: Guest::create(config)? };
    let memory = machine.memory()?;
    Ok((machine, memory))
}

/// Runs the guest that arrived: for as long as asked, or until told to end.
fn run_on(
    args: &ReceiveArgs,
    mut guest: Guest,
    mut report: Report,
    wishes: &Receiver<Wish>,
) -> Result<Outcome, Failure> {
    let before = guest.heartbeat().beats;
    if guest.await_beats(before + 10).is_err() {
        report.fail("the guest does not beat at the destination".to_owned());
    }
    let Some(time) = args.run_for else {
        heartbeat(&mut report, guest.heartbeat());
        let outcome = finish(&report, args.json)?;
        say!("the guest runs here; Ctrl-C ends it");
        wait_or_quit(wishes, None);
        return Ok(outcome);
    };
    wait_or_quit(wishes, Some(time));
    check(&mut guest, &mut report)?;
    heartbeat(&mut report, guest.heartbeat());
    if args.timeline {
        report.timeline.get_or_insert_default().gaps = guest.heartbeat_gaps();
    }
    finish(&report, args.json)
}

/// The copy of a guest whose owner is unknown is kept until the operator ends this process.
fn keep_copy(wishes: &Receiver<Wish>) {
    say!("the copy is kept, paused; Ctrl-C destroys it");
    wait_or_quit(wishes, None);
}

fn finish(report: &Report, json: bool) -> Result<Outcome, Failure> {
    report.print(json)?;
    Ok(report.outcome)
}
