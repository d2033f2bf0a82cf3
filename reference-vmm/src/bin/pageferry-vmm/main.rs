//! `pageferry-vmm`: runs a small KVM guest and migrates it live.

/// As `eprintln!`, but in one write, since several processes may share stderr; and if nobody reads
/// it any more, that is no reason for a guest to end.
macro_rules! say {
    ($($message:tt)+) => {{
        let line = format!("{}\n", format_args!($($message)+));
        let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
    }};
}

mod args;
mod demo;
mod inspect;
mod links;
mod outcome;
mod receive;
mod report;
mod resident;
mod run;
mod saved;
mod schema;
mod signals;
mod timeline;
mod watch;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use args::{Cli, Command};
use outcome::Outcome;

fn main() -> ExitCode {
    pageferry_vmm::log::to_stderr();
    let command = Cli::parse().command;
    if let Err(complaint) = command.check() {
        Cli::command().error(ErrorKind::ValueValidation, complaint).exit();
    }
    let result = match command {
        Command::Demo(args) => demo::demo(&args),
        Command::Run(args) => run::run(&args),
        Command::Receive(args) => receive::receive(&args),
        Command::Save(args) => saved::save(&args),
        Command::Restore(args) => saved::restore(&args),
        Command::Schema(command) => schema::schema(&command),
        Command::Inspect(args) => inspect::inspect(&args),
    };
    match result {
        Ok(outcome) => outcome.exit_code(),
        Err(error) => {
            say!("error: {}", pageferry::Chain::of(&*error));
            Outcome::Failed.exit_code()
        }
    }
}
