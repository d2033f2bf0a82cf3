//! A migration away from here, of any machine: it is shown as it runs, and steered by wishes.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Receiver;
use pageferry::convergence::Forecast;
use pageferry::dirty::DirtySources;
use pageferry::machine::MachineOperation;
use pageferry::memory::GuestMemory;
use pageferry::transport::Connector;
use pageferry::{
    Departed, Error, Event, GuestAtSource, Machine, MachineError, MigrationHandle, SourceFailure,
    Statistics, Tried,
};
use pageferry_report::recorder::Recorder;

use crate::cpu;
use crate::metrics::Side;
use crate::migration::MigrationArgs;
use crate::observers::Observers;
use crate::outcome::{Failure, Outcome};
use crate::report::{GuestAt, Report};
use crate::transport::Chosen;
use crate::watch::Watch;
use crate::wishes::{Wish, cancels, connect, hearing, steer};

/// A guest that is to go.
#[derive(Debug)]
pub struct Departure<'a> {
    /// How.
    pub migration: &'a MigrationArgs,
    /// What the destination is told of it.
    pub description: Vec<u8>,
    /// Its memory.
    pub memory_bytes: u64,
    /// Whether all of that is compared before it resumes.
    pub verify: bool,
    /// Whether what happens is recorded over time.
    pub record: bool,
    /// Who is told of it as it happens.
    pub observers: &'a Observers,
}

/// What came of it.
#[derive(Debug)]
pub struct Gone<M> {
    /// What the migration did; of the guest no more than where it is.
    pub report: Report,
    /// The same as the engine says it.
    pub statistics: Statistics,
    /// The machine: the guest is in it unless it is at the destination.
    pub machine: M,
    /// What was recorded, if that was wanted.
    pub recorder: Option<Recorder>,
}

impl Departure<'_> {
    /// Migrates a machine, whose memory and what tracks it `describe` tells, to this address. On threads of
    /// their own, so that wishes are heard meanwhile.
    pub fn migrate<M: Machine + Send>(
        self,
        machine: M,
        describe: impl FnOnce(&M) -> Result<(Arc<GuestMemory>, DirtySources), MachineError> + Send,
        address: &str,
        wishes: &Receiver<Wish>,
    ) -> Result<Gone<M>, Failure> {
        let Self { migration, description, memory_bytes, verify, record, observers } = self;
        let source = migration.source().verify(verify).description(description);
        let handle = source.handle();
        let watch = Watch::start(handle.clone(), observers, Side::Source)?;
        let recorder = record.then(|| Recorder::start(handle.clone())).transpose()?;
        let mut record = recorder.as_ref().map(Recorder::sink);
        let mut show = watch.sink();
        let source = source.on_event(move |event| {
            show(event);
            if let Some(record) = &mut record {
                record(event);
            }
        });
        let (transport, connector) = link_to(address, migration, &handle, wishes);
        let cpu = cpu::time_of_process();
        let mut cancelled = false;
        let result = hearing(
            wishes,
            || {
                hand_over(machine, describe, connector, |machine, memory, dirty, connector| {
                    source.migrate(machine, memory, dirty, connector)
                })
            },
            |wish| {
                cancelled |= cancels(&wish);
                steer(&handle, &wish);
            },
        )?;
        let cpu = cpu::time_of_process().saturating_sub(cpu);
        drop(watch);
        let limit = handle.settings().downtime_limit;
        let report = |outcome, at, statistics: &Statistics| {
            let ended = (outcome, at);
            let mut report =
                Report::of_source(ended, transport, memory_bytes, migration, statistics);
            // It may have been changed on the way.
            report.downtime_limit(statistics.downtime_limit.unwrap_or(limit));
            report.cpu_time(cpu);
            report
        };
        let gone = match result {
            Ok(Departed { machine, paused, statistics }) => {
                let mut report = report(Outcome::Completed, GuestAt::Destination, &statistics);
                report.guest_paused = paused;
                report.memory_match = verify.then_some(true);
                Gone { report, statistics, machine, recorder }
            }
            Err(failure) => {
                let SourceFailure { machine, guest, error, statistics } = *failure;
                let at = match &guest {
                    GuestAtSource::Running | GuestAtSource::StillPaused => GuestAt::Source,
                    GuestAtSource::Paused(_) => GuestAt::Paused,
                    _ => GuestAt::Unknown,
                };
                let mut report = report(Outcome::of(&error, cancelled), at, &statistics);
                report.error = Some(error.chain().to_string());
                report.guest_paused = matches!(guest, GuestAtSource::StillPaused);
                if matches!(error, Error::MemoryDiffers { .. }) {
                    report.memory_match = Some(false);
                }
                if let GuestAtSource::Paused(why) = guest {
                    say!("error: the guest could not be resumed: {}", why.chain());
                }
                Gone { report, statistics, machine, recorder }
            }
        };
        observers.ended(Side::Source, &gone.report);
        Ok(gone)
    }

    /// Asks whether it could go, and what that would be like, for so long. It stays, whatever comes of it; a Ctrl-C
    /// ends this.
    pub fn try_out<M: Machine + Send>(
        self,
        machine: M,
        describe: impl FnOnce(&M) -> Result<(Arc<GuestMemory>, DirtySources), MachineError> + Send,
        address: &str,
        wishes: &Receiver<Wish>,
        at_most: Duration,
    ) -> Result<Trial<M>, Failure> {
        let Self { migration, description, observers, .. } = self;
        let source = migration.source().description(description);
        let handle = source.handle();
        let watch = Watch::start(handle.clone(), observers, Side::Source)?;
        let mut show = watch.sink();
        let source = source.on_event(move |event| {
            // It was never to leave, and may be paused.
            if !matches!(event, Event::GuestKept) {
                show(event);
            }
        });
        let (transport, connector) = link_to(address, migration, &handle, wishes);
        let tried = hearing(
            wishes,
            || {
                hand_over(machine, describe, connector, |machine, memory, dirty, connector| {
                    source.try_out(machine, memory, dirty, connector, at_most)
                })
            },
            |wish| steer(&handle, &wish),
        )?;
        let (machine, answer) = match tried {
            Ok(Tried { machine, forecast, .. }) => (machine, Ok(forecast)),
            Err(failure) => {
                if let GuestAtSource::Paused(why) = failure.guest {
                    say!("error: the guest could not be resumed: {}", why.chain());
                }
                (failure.machine, Err(failure.error))
            }
        };
        Ok(Trial { machine, transport, answer })
    }
}

