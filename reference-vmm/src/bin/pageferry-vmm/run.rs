//! `run`: runs a guest, and migrates it away.

use crossbeam_channel::unbounded;
use pageferry_cli::child::end_with_parent;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::say;
use pageferry_cli::wishes::{listen_to_signals, listen_to_stdin};
use pageferry_vmm::choice::decide_tracking;
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::error::GuestError;
use pageferry_vmm::guest::{Guest, GuestConfig, GuestKind};
use pageferry_vmm::ram::Ram;
use pageferry_vmm::tracking::DirtyTracking;
use pageferry_vmm::workload::WorkloadConfig;
use rustix::process::Signal;

use crate::args::{GuestArgs, RunArgs};
use crate::cpu::limited_to;
use crate::onward::Onward;

pub(crate) fn config(args: &GuestArgs) -> Result<GuestConfig, Failure> {
    Ok(GuestConfig {
        kind: args.guest.decide(),
        regions: Ram::pc_regions(args.memory()),
        backing: args.backing,
        vcpus: args.vcpus,
        cpu: limited_to(args.cpu_baseline.as_deref())?,
        workload: WorkloadConfig {
            kind: args.workload,
            working_set_bytes: args.working_set(),
            dirty_rate_pages_per_second: args.dirty_rate,
            seed: args.seed,
        },
    })
}

/// What will track it, once it is known that this host can run it.
pub(crate) fn tracking(args: &GuestArgs, kind: GuestKind) -> Result<DirtyTracking, GuestError> {
    decide_tracking(kind, &[args.workload], args.dirty_source)
}

/// Such a guest, which runs.
pub(crate) fn running(config: GuestConfig, args: &GuestArgs) -> Result<Guest, Failure> {
    let tracking = tracking(args, config.kind)?;
    let mut guest = Guest::create_tracked(config, tracking)?;
    guest.boot()?;
    guest.resume()?;
    guest.await_beats(1).map_err(|reason| format!("the guest did not start: {reason}"))?;
    Ok(guest)
}

pub(crate) fn run(args: &RunArgs) -> Result<Outcome, Failure> {
    if args.with_parent {
        end_with_parent(Signal::TERM)?;
    }
    // A file that it names may be a pipe that nobody writes to: a signal ends that, as long as nobody hears it.
    let config = config(&args.guest)?;
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in.clone())?;
    listen_to_stdin(wishes_in)?;
    let observers = args.observers.open()?;
    let guest = running(config, &args.guest)?;
    // Another virtual CPU may beat before the first one has printed that.
    let mut beats = 1;
    while !guest.serial_output().contains(&b'\n') {
        beats += 1;
        guest.await_beats(beats).map_err(|reason| format!("the guest did not start: {reason}"))?;
    }
    for line in String::from_utf8_lossy(&guest.serial_output()).lines() {
        say!("guest: {line}");
    }
    let onward = Onward {
        args: &args.onward,
        run_for: args.run_for,
        json: args.json,
        timeline: args.timeline,
        observers: &observers,
        wishes: &wishes,
    };
    onward.serve(GuestMachine { guest }, None)
}
