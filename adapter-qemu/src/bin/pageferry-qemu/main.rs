//! `pageferry-qemu`: moves the guests of an unmodified QEMU.

mod args;
mod migrate;
mod receive;
mod recover;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::report::{GuestAt, Report};
use pageferry_cli::say;

use args::{Cli, Command};

fn main() -> ExitCode {
    pageferry_cli::log::to_stderr();
    let command = Cli::parse().command;
    if let Err(complaint) = command.check() {
        Cli::command().error(ErrorKind::ValueValidation, complaint).exit();
    }
    let mut guest_at = GuestAt::Nowhere;
    match run(&command, &mut guest_at) {
        Ok(outcome) => outcome.exit_code(),
        Err(error) => {
            let why = pageferry::Chain::of(&*error).to_string();
            say!("error: {why}");
            // With --json there is an object on stdout however a command ends.
            if let Some(transport) = command.reports() {
                let report = Report { guest_at, ..Report::of_failure(transport.name(), why) };
                if let Err(error) = report.print(true) {
                    say!("failed to print the report: {error}");
                }
            }
            Outcome::Failed.exit_code()
        }
    }
}

/// Where the guest is if this fails, is in `guest_at`.
fn run(command: &Command, guest_at: &mut GuestAt) -> Result<Outcome, Failure> {
    match command {
        Command::Migrate(args) => migrate::migrate(args, guest_at),
        Command::Receive(args) => receive::receive(args),
        Command::Recover(args) => recover::recover(args),
    }
}
