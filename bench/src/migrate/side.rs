//! A side of a migration.

use std::net::SocketAddr;
use std::time::Duration;

use clap::ValueEnum;
use pageferry::transport::OneLink;
use pageferry::{Destination, Machine, Source};
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::transport::ZeroCopyChoice;
use pageferry_report::document::{Load as LoadFigures, Migration, ms};
use pageferry_report::recorder::Recorder;
use pageferry_vmm::guest::{Guest, GuestConfig};
use pageferry_vmm::tracking::DirtyTracking;

use super::guest::LoadedGuest;
use super::{Answer, Arrived, Departed, Order, Plan};
use crate::links::{Listener, connect};
use crate::sides::{self, answer};
use crate::usage::process_cpu_nanoseconds;

/// Beats of a guest before it is migrated, and where it arrives, before its memory is looked at.
const BEATS: u64 = 200;

/// One side, as it is told.
pub(crate) fn serve() -> Result<Outcome, Failure> {
    sides::serve(|order| {
        answer(&match order {
            Order::Receive(plan) => Answer::Arrived(receive(&plan)?),
            Order::Send(plan, address) => Answer::Departed(Box::new(send(&plan, address)?)),
        })
    })
}

fn send(plan: &Plan, address: SocketAddr) -> Result<Departed, Failure> {
    let tracking = DirtyTracking::from_str(&plan.dirty_source, false)?;
    let mut guest = Guest::create_tracked(plan.config.clone(), tracking)?;
    guest.boot()?;
    let mut guest = LoadedGuest::new(guest, plan.guest_load);
    guest.resume()?;
    guest.await_beats(BEATS)?;
    guest.machine.guest.reset_heartbeat_gap();

    let memory = guest.machine.memory()?;
    let dirty = guest.machine.dirty_sources(&memory)?;
    let source = Source::new()
        .channels(plan.channels)
        .downtime_limit(Duration::from_millis(plan.downtime_limit_ms))
        .description(serde_json::to_vec(&plan.config)?);
    let recorder = Recorder::start(source.handle())?;
    let began_realtime_ns = recorder.began_realtime_ns();
    let source = source.on_event(recorder.sink());
    let link = connect(plan.way, ZeroCopyChoice::Auto, address)?;
    let cpu = process_cpu_nanoseconds();
    let departed = source
        .migrate(guest, &memory, dirty, OneLink::source(link))
        .map_err(|failure| failure.error)?;
    let cpu = process_cpu_nanoseconds() - cpu;
    let load = departed.machine.used;
    let mut migration = Migration::of(plan.setting(), &departed.statistics);
    (migration.rounds, migration.samples) = recorder.finish();
    migration.cpu_ms = Some(ms(Duration::from_nanos(cpu)));
    migration.downtime_limit_ms = plan.downtime_limit_ms as f64;
    migration.load = LoadFigures {
        guest_cpus: load.cpus(),
        guest_gigabytes_per_second: load.gigabytes_per_second(),
        ..LoadFigures::default()
    };
    let gaps = departed.machine.machine.guest.heartbeat_gaps();
    Ok(Departed { migration, began_realtime_ns, gaps })
}

fn receive(plan: &Plan) -> Result<Arrived, Failure> {
    let listener = Listener::bind(plan.way)?;
    answer(&Answer::Listening(listener.address()))?;
    let link = listener.accept()?;
    let offer = Destination::new().negotiate(OneLink::destination(link))?;
    let config: GuestConfig = serde_json::from_slice(offer.description())?;
    let guest = LoadedGuest::new(Guest::create(config)?, plan.guest_load);
    let memory = guest.machine.memory()?;
    let arrived = offer.receive(guest, &memory).map_err(|failure| failure.error)?;
    let mut guest = arrived.machine;
    guest.await_beats(BEATS)?;
    guest.pause()?;
    let guest = &guest.machine.guest;
    let oracle = guest.check_oracle();
    Ok(Arrived {
        oracle_ok: oracle.ok,
        oracle: oracle.detail,
        longest_gap_ns: guest.heartbeat().longest_gap_ns,
        gaps: guest.heartbeat_gaps(),
    })
}
