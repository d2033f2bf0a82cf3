//! The command line.

mod guest;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pageferry_cli::migration::MigrationArgs;
use pageferry_cli::observers::ObserverArgs;
use pageferry_cli::units::{size, time};
use pageferry_rust_vmm::time::Meanwhile;
use pageferry_vmm::ram::Backing;

pub(crate) use guest::GuestArgs;

const EXIT_CODES: &str = "\
Exit status:
  0  the guest arrived and every check passed
  1  the migration failed (the guest was not lost: the message says where it is)
  2  the command line makes no sense
  3  cancelled
  4  uncertain: the migration broke off at the handover, see the message";

const EXAMPLES: &str = "\
Examples:
  A guest moves between two processes of this host, and everything is checked:
    pageferry-vmm demo
    pageferry-vmm demo --memory 1G --working-set 256M --channels 4 --vcpus 2 --json
    pageferry-vmm demo --report migration.html

  The same by hand, on two hosts (the guest goes on at the second):
    host-b$ pageferry-vmm receive --listen 0.0.0.0:7400 --shared-key key
    host-a$ pageferry-vmm run --memory 1G --migrate-to host-b:7400 --shared-key key

  A guest that moves when it is told to (SIGUSR1, or \"migrate\" on stdin):
    pageferry-vmm run --migrate-to host-b:7400 --shared-key key --on-demand

  A guest that moves on from host to host:
    host-c$ pageferry-vmm receive --listen 0.0.0.0:7400 --shared-key key
    host-b$ pageferry-vmm receive --listen 0.0.0.0:7400 --migrate-to host-c:7400 --shared-key key
    host-a$ pageferry-vmm run --migrate-to host-b:7400 --shared-key key";

const STATE_EXAMPLES: &str = "\
Examples:
  A guest goes on from a file:
    pageferry-vmm save guest.pf --vcpus 2
    pageferry-vmm restore guest.pf

  What is in it, and what changed between two:
    pageferry-vmm inspect guest.pf
    pageferry-vmm inspect guest.pf later.pf

  Will the next version of this program take what this one has?
    pageferry-vmm schema dump > old.json
    pageferry-vmm schema check old.json new.json";

const CHECK_EXAMPLES: &str = "\
Examples:
  Could such a guest go there, and would it stand still for less than 50 ms?
    host-b$ pageferry-vmm receive --listen 0.0.0.0:7400 --shared-key key
    host-a$ pageferry-vmm check host-b:7400 --shared-key key --memory 1G --working-set 256M --downtime-limit 50ms

  Of one that runs already: a line \"check host-b:7400\" on the stdin of `run`.

Exit status:
  0  it could
  1  it could not, or the downtime limit would not be kept: the message says why
  2  the command line makes no sense
  3  cancelled";

const CPU_EXAMPLES: &str = "\
Examples:
  Guests that may run on each of three hosts (the first line on each of them):
    pageferry-vmm cpu > $(hostname).json
    pageferry-vmm cpu a.json b.json c.json > all.json
    pageferry-vmm run --cpu-baseline all.json --migrate-to host-b:7400 --shared-key key

  As on a host without AVX:
    pageferry-vmm cpu --without avx,avx2,xsave_avx > old.json";

/// A small KVM virtual machine that migrates live.
#[derive(Debug, Parser)]
#[command(version, after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Move a guest between two processes of this host, and check that nothing was lost.
    #[command(after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
    Demo(DemoArgs),
    /// Run a guest, and migrate it away.
    #[command(after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
    Run(RunArgs),
    /// Wait for a guest to arrive, and run it.
    #[command(after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
    Receive(ReceiveArgs),
    /// Run a guest for a while, save it to a file, and end. If the file cannot be written, or a Ctrl-C
    /// ends the writing, the guest runs on until Ctrl-C.
    #[command(after_long_help = format!("{STATE_EXAMPLES}\n\n{EXIT_CODES}"))]
    Save(SaveArgs),
    /// Run the guest that a file holds.
    #[command(after_long_help = format!("{STATE_EXAMPLES}\n\n{EXIT_CODES}"))]
    Restore(RestoreArgs),
    /// Print what virtual CPUs are made of here, or what the given files have in common, as a file for
    /// --cpu-baseline.
    #[command(after_long_help = CPU_EXAMPLES)]
    Cpu(CpuArgs),
    /// Ask a `pageferry-vmm receive` whether a guest could go there, and tell what that would be like. The guest
    /// stays, and whoever waits there for one goes on waiting.
    #[command(after_long_help = CHECK_EXAMPLES)]
    Check(CheckArgs),
    /// What device state is made of, and whether versions of this program read each other's.
    #[command(subcommand, after_long_help = STATE_EXAMPLES)]
    Schema(SchemaCommand),
    /// Print the device state in a file, or what differs in two.
    #[command(after_long_help = STATE_EXAMPLES)]
    Inspect(InspectArgs),
}

