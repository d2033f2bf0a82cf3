//! `pageferry-vmm`: runs a small KVM guest and migrates it live.

mod args;
mod check;
mod cpu;
mod demo;
mod inspect;
mod onward;
mod receive;
mod report;
mod run;
mod saved;
mod schema;
mod uncertain;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use args::{CheckArgs, Cli, Command, RestoreArgs, SaveArgs};
use pageferry_cli::outcome::Outcome;
use pageferry_cli::report::Report;
use pageferry_cli::say;

fn main() -> ExitCode {
    pageferry_cli::log::to_stderr();
    let command = Cli::parse().command;
    if let Err(complaint) = command.check() {
        Cli::command().error(ErrorKind::ValueValidation, complaint).exit();
    }
    match run(&command) {
        Ok(outcome) => outcome.exit_code(),
        Err(error) => {
            let why = pageferry::Chain::of(&*error).to_string();
            say!("error: {why}");
            if let Err(error) = report_failure(&command, why) {
                say!("failed to print the report: {error}");
            }
            Outcome::Failed.exit_code()
        }
    }
}

fn run(command: &Command) -> Result<Outcome, Box<dyn std::error::Error + Send + Sync>> {
    match command {
        Command::Demo(args) => demo::demo(args),
        Command::Run(args) => run::run(args),
        Command::Receive(args) => receive::receive(args),
        Command::Save(args) => saved::save(args),
        Command::Restore(args) => saved::restore(args),
        Command::Check(args) => check::check(args),
        Command::Cpu(args) => cpu::cpu(args),
        Command::Schema(command) => schema::schema(command),
        Command::Inspect(args) => inspect::inspect(args),
    }
}

/// With `--json` there is an object on stdout however a command ends: here of one that failed before
/// it had one to print.
fn report_failure(command: &Command, why: String) -> Result<(), serde_json::Error> {
    let (json, transport) = match command {
        Command::Demo(args) => (args.json, args.migration.transport),
        Command::Run(args) => (args.json, args.onward.migration.transport),
        Command::Receive(args) => (args.json, args.onward.migration.transport),
        Command::Check(CheckArgs { json: true, migration, .. }) => {
            return check::print_failure(migration.transport.name(), migration.downtime_limit, why);
        }
        Command::Save(SaveArgs { json: true, .. })
        | Command::Restore(RestoreArgs { json: true, .. }) => {
            return saved::print_failure(Outcome::Failed, &why);
        }
        _ => return Ok(()),
    };
    if json { Report::of_failure(transport.name(), why).print(true) } else { Ok(()) }
}
