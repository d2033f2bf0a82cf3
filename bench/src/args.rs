//! The command line.

use clap::{Parser, Subcommand, ValueEnum};

use crate::bitmap::{self, BitmapArgs};
use crate::compare::{self, CompareArgs};
use crate::compare_guests::{self, CompareGuestsArgs};
use crate::device_state::{self, DeviceStateArgs};
use crate::gate::{self, GateArgs};
use crate::hot::{self, HotArgs};
use crate::latency::{self, LatencyArgs};
use crate::migrate::{self, MigrateArgs};
use crate::page::{self, ReportArgs};
use crate::rearm::{self, RearmArgs};
use crate::runs::{self, RunsArgs};
use crate::sides::SideName;
use crate::simulate::{self, SimulateArgs};
use crate::throughput::{self, ThroughputArgs};

const EXIT_CODES: &str = "\
Exit status:
  0  everything was measured, and what arrived was checked
  1  something failed; the message says what
  2  the command line makes no sense
  3  cancelled";

/// Measures the pageferry live-migration engine.
#[derive(Debug, Parser)]
#[command(version, after_long_help = format!("{}\n\n{EXIT_CODES}", throughput::EXAMPLES))]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Move memory between two processes of this host, by the engine and by a bare loop.
    #[command(after_long_help = format!("{}\n\n{}\n\n{EXIT_CODES}", throughput::METHOD, throughput::EXAMPLES))]
    Throughput(ThroughputArgs),
    /// Send runs of pages of each length by io_uring, copied by the kernel and zero-copy, to where
    /// the same command listens.
    #[command(after_long_help = format!("{}\n\n{EXIT_CODES}", runs::METHOD))]
    Runs(RunsArgs),
    /// Do what the engine does with dirty bitmaps, and read the same bitmaps.
    #[command(after_long_help = format!("{}\n\n{}\n\n{EXIT_CODES}", bitmap::METHOD, bitmap::EXAMPLES))]
    Bitmap(BitmapArgs),
    /// Re-arm KVM's dirty log under a running guest, as a sender does and by bare loops.
    #[command(after_long_help = format!("{}\n\n{EXIT_CODES}", rearm::METHOD))]
    Rearm(RearmArgs),
    /// Migrate modelled guests over modelled networks with the engine's own state machines, and
    /// compare estimators and policies.
    #[command(after_long_help = format!("{}\n\n{EXIT_CODES}", simulate::METHOD))]
    Simulate(SimulateArgs),
    /// Save and load the device state of a guest, and encode and decode that of a large device.
    #[command(after_long_help = format!("{}\n\n{EXIT_CODES}", device_state::METHOD))]
    DeviceState(DeviceStateArgs),
    /// Measure how long a batch, a page, a control frame and the commit take.
    #[command(after_long_help = format!("{}\n\n{}\n\n{EXIT_CODES}", latency::METHOD, latency::EXAMPLES))]
    Latency(LatencyArgs),
    /// Migrate guests live, with every combination of what is given.
    #[command(after_long_help = format!("{}\n\n{}\n\n{EXIT_CODES}", migrate::METHOD, migrate::EXAMPLES))]
    Migrate(MigrateArgs),
    /// Move memory by the engine, by the bare loop, and by whoever else this machine has.
    #[command(after_long_help = format!("{}\n\n{}\n\n{EXIT_CODES}", compare::METHOD, compare::EXAMPLES))]
    Compare(CompareArgs),
    /// Move running guests of QEMU by pageferry and by QEMU itself.
    #[command(after_long_help = format!("{}\n\n{}\n\n{EXIT_CODES}", compare_guests::METHOD, compare_guests::EXAMPLES))]
    CompareGuests(CompareGuestsArgs),
    /// Make one page of plots of what other commands measured.
    #[command(after_long_help = format!("{}\n\n{EXIT_CODES}", page::EXAMPLES))]
    Report(ReportArgs),
    /// Do one of the engine's inner loops on one thread, for who counts what it costs.
    #[command(after_long_help = format!("{}\n\n{EXIT_CODES}", hot::METHOD))]
    Hot(HotArgs),
    /// Say whether one build of this program is worse than another.
    #[command(after_long_help = format!("{}\n\n{EXIT_CODES}", gate::METHOD))]
    Gate(GateArgs),
    /// One side of a measurement, told on stdin what to do.
    #[command(hide = true)]
    Side {
        /// Of what.
        of: Measurement,
        /// Which.
        side: SideName,
    },
}

impl Command {
    /// Whether what was given fits together.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self {
            Self::Throughput(args) => args.check(),
            Self::Runs(args) => args.check(),
            Self::Bitmap(args) => args.check(),
            Self::Latency(args) => args.check(),
            Self::Migrate(args) => args.check(),
            Self::Compare(args) => args.check(),
            Self::CompareGuests(args) => args.check(),
            Self::DeviceState(_)
            | Self::Rearm(_)
            | Self::Report(_)
            | Self::Hot(_)
            | Self::Gate(_)
            | Self::Simulate(_)
            | Self::Side { .. } => Ok(()),
        }
    }
}

/// What takes two processes.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Measurement {
    Transfer,
    Latency,
    Migration,
}