impl Command {
    /// Whether what was given fits together.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self {
            Self::Demo(args) => {
                args.migration.check()?;
                args.guest.check()
            }
            Self::Run(args) => {
                args.onward.migration.check()?;
                args.guest.check()
            }
            Self::Check(args) => {
                args.migration.check()?;
                args.guest.check()
            }
            Self::Receive(args) => args.onward.migration.check(),
            Self::Restore(args) => args.onward.migration.check(),
            Self::Save(args) => args.guest.check(),
            Self::Cpu(_) | Self::Schema(_) | Self::Inspect(_) => Ok(()),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,
    /// Where the destination listens: HOST:PORT, an address of this host [default: 127.0.0.1:0, or
    /// the first address of an RDMA device with --transport rdma].
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Option<String>,
    /// Threads that allocate the destination's memory ahead of the data.
    #[arg(long, value_name = "THREADS", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=256))]
    pub(crate) populate: u16,
    /// Compare all memory by digest before the guest resumes. The guest stands still for it,
    /// which is reported apart from the downtime.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub(crate) verify: bool,
    /// Print one JSON object and nothing else on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    /// Also write what happened over time, as one HTML file.
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) migration: MigrationArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,
    /// After a migration that failed: run on for this long, check the guest's memory, and exit
    /// [default: run on until Ctrl-C or "quit" on stdin].
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub(crate) run_for: Option<Duration>,
    /// Print one JSON object per migration and nothing else on stdout; and one if the guest is ended
    /// before there was a migration, which counts as cancelled.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) observers: ObserverArgs,
    /// End when the parent process does.
    #[arg(long, hide = true)]
    pub(crate) with_parent: bool,
    /// Have what happened over time in the JSON object.
    #[arg(long, hide = true)]
    pub(crate) timeline: bool,
    #[command(flatten)]
    pub(crate) onward: OnwardArgs,
}

/// Where a guest that runs here goes next, and how.
#[derive(Debug, Args)]
pub(crate) struct OnwardArgs {
    /// Where a `pageferry-vmm receive` listens: HOST:PORT, [IPV6]:PORT, [IPV6%INTERFACE]:PORT; or several
    /// addresses of its host with commas between them, over which data channels are dealt out.
    #[arg(long, value_name = "ADDR")]
    pub(crate) migrate_to: Option<String>,
    /// How long the guest runs before it is migrated.
    #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = time)]
    pub(crate) migrate_after: Duration,
    /// Migrate on SIGUSR1 or a line "migrate [ADDR]" on stdin, not by itself.
    #[arg(long)]
    pub(crate) on_demand: bool,
    /// Compare all memory by digest before the guest resumes. The guest stands still for it.
    #[arg(long)]
    pub(crate) verify: bool,
    #[command(flatten)]
    pub(crate) migration: MigrationArgs,
}

impl OnwardArgs {
    /// Whether it goes without being told to.
    pub(crate) fn is_planned(&self) -> bool {
        self.migrate_to.is_some() && !self.on_demand
    }
}

