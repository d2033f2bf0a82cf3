//! `migrate`: whole live migrations, over everything that makes a difference.

mod args;
mod guest;
mod report;
mod side;

use std::net::SocketAddr;

use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::say;
use pageferry_cli::transport::facts::transports;
use pageferry_report::document::{Document, Kind, Load as LoadFigures, Migration, Setting};
use pageferry_report::facts::Facts;
use pageferry_report::heartbeat::HeartbeatGap;
use pageferry_vmm::choice::decide_tracking;
use pageferry_vmm::guest::{GuestConfig, GuestKind};
use pageferry_vmm::ram::{Backing, Ram};
use pageferry_vmm::tracking::DirtyTracking;
use pageferry_vmm::workload::{WorkloadConfig, WorkloadKind};
use serde::{Deserialize, Serialize};

use crate::links::Way;
use crate::load::Load;
use crate::sides::{NoAnswer, SideName, Sides};
use crate::words::Transport;

pub(crate) use args::{EXAMPLES, METHOD, MigrateArgs};
pub(crate) use side::serve;

const MEASUREMENT: &str = "migration";

/// To a side.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    /// To a destination. Answered by `Listening`, and `Arrived`.
    Receive(Box<Plan>),
    /// To a source. Answered by `Departed`.
    Send(Box<Plan>, SocketAddr),
}

/// From a side.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Listening(SocketAddr),
    Departed(Box<Departed>),
    Arrived(Arrived),
}

/// One migration.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Plan {
    way: Way,
    channels: u16,
    config: GuestConfig,
    /// As its command line has it: the type is no value of a wire.
    dirty_source: String,
    guest_load: u16,
    host_load: u16,
    downtime_limit_ms: u64,
}

impl Plan {
    fn setting(&self) -> Setting {
        let transport = self.way.to_string();
        let (guest_load, host_load) = (self.guest_load, self.host_load);
        let setting = self.config.setting(&transport, self.channels, &self.dirty_source);
        Setting { guest_load, host_load, ..setting }
    }
}

/// What a source saw.
#[derive(Debug, Serialize, Deserialize)]
struct Departed {
    migration: Migration,
    began_realtime_ns: u64,
    gaps: Vec<HeartbeatGap>,
}

/// What a destination saw.
#[derive(Debug, Serialize, Deserialize)]
struct Arrived {
    oracle_ok: bool,
    oracle: String,
    longest_gap_ns: u64,
    gaps: Vec<HeartbeatGap>,
}

/// Measures, and prints the result.
pub(crate) fn run(args: &MigrateArgs) -> Result<Outcome, Failure> {
    let kind = args.guest.decide();
    let tracking = decide_tracking(kind, &args.workload, args.dirty_source)?;
    let plans = plans(args, kind, tracking);
    let mut document = Document::new(Kind::Migrate, Facts::here(transports()));
    let mut sides = Sides::start(MEASUREMENT)?;
    let count = plans.len();
    for (number, plan) in (1..).zip(plans) {
        let migration = match migrate(&mut sides, &plan) {
            Ok(migration) => migration,
            Err(NoAnswer::Cancelled) => {
                say!("cancelled");
                return Ok(Outcome::Cancelled);
            }
            // The sides have ended; the others go on with new ones.
            Err(NoAnswer::Failed(why)) => {
                sides = Sides::start(MEASUREMENT)?;
                Migration {
                    setting: plan.setting(),
                    outcome: "failed".to_owned(),
                    error: Some(why),
                    ..Migration::default()
                }
            }
        };
        let Migration { outcome, downtime_ms, total_ms, .. } = &migration;
        let title = migration.setting.title();
        say!(
            "{number} of {count}: {title}: {outcome} in {total_ms:.0} ms, downtime \
             {downtime_ms:.2} ms{}",
            migration.error.as_ref().map_or_else(String::new, |error| format!(": {error}"))
        );
        document.migrations.push(migration);
    }
    report::print(&document, args.json)?;
    let right = |each: &Migration| each.outcome == "completed" && each.oracle_ok == Some(true);
    Ok(if document.migrations.iter().all(right) { Outcome::Completed } else { Outcome::Failed })
}

