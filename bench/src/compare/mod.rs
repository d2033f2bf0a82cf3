//! `compare`: the engine, the bare loop, and whoever else this machine has, in turn in one run.

mod args;
mod iperf;
mod own;
mod perftest;
mod process;
mod qemu;

use comfy_table::{Cell, CellAlignment};
use indicatif::HumanBytes;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::say;
use pageferry_cli::transport::facts::transports;
use pageferry_report::document::{Comparison, Contestant, Document, Kind, Missing, median};
use pageferry_report::facts::Facts;

use crate::host;
use crate::output;
use crate::perftest::{READ, WRITE};
use crate::sides::{self, NoAnswer};

pub(crate) use args::{CompareArgs, EXAMPLES, METHOD};

/// Somebody who moves memory.
trait Mover {
    fn name(&self) -> String;

    /// Moves it once. In gigabits of it a second.
    fn measure(&mut self) -> Result<f64, Failure>;
}

/// Measures, and prints the result.
pub(crate) fn run(args: &CompareArgs) -> Result<Outcome, Failure> {
    host::check_room_for_two(args.memory, args.backing)?;
    let facts = Facts::here(transports());
    sides::outcome(compare(args).and_then(|comparison| {
        let mut document = Document::new(Kind::Compare, facts);
        document.comparisons.push(comparison);
        output::report(&document, &table(&document.comparisons[0]), args.json)
    }))
}

fn compare(args: &CompareArgs) -> Result<Comparison, Failure> {
    let (mut movers, mut missing) = (Vec::new(), Vec::new());
    for transport in &args.transport {
        movers.push(own::engine(args, *transport)?);
    }
    movers.push(own::bare(args)?);
    for (name, peer) in [
        (iperf::NAME, iperf::find(args)),
        (WRITE, perftest::find(args, WRITE)),
        (READ, perftest::find(args, READ)),
    ] {
        match peer {
            Ok(mover) => movers.push(mover),
            Err(why) => lack(&mut missing, name, &why),
        }
    }
    match qemu::find(args) {
        Ok(both) => movers.extend(both),
        Err(why) => lack(&mut missing, "QEMU", &why),
    }
    let names: Vec<_> = movers.iter().map(|mover| mover.name()).collect();
    let mut gbps = vec![Vec::new(); movers.len()];
    // Not counted: the first to touch memory that nobody used before pays for it. Who cannot do it
    // at all shows here, and the others go on.
    let mut able = Vec::new();
    for (index, mover) in movers.iter_mut().enumerate() {
        match mover.measure() {
            Ok(_) => able.push(index),
            Err(error) if matches!(error.downcast_ref(), Some(NoAnswer::Cancelled)) => {
                return Err(error);
            }
            Err(error) => lack(&mut missing, &names[index], &error),
        }
    }
    for round in 0..usize::from(args.rounds) {
        // In turn, and every time another one is first, so that what changes slowly on this host
        // changes for all.
        for turn in 0..able.len() {
            let index = able[(turn + round) % able.len()];
            let figure = movers[index].measure()?;
            say!("round {} of {}: {} {figure:.2} Gb/s", round + 1, args.rounds, names[index]);
            gbps[index].push(figure);
        }
    }
    let contestants = able.into_iter().map(|index| Contestant {
        name: names[index].clone(),
        gbps: std::mem::take(&mut gbps[index]),
    });
    Ok(Comparison {
        title: format!(
            "{} of {} memory, {} channels",
            HumanBytes(args.memory),
            args.backing,
            args.channels
        ),
        contestants: contestants.collect(),
        missing,
    })
}

fn lack(missing: &mut Vec<Missing>, name: &str, why: &Failure) {
    let why = pageferry::Chain::of(&**why).to_string();
    say!("MISSING: {name}: {why}");
    missing.push(Missing { name: name.to_owned(), why });
}

fn table(comparison: &Comparison) -> comfy_table::Table {
    let mut table = output::table();
    table.set_header([comparison.title.as_str(), "median", "least", "most"]);
    for Contestant { name, gbps } in &comparison.contestants {
        let least = gbps.iter().copied().reduce(f64::min);
        let most = gbps.iter().copied().reduce(f64::max);
        let mut cells = vec![Cell::new(name)];
        cells.extend([median(gbps.iter().copied()), least, most].map(|figure| {
            let text = figure.map_or_else(|| "-".to_owned(), |gbps| format!("{gbps:.2} Gb/s"));
            Cell::new(text).set_alignment(CellAlignment::Right)
        }));
        table.add_row(cells);
    }
    for Missing { name, why } in &comparison.missing {
        table.add_row([Cell::new(name), Cell::new(format!("MISSING: {why}"))]);
    }
    table
}
