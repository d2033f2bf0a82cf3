//! `check`: whether a guest could go to another host, and what that would be like. It stays.

use std::time::Duration;

use crossbeam_channel::{Receiver, unbounded};
use pageferry::convergence::Forecast;
use pageferry_cli::departure::{Departure, Trial};
use pageferry_cli::migration::MigrationArgs;
use pageferry_cli::observers::Observers;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::output;
use pageferry_cli::say;
use pageferry_cli::wishes::{Wish, listen_to_signals};
use pageferry_report::document::ms;
use pageferry_vmm::embed::GuestMachine;
use serde::Serialize;

use crate::args::CheckArgs;
use crate::run::{config, running};

/// Version of the JSON object. Fields are added, never repurposed.
const SCHEMA: u32 = 1;

/// What the destination says, and what was measured on the way there.
#[derive(Debug, Serialize)]
pub(crate) struct Answer {
    schema: u32,
    /// "completed" if the guest may go, and its downtime limit can be kept.
    pub(crate) outcome: Outcome,
    /// Why it is not.
    error: Option<String>,
    transport: &'static str,
    /// Page bytes that land a second.
    bytes_per_second: Option<f64>,
    dirty_pages_per_second: Option<f64>,
    /// The least downtime to expect.
    downtime_ms: Option<f64>,
    downtime_limit_ms: f64,
}

pub(crate) fn check(args: &CheckArgs) -> Result<Outcome, Failure> {
    let config = config(&args.guest)?;
    let (wishes_in, wishes) = unbounded();
    listen_to_signals(wishes_in)?;
    let guest = running(config, &args.guest)?;
    let machine = GuestMachine { guest };
    let (answer, _) = ask(machine, &args.migration, &args.address, args.time, &wishes)?;
    let text = if args.json { serde_json::to_string(&answer)? } else { answer.to_string() };
    if let Err(error) = output::line(&text) {
        say!("failed to print the answer: {error}");
    }
    Ok(answer.outcome)
}

/// Prints the answer of a command that could not ask.
pub(crate) fn print_failure(
    transport: &'static str,
    downtime_limit: Duration,
    why: String,
) -> Result<(), serde_json::Error> {
    let answer = Answer {
        schema: SCHEMA,
        outcome: Outcome::Failed,
        error: Some(why),
        transport,
        bytes_per_second: None,
        dirty_pages_per_second: None,
        downtime_ms: None,
        downtime_limit_ms: ms(downtime_limit),
    };
    // If nobody reads it there is nothing to do about it.
    let _ = output::line(&serde_json::to_string(&answer)?);
    Ok(())
}

/// Asks for a guest that runs here, and gives it back.
pub(crate) fn ask(
    machine: GuestMachine,
    migration: &MigrationArgs,
    address: &str,
    time: Duration,
    wishes: &Receiver<Wish>,
) -> Result<(Answer, GuestMachine), Failure> {
    let config = machine.guest.config().clone();
    let departure = Departure {
        migration,
        description: serde_json::to_vec(&config)?,
        memory_bytes: config.memory_bytes(),
        verify: false,
        record: false,
        observers: &Observers::default(),
    };
    let Trial { machine, transport, answer } =
        departure.try_out(machine, GuestMachine::described, address, wishes, time)?;
    let limit = migration.downtime_limit;
    let (outcome, error, forecast) = match answer {
        Ok(Some(Forecast { meets_limit: false, least, .. })) => {
            let why = format!("the downtime will not come below {:.1} ms", ms(least));
            (Outcome::Failed, Some(why), answer.ok().flatten())
        }
        Ok(forecast) => (Outcome::Completed, None, forecast),
        Err(error) => (Outcome::of(&error, false), Some(error.chain().to_string()), None),
    };
    let answer = Answer {
        schema: SCHEMA,
        outcome,
        error,
        transport,
        bytes_per_second: forecast.map(|forecast| forecast.bytes_per_second),
        dirty_pages_per_second: forecast.map(|forecast| forecast.dirty_pages_per_second),
        downtime_ms: forecast.map(|forecast| ms(forecast.least)),
        downtime_limit_ms: ms(limit),
    };
    Ok((answer, machine))
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.error {
            Some(why) => write!(f, "no: {why}")?,
            None => write!(f, "yes: the guest may go there")?,
        }
        if let (Some(bytes), Some(pages), Some(downtime)) =
            (self.bytes_per_second, self.dirty_pages_per_second, self.downtime_ms)
        {
            let gigabits = bytes * 8.0 / 1e9;
            write!(
                f,
                "\n{} moves {gigabits:.2} Gb/s, and the guest dirties {pages:.0} pages a second\n\
                 downtime to expect {downtime:.1} ms, limit {:.0} ms",
                self.transport, self.downtime_limit_ms
            )?;
        }
        Ok(())
    }
}