/// What came of a trial.
#[derive(Debug)]
pub struct Trial<M> {
    /// The machine: the guest is in it, as it was.
    pub machine: M,
    /// What would move its pages.
    pub transport: &'static str,
    /// What to expect, if there was anything to measure; or why it could not go.
    pub answer: Result<Option<Forecast>, Error>,
}

/// Connects. The name of what moves the pages, and what makes links, of which it has the first.
fn link_to(
    address: &str,
    migration: &MigrationArgs,
    handle: &MigrationHandle,
    wishes: &Receiver<Wish>,
) -> (&'static str, Result<Box<dyn Connector>, Error>) {
    let chosen = migration.choose();
    let transport = chosen.as_ref().map_or(migration.transport.name(), Chosen::name);
    let connector = match chosen {
        Ok(chosen) => connect(address, &chosen, handle, wishes),
        Err(error) => Err(error.into()),
    };
    (transport, connector)
}

/// Hands the guest to the engine.
fn hand_over<M: Machine, T>(
    machine: M,
    describe: impl FnOnce(&M) -> Result<(Arc<GuestMemory>, DirtySources), MachineError>,
    connector: Result<Box<dyn Connector>, Error>,
    engine: impl FnOnce(
        M,
        &Arc<GuestMemory>,
        DirtySources,
        Box<dyn Connector>,
    ) -> Result<T, Box<SourceFailure<M>>>,
) -> Result<T, Box<SourceFailure<M>>> {
    let refused = |cause| Error::Machine { operation: MachineOperation::Describe, cause };
    let described = describe(&machine).map_err(refused);
    match described.and_then(|described| Ok((described, connector?))) {
        Ok(((memory, dirty), connector)) => engine(machine, &memory, dirty, connector),
        // Nothing has touched the guest yet.
        Err(error) => Err(Box::new(SourceFailure {
            guest: GuestAtSource::untouched(&machine),
            machine,
            error,
            statistics: Statistics::default(),
        })),
    }
}
