//! The command line of `migrate`.

use clap::Args;
use pageferry::MAX_CHANNELS;
use pageferry_cli::units::size;
use pageferry_vmm::choice::{GuestChoice, check_sizes};
use pageferry_vmm::ram::Backing;
use pageferry_vmm::tracking::DirtyTracking;
use pageferry_vmm::workload::WorkloadKind;

use crate::words::{RdmaArgs, Transport};

pub(crate) const EXAMPLES: &str = "\
Examples:
  Both transports, 1 to 4 channels, and a page of plots:
    pageferry-bench migrate --channels 1,2,4 --json > sweep.json
    pageferry-bench report sweep.json --out sweep.html

  A guest at several rates, on a quiet and on a busy host:
    pageferry-bench migrate --dirty-rate 1000,10000,50000 --host-load 0,2";

pub(crate) const METHOD: &str = "\
What is measured:
  A guest with a workload runs in one process of this host and moves to another, once for each
  combination of what is given. Where it arrives it runs on, and then its memory and registers must
  be what it wrote; a migration that fails, or a guest that is wrong, is in the report and makes
  the exit status 1.

  Load of the guest is threads that read the guest's memory and compute as long as the guest runs, at
  the source and then at the destination. Load of the host is threads of a third process that copy
  memory and compute all the time. Each takes a CPU, if it can get one; what they got is reported.";

#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// What moves the pages.
    #[arg(long, value_delimiter = ',', default_value = "tcp,iouring")]
    pub(crate) transport: Vec<Transport>,
    /// Numbers of data channels.
    #[arg(long, value_delimiter = ',', default_value = "2", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_CHANNELS)))]
    pub(crate) channels: Vec<u16>,
    /// What backs guest memory on both sides.
    #[arg(long, value_delimiter = ',', default_value = "anonymous")]
    pub(crate) backing: Vec<Backing>,
    /// How the guest writes.
    #[arg(long, value_delimiter = ',', default_value = "sequential")]
    pub(crate) workload: Vec<WorkloadKind>,
    /// Pages the guest writes a second [default: as fast as it can].
    #[arg(long, value_name = "PAGES", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) dirty_rate: Vec<u64>,
    /// Threads of load in the guest.
    #[arg(long, value_name = "THREADS", value_delimiter = ',', default_value = "0", value_parser = clap::value_parser!(u16).range(0..=256))]
    pub(crate) guest_load: Vec<u16>,
    /// Threads of load on the host.
    #[arg(long, value_name = "THREADS", value_delimiter = ',', default_value = "0", value_parser = clap::value_parser!(u16).range(0..=256))]
    pub(crate) host_load: Vec<u16>,
    /// Guest memory.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = size)]
    pub(crate) memory: u64,
    /// Memory the guest writes to.
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = size)]
    pub(crate) working_set: u64,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) vcpus: u8,
    /// What runs the guest.
    #[arg(long, default_value = "auto")]
    pub(crate) guest: GuestChoice,
    /// What tells which pages the guest wrote.
    #[arg(long, value_name = "SOURCE", default_value = "auto")]
    pub(crate) dirty_source: DirtyTracking,
    /// How long the guest may stand still, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub(crate) downtime_limit: u64,
    /// Seed of everything random in the guest.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Print one JSON object and nothing else on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) rdma: RdmaArgs,
}

impl MigrateArgs {
    /// Whether what was given fits together.
    pub(crate) fn check(&self) -> Result<(), String> {
        RdmaArgs::check(&self.transport)?;
        let Self { memory, working_set, vcpus, .. } = *self;
        check_sizes(memory, working_set, vcpus, &self.backing)
    }
}
