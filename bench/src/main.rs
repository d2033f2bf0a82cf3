//! `pageferry-bench`: measures the engine against the least that would do the same job.
//!
//! - `throughput` moves guest memory between two processes of this host, by the engine and by a
//!   bare loop of system calls in turn, and compares them.
//! - `runs` sends runs of pages of each length, copied by the kernel and zero-copy.
//! - `rearm` re-arms KVM's dirty log as a sender does, and by bare loops.
//! - `bitmap` does what the engine does with dirty bitmaps, and compares it with reading them.
//! - `latency` measures how long a batch, a page, a control frame and the commit take.
//! - `migrate` moves guests live, over everything that makes a difference.
//! - `compare` has the engine, the bare loop and others move the same memory in turn.
//! - `compare-guests` has pageferry and QEMU itself move running guests of QEMU in turn.
//! - `report` makes one page of plots of all of it.
//! - `hot` does an inner loop of the engine alone; `gate` compares two builds by it.
//! - `device-state` saves the state of many vCPUs, and encodes and decodes a large device.
//! - `simulate` has the engine's convergence machines migrate modelled guests by the thousand.
//!
//! Progress and errors go to stderr, the result to stdout: a table, or with `--json` one object
//! whose fields are a contract (added to, never repurposed; `schema` counts what breaks it).

mod args;
mod bitmap;
mod compare;
mod compare_guests;
mod cpus;
mod device_state;
mod gate;
mod host;
mod hot;
mod latency;
mod links;
mod load;
mod migrate;
mod output;
mod page;
mod perftest;
mod qemu;
mod random;
mod rearm;
mod runs;
mod sides;
mod simulate;
mod throughput;
mod transfer;
mod usage;
mod words;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use args::{Cli, Command, Measurement};

use pageferry_cli::outcome::Outcome;
use pageferry_cli::say;

fn main() -> std::process::ExitCode {
    pageferry_cli::log::to_stderr();
    let command = Cli::parse().command;
    if let Err(complaint) = command.check() {
        Cli::command().error(ErrorKind::ValueValidation, complaint).exit();
    }
    let result = match command {
        Command::Throughput(args) => throughput::run(&args),
        Command::Runs(args) => runs::run(&args),
        Command::Bitmap(args) => bitmap::run(&args),
        Command::Rearm(args) => rearm::run(&args),
        Command::Latency(args) => latency::run(&args),
        Command::Migrate(args) => migrate::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::CompareGuests(args) => compare_guests::run(&args),
        Command::Report(args) => page::run(&args),
        Command::Hot(args) => hot::run(&args),
        Command::Gate(args) => gate::run(&args),
        Command::DeviceState(args) => device_state::run(&args),
        Command::Simulate(args) => simulate::run(&args),
        Command::Side { of: Measurement::Transfer, side } => transfer::serve(side),
        Command::Side { of: Measurement::Latency, .. } => latency::serve(),
        Command::Side { of: Measurement::Migration, .. } => migrate::serve(),
    };
    let outcome = result.unwrap_or_else(|error| {
        say!("error: {}", pageferry::Chain::of(&*error));
        Outcome::Failed
    });
    outcome.exit_code()
}
