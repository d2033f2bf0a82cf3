//! `compare-guests`: guests of QEMU that run and write, moved by QEMU itself and by pageferry, in turn.

mod args;
mod cpu;
mod interrupt;
mod own;
mod qemu;
mod report;
mod stage;

use std::cell::Cell;

use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::say;
use pageferry_cli::transport::facts::transports;
use pageferry_qemu::testing::{Guests, qemu_version};
use pageferry_report::document::{Missing, ms};
use pageferry_report::facts::Facts;

use self::interrupt::Interrupt;
use self::own::Own;
use self::qemu::Qemu;
use self::report::{Contestant, Report};
use self::stage::{Mover, play};
use crate::host;
use crate::links::Way;
use crate::output::{self, SCHEMA};

pub(crate) use args::{CompareGuestsArgs, EXAMPLES, METHOD};

/// Measures, and prints the result.
pub(crate) fn run(args: &CompareGuestsArgs) -> Result<Outcome, Failure> {
    host::check_room_for_two(args.memory, pageferry_vmm::ram::Backing::Memfd)?;
    let interrupt = Interrupt::listen()?;
    match compare(args, &interrupt) {
        Ok(Some(report)) => {
            output::report(&report, &report.table(), args.json)?;
            match report.wrong_of_pageferry() {
                Some(wrong) => Err(wrong.into()),
                None => Ok(Outcome::Completed),
            }
        }
        Err(error) if !interrupt.came() => Err(error),
        Ok(None) | Err(_) => {
            say!("cancelled");
            Ok(Outcome::Cancelled)
        }
    }
}

/// Nothing if it was interrupted.
fn compare(args: &CompareGuestsArgs, interrupt: &Interrupt) -> Result<Option<Report>, Failure> {
    let (Some(pages), Some(mebibytes)) = (args.pages(), args.mebibytes()) else {
        return Err("sizes that a guest cannot have".into());
    };
    let mut guests = Guests::try_build(pages)?;
    guests.ram = vec![("ram", mebibytes)];
    guests.vcpus = args.vcpus;
    guests.rest_us = 0;
    guests.beats = true;

    let downtime_limit = args.downtime_limit.0;
    let mut movers: Vec<Box<dyn Mover>> = Vec::new();
    for transport in &args.transport {
        let way = Way { transport: *transport, rdma: args.rdma };
        movers.push(Box::new(Own { way, channels: args.channels, downtime_limit }));
    }
    for multifd in [None, Some(args.channels)] {
        movers.push(Box::new(Qemu { multifd, downtime_limit }));
    }

    let played = Cell::new(0);
    let play = |mover: &dyn Mover| {
        played.set(played.get() + 1);
        play(&guests, mover, played.get(), interrupt)
    };
    let mut contestants: Vec<_> =
        movers.iter().map(|mover| Contestant { name: mover.name(), moves: Vec::new() }).collect();
    let mut missing: Vec<Missing> = Vec::new();
    for round in 0..usize::from(args.rounds) {
        // In turn, and every time another one is first, so that what changes slowly on this host
        // changes for all.
        for turn in 0..movers.len() {
            let index = (turn + round) % movers.len();
            let name = &contestants[index].name;
            if missing.iter().any(|missing| missing.name == *name) {
                continue;
            }
            if interrupt.came() {
                return Ok(None);
            }
            match play(&*movers[index]) {
                Ok(moved) => {
                    let standstill = moved
                        .standstill_ms
                        .map_or("for good".to_owned(), |standstill| format!("{standstill:.0} ms"));
                    say!(
                        "round {} of {}: {name}: {:.0} ms, downtime {:.0} ms, standstill {standstill}{}",
                        round + 1,
                        args.rounds,
                        moved.total_ms,
                        moved.downtime_ms,
                        if moved.oracle_ok { "" } else { "; the guest's memory was WRONG there" }
                    );
                    contestants[index].moves.push(moved);
                }
                Err(_) if interrupt.came() => return Ok(None),
                // The others go on.
                Err(why) => {
                    let why = pageferry::Chain::of(&*why).to_string();
                    say!("MISSING from now on: {name}: {why}");
                    missing.push(Missing { name: name.clone(), why });
                }
            }
        }
    }
    contestants.retain(|contestant| !contestant.moves.is_empty());
    Ok(Some(Report {
        schema: SCHEMA,
        facts: Facts::here(transports()),
        qemu: qemu_version()?,
        memory_bytes: args.memory,
        working_set_bytes: args.working_set,
        vcpus: args.vcpus,
        channels: args.channels,
        downtime_limit_ms: ms(downtime_limit),
        contestants,
        missing,
    }))
}
