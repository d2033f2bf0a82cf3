//! The command line of `latency`.

use std::path::PathBuf;

use clap::Args;
use pageferry::MAX_CHANNELS;
use pageferry_cli::units::size;
use pageferry_vmm::ram::Backing;

use crate::links::Way;
use crate::words::{RdmaArgs, Transport, whole_pages};

pub(crate) const EXAMPLES: &str = "\
Examples:
  Latencies over io_uring, and their histograms:
    pageferry-bench latency --transport iouring --histograms .

  Pages and control frames at a rate, as a guest's faults would ask for them:
    pageferry-bench latency --rate 5000 --json

  Over RDMA, with a page's write against perftest's:
    pageferry-bench latency --transport rdma --rdma-address 10.78.0.1";

pub(crate) const METHOD: &str = "\
What is measured, between two processes over loopback:
  batch    from the re-arm of a batch's first page until the source knows that all of the batch has
           landed, in migrations of memory that nobody writes to
  page     from the sending of one page until the source knows that it has landed
  control  from the sending of a control frame of 16 bytes until its echo is there
  commit   from the sending of the commit until its answer, once a migration

  Over RDMA also: two sides write a page of 4 KiB to the other's memory in turn, each as soon as it
  sees the other's in its own; half of the time there and back is what a write takes. perftest's
  ib_write_lat does the same, in turn with it; medians of both.

  With --rate, pages and frames are due at fixed times, and each time counts from when it was due:
  what had to wait for one that took long shows. Without, the next follows when the one before it
  is done.

  Histograms have three digits, from 1 ns to 60 s, one a thread, added up at the end. As many
  migrations are made without recording, in turn with the others; what recording costs is reported
  with the batches. Files: DIR/TRANSPORT.hlog, an interval log (V2, deflated), an interval a
  migration; DIR/TRANSPORT-WHAT.hgrm, for HdrHistogram's plotter.";

#[derive(Debug, Args)]
pub(crate) struct LatencyArgs {
    /// What moves the pages.
    #[arg(long, default_value = "tcp")]
    pub(crate) transport: Transport,
    /// Data channels of migrations.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_CHANNELS)))]
    pub(crate) channels: u16,
    /// Memory of migrations. Needs twice as much: both sides are here.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size)]
    pub(crate) memory: u64,
    /// What backs the memory of both sides.
    #[arg(long, default_value = "anonymous")]
    pub(crate) backing: Backing,
    /// Migrations that are recorded; there are as many that are not.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) migrations: u16,
    /// Single pages, and control frames.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) pings: u32,
    /// How many of them are due a second [default: one after the other].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rate: Option<u32>,
    /// Over RDMA: single pages written there and back, against ib_write_lat.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(10..=1_000_000))]
    pub(crate) writes: u32,
    /// How often both do that.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) pairs: u16,
    /// Where to keep histograms.
    #[arg(long, value_name = "DIR")]
    pub(crate) histograms: Option<PathBuf>,
    /// Print one JSON object and nothing else on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) rdma: RdmaArgs,
}

impl LatencyArgs {
    pub(super) fn way(&self) -> Way {
        Way { transport: self.transport, rdma: self.rdma }
    }

    /// Whether what was given fits together.
    pub(crate) fn check(&self) -> Result<(), String> {
        RdmaArgs::check(&[self.transport])?;
        whole_pages(self.memory, self.backing)
    }
}