#[derive(Debug, Args)]
pub(crate) struct ReceiveArgs {
    /// Where to listen: HOST:PORT, port 0 for one that is free.
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:7400")]
    pub(crate) listen: String,
    /// Take only a guest with this much memory [default: any that is not more than this machine has,
    /// swap included].
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) memory: Option<u64>,
    /// Take only a guest whose virtual CPUs have no more than this file says (`pageferry-vmm cpu` makes one)
    /// [default: than KVM has here].
    #[arg(long, value_name = "FILE")]
    pub(crate) cpu_baseline: Option<PathBuf>,
    /// What backs the guest's memory here.
    #[arg(long, default_value = "anonymous")]
    pub(crate) backing: Backing,
    /// Threads that allocate the guest's memory ahead of the data.
    #[arg(long, value_name = "THREADS", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=256))]
    pub(crate) populate: u16,
    /// After the guest arrived, or after a migration onward that failed: run it for this long, check its memory, and
    /// exit [default: run it until Ctrl-C or "quit" on stdin].
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub(crate) run_for: Option<Duration>,
    /// Print one JSON object of how the guest came, one per migration onward, and nothing else on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) observers: ObserverArgs,
    /// End when the parent process does.
    #[arg(long, hide = true)]
    pub(crate) with_parent: bool,
    /// Have what happened over time in the JSON object.
    #[arg(long, hide = true)]
    pub(crate) timeline: bool,
    #[command(flatten)]
    pub(crate) onward: OnwardArgs,
}

#[derive(Debug, Args)]
pub(crate) struct SaveArgs {
    /// The file. It is there once it is whole; who is killed before leaves pageferry-*.partial
    /// beside it. One that it replaces keeps its permissions and its ACL; and its owner and group
    /// where the caller may give files to them, or else it is the caller's, and what was its group's
    /// is nobody's.
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) guest: GuestArgs,
    /// How long the guest runs before it is saved. A Ctrl-C before has it saved at once.
    #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = time)]
    pub(crate) run_for: Duration,
    /// Print one JSON object and nothing else on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The file.
    pub(crate) file: PathBuf,
    /// What backs the guest's memory here.
    #[arg(long, default_value = "anonymous")]
    pub(crate) backing: Backing,
    /// What the guest's clock did while the guest was in the file.
    #[arg(long, value_name = "WHAT", default_value = "continue")]
    pub(crate) clock: ClockChoice,
    /// How long the guest runs before its memory is checked and it ends; with --migrate-to or --on-demand, after a
    /// migration that failed.
    #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = time)]
    pub(crate) run_for: Duration,
    /// Print one JSON object and nothing else on stdout, and one more per migration.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) onward: OnwardArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ClockChoice {
    /// It stood still: the guest does not notice for how long it was there.
    Continue,
    /// It went on, by this host's clock.
    CatchUp,
}

impl From<ClockChoice> for Meanwhile {
    fn from(choice: ClockChoice) -> Self {
        match choice {
            ClockChoice::Continue => Self::StandsStill,
            ClockChoice::CatchUp => Self::GoesOn,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Where a `pageferry-vmm receive` listens: HOST:PORT, [IPV6]:PORT, [IPV6%INTERFACE]:PORT.
    #[arg(value_name = "ADDR")]
    pub(crate) address: String,
    /// For how long parts of the guest's memory are sent, which are thrown away there, at most a minute. A destination
    /// serves one at a time, and refuses guests meanwhile.
    #[arg(long = "for", value_name = "TIME", default_value = "1s", value_parser = trial_time)]
    pub(crate) time: Duration,
    #[command(flatten)]
    pub(crate) guest: GuestArgs,
    /// Print one JSON object and nothing else on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) migration: MigrationArgs,
}

fn trial_time(text: &str) -> Result<Duration, String> {
    let time = time(text)?;
    if time > Duration::from_secs(60) { Err("more than a minute".to_owned()) } else { Ok(time) }
}

#[derive(Debug, Args)]
pub(crate) struct CpuArgs {
    /// What other hosts have [default: this one].
    pub(crate) files: Vec<PathBuf>,
    /// Leave these features out, by the names of /proc/cpuinfo.
    #[arg(long, value_name = "FEATURES", value_delimiter = ',')]
    pub(crate) without: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SchemaCommand {
    /// Print the schema of this program, as JSON.
    Dump,
    /// Tell from two schemas which migrations work: from the old program to the new one, and back.
    /// Fails if one does not although its versions say that it does.
    Check {
        /// The schema of the old program.
        old: PathBuf,
        /// The schema of the new one.
        new: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A file of `save`, or a stream of device state; `-` for stdin.
    pub(crate) file: PathBuf,
    /// Another one: print what is different in it.
    pub(crate) other: Option<PathBuf>,
}