/// Every combination. What is varied first differs between neighbours, so that they can be compared.
fn plans(args: &MigrateArgs, kind: GuestKind, tracking: DirtyTracking) -> Vec<Plan> {
    let workload = WorkloadConfig {
        kind: WorkloadKind::Sequential,
        working_set_bytes: args.working_set,
        dirty_rate_pages_per_second: None,
        seed: args.seed,
    };
    let config = GuestConfig {
        kind,
        regions: Ram::pc_regions(args.memory),
        backing: Backing::Anonymous,
        vcpus: args.vcpus,
        cpu: None,
        workload,
    };
    let first = Plan {
        way: Transport::Tcp.into(),
        channels: 1,
        config,
        dirty_source: tracking.to_string(),
        guest_load: 0,
        host_load: 0,
        downtime_limit_ms: args.downtime_limit,
    };
    let rates: Vec<Option<u64>> = match args.dirty_rate.as_slice() {
        [] => vec![None],
        rates => rates.iter().copied().map(Some).collect(),
    };
    let plans = vec![first];
    let plans = vary(&plans, &args.host_load, |plan, load| plan.host_load = load);
    let plans = vary(&plans, &args.guest_load, |plan, load| plan.guest_load = load);
    let plans = vary(&plans, &rates, |plan, rate| {
        plan.config.workload.dirty_rate_pages_per_second = rate;
    });
    let plans = vary(&plans, &args.workload, |plan, kind| plan.config.workload.kind = kind);
    let plans = vary(&plans, &args.backing, |plan, backing| plan.config.backing = backing);
    let plans = vary(&plans, &args.channels, |plan, channels| plan.channels = channels);
    vary(&plans, &args.transport, |plan, transport| {
        plan.way = Way { transport, rdma: args.rdma };
    })
}

/// Each plan with each value.
fn vary<T: Copy>(plans: &[Plan], values: &[T], set: impl Fn(&mut Plan, T)) -> Vec<Plan> {
    let with = |plan: &Plan, value| {
        let mut plan = plan.clone();
        set(&mut plan, value);
        plan
    };
    plans.iter().flat_map(|plan| values.iter().map(|value| with(plan, *value))).collect()
}

/// One migration, under the host's load.
fn migrate(sides: &mut Sides<Answer>, plan: &Plan) -> Result<Migration, NoAnswer> {
    let failed = |error: Failure| NoAnswer::Failed(error.to_string());
    let load = Load::of_host(plan.host_load).map_err(failed)?;
    let (source, destination) = (SideName::Source, SideName::Destination);
    sides.tell(destination, &Order::Receive(Box::new(plan.clone()))).map_err(failed)?;
    let address = sides.answer(destination, |answer| match answer {
        Answer::Listening(address) => Some(address),
        _ => None,
    })?;
    sides.tell(source, &Order::Send(Box::new(plan.clone()), address)).map_err(failed)?;
    let departed = sides.answer(source, |answer| match answer {
        Answer::Departed(departed) => Some(*departed),
        _ => None,
    })?;
    let arrived = sides.answer(destination, |answer| match answer {
        Answer::Arrived(arrived) => Some(arrived),
        _ => None,
    })?;
    let load = load.stop();
    let mut migration = merge(departed, arrived);
    migration.load = LoadFigures {
        host_cpus: load.cpus(),
        host_gigabytes_per_second: load.gigabytes_per_second(),
        ..migration.load
    };
    Ok(migration)
}

/// What both sides saw.
fn merge(departed: Departed, arrived: Arrived) -> Migration {
    let Departed { migration, began_realtime_ns, gaps } = departed;
    let mut migration = Migration {
        oracle_ok: Some(arrived.oracle_ok),
        error: (!arrived.oracle_ok).then_some(arrived.oracle),
        heartbeat_gap_ms: Some(arrived.longest_gap_ns as f64 / 1e6),
        ..migration
    };
    migration.add_heartbeat_gaps(began_realtime_ns, gaps.into_iter().chain(arrived.gaps));
    migration
}
