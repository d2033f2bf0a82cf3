//! A guest that is here, however it came: what the operator wishes is done, until it has moved on or is to end.

use std::time::Duration;

use crossbeam_channel::{Receiver, after, never, select_biased};
use pageferry::Statistics;
use pageferry_cli::departure::{Departure, Gone};
use pageferry_cli::observers::Observers;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::report::{GuestAt, Report, Timeline};
use pageferry_cli::say;
use pageferry_cli::wishes::{Wish, wait_or_quit};
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::guest::Guest;

use crate::args::OnwardArgs;
use crate::check::ask;
use crate::report::{check, describe, heartbeat, of_source};
use crate::uncertain;

/// For how long parts of a guest are sent to where it could go.
const CHECK_TIME: Duration = Duration::from_secs(1);

/// How it is served.
pub(crate) struct Onward<'a> {
    pub(crate) args: &'a OnwardArgs,
    /// After a migration that failed: for how long it runs on before it is checked and ends.
    pub(crate) run_for: Option<Duration>,
    pub(crate) json: bool,
    pub(crate) timeline: bool,
    pub(crate) observers: &'a Observers,
    pub(crate) wishes: &'a Receiver<Wish>,
}

impl Onward<'_> {
    /// Does what the operator wishes until the guest is gone or told to end. `came` is what brought it here, if
    /// that is reported on already.
    pub(crate) fn serve(
        &self,
        mut machine: GuestMachine,
        came: Option<Outcome>,
    ) -> Result<Outcome, Failure> {
        let mut timer =
            if self.args.is_planned() { after(self.args.migrate_after) } else { never() };
        let mut last = came;
        loop {
            let wish = select_biased! {
                recv(self.wishes) -> wish => wish?,
                recv(timer) -> _ => Wish::Migrate(None),
            };
            match wish {
                Wish::Interrupt | Wish::Quit => {
                    if let Some(last) = last {
                        return Ok(last);
                    }
                    // There will be none: whoever waits for its report is told.
                    let report = self.called_off(&mut machine.guest)?;
                    report.print(self.json)?;
                    return Ok(report.outcome);
                }
                Wish::Cancel
                | Wish::Limit(_)
                | Wish::SwitchoverBandwidth(_)
                | Wish::DowntimeLimit(_)
                | Wish::DowntimeBound(_)
                | Wish::NotConverging(_)
                | Wish::Channels(_) => say!("no migration is under way"),
                Wish::Status => status(&machine.guest),
                Wish::Pause => match machine.guest.pause() {
                    Ok(()) => status(&machine.guest),
                    Err(error) => say!("{}", pageferry::Chain::of(&error)),
                },
                Wish::Resume => match machine.guest.resume() {
                    Ok(()) => status(&machine.guest),
                    Err(error) => say!("{}", pageferry::Chain::of(&error)),
                },
                Wish::Check(address) => {
                    let (migration, wishes) = (&self.args.migration, self.wishes);
                    let (answer, left) = ask(machine, migration, &address, CHECK_TIME, wishes)?;
                    say!("{answer}");
                    machine = left;
                }
                Wish::Migrate(address) => {
                    timer = never();
                    let Some(address) = address.or_else(|| self.args.migrate_to.clone()) else {
                        say!("migrate where to? say \"migrate HOST:PORT\"");
                        continue;
                    };
                    let (report, left) = self.migrate(machine, &address)?;
                    let outcome = report.outcome;
                    last = Some(outcome);
                    match left {
                        None => {
                            report.print(self.json)?;
                            return Ok(outcome);
                        }
                        Some(left) => {
                            machine = left;
                            if self.stay(&mut machine.guest, report)? {
                                return Ok(outcome);
                            }
                        }
                    }
                }
            }
        }
    }

    /// The report of a migration that was cancelled before it began.
    fn called_off(&self, guest: &mut Guest) -> Result<Report, Failure> {
        let mut report = of_source(
            (Outcome::Cancelled, GuestAt::Source),
            self.args.migration.transport.name(),
            (guest.config(), guest.tracking()),
            &self.args.migration,
            &Statistics::default(),
        );
        report.error = Some("cancelled before the migration began".to_owned());
        if self.run_for.is_some() {
            check(guest, &mut report)?;
        }
        heartbeat(&mut report, guest.heartbeat());
        Ok(report)
    }

    /// Migrates the guest. Gives the machine back if the guest is still here.
    fn migrate(
        &self,
        machine: GuestMachine,
        address: &str,
    ) -> Result<(Report, Option<GuestMachine>), Failure> {
        let migration = &self.args.migration;
        let config = machine.guest.config().clone();
        let tracking = machine.guest.tracking().decide(config.kind)?.to_string();
        let departure = Departure {
            migration,
            description: serde_json::to_vec(&config)?,
            memory_bytes: config.memory_bytes(),
            verify: self.args.verify,
            record: self.timeline,
            observers: self.observers,
        };
        machine.guest.reset_heartbeat_gap();
        let Gone { mut report, statistics, machine, recorder } =
            departure.migrate(machine, GuestMachine::described, address, self.wishes)?;
        describe(&mut report, &config);
        report.timeline = recorder.map(|recorder| {
            let setting = config.setting(&report.transport, migration.channels, &tracking);
            let timeline = Timeline::of_source(recorder, setting, &statistics);
            Timeline { gaps: machine.guest.heartbeat_gaps(), ..timeline }
        });
        report.dirty_source = Some(tracking);
        let left = (report.outcome != Outcome::Completed).then_some(machine);
        Ok((report, left))
    }

    /// After a migration that failed: shows that the guest goes on, and reports. Returns whether the
    /// program should end.
    fn stay(&self, guest: &mut Guest, mut report: Report) -> Result<bool, Failure> {
        if report.guest_at == GuestAt::Paused {
            heartbeat(&mut report, guest.heartbeat());
            report.print(self.json)?;
            say!(
                "the guest is here, paused: it could not be resumed; \"resume\" tries again, Ctrl-C ends it"
            );
            return Ok(false);
        }
        if report.guest_at != GuestAt::Source {
            heartbeat(&mut report, guest.heartbeat());
            report.print(self.json)?;
            let is_ours = uncertain::decide(guest, self.wishes)?;
            if is_ours {
                status(guest);
            }
            return Ok(!is_ours);
        }
        let paused = guest.is_paused();
        let beats = guest.heartbeat().beats;
        if !paused && guest.await_beats(beats + 10).is_err() {
            report.fail("the guest does not beat any more".to_owned());
        }
        if let Some(time) = self.run_for {
            wait_or_quit(self.wishes, Some(time));
            check(guest, &mut report)?;
        }
        heartbeat(&mut report, guest.heartbeat());
        report.print(self.json)?;
        if self.run_for.is_some() {
            return Ok(true);
        }
        let how = if paused { "is still paused" } else { "runs on" };
        say!("the guest {how} here; \"migrate [ADDR]\" tries again, Ctrl-C ends it");
        Ok(false)
    }
}

fn status(guest: &Guest) {
    let beats = guest.heartbeat().beats;
    if let Some(failure) = guest.failure() {
        say!("the guest ended after {beats} heartbeats: {failure}");
    } else if guest.is_paused() {
        say!("the guest is paused here, {beats} heartbeats so far; \"resume\" lets it run");
    } else {
        let clock = guest.clock().map_or_else(String::new, |time| {
            format!(", {:.6} s since the first by its clock", time.as_secs_f64())
        });
        say!("the guest runs here, {beats} heartbeats so far{clock}");
    }
}
