//! The command line of `compare`.

use clap::Args;
use pageferry::MAX_CHANNELS;
use pageferry_cli::units::size;
use pageferry_vmm::ram::Backing;

use crate::words::{RdmaArgs, Transport, a_page_each, whole_pages};

pub(crate) const EXAMPLES: &str = "\
Examples:
  With every peer that this machine has:
    pageferry-bench compare

  Four channels into a memfd, for a page of plots:
    pageferry-bench compare --channels 4 --backing memfd --json > compare.json
    pageferry-bench report compare.json --out compare.html";

pub(crate) const METHOD: &str = "\
What is measured:
  Everybody moves as much over loopback, in turn, a round after the other; each round begins with
  another one. What is moved once before that does not count.

  pageferry    as `throughput` measures it: the pages of a migration, from the first to the last
  bare loop    likewise
  iperf3       bytes from socket to socket, a stream a channel. Its receiver has no guest memory to
               fill: it writes over the same buffer all the time
  QEMU         the migration of a machine that never ran, driven over QMP, by multifd with as many
               channels: normal pages over total time less setup, as QEMU says
  ib_write_bw, ib_read_bw
               messages of 64 KiB, or of --rdma-slice, between two processes over
               the RDMA device of --rdma-address, or the first one

  Who is not there is named as missing, with the reason.";

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// What moves the engine's pages.
    #[arg(long, value_delimiter = ',', default_value = "tcp,iouring")]
    pub(crate) transport: Vec<Transport>,
    /// Memory that is moved.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = size)]
    pub(crate) memory: u64,
    /// What backs it.
    #[arg(long, default_value = "anonymous")]
    pub(crate) backing: Backing,
    /// Data channels, connections, streams.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=128.min(i64::from(MAX_CHANNELS))))]
    pub(crate) channels: u16,
    /// How often each is measured.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) rounds: u16,
    /// Print one JSON object and nothing else on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) rdma: RdmaArgs,
}

impl CompareArgs {
    /// Whether what was given fits together.
    pub(crate) fn check(&self) -> Result<(), String> {
        RdmaArgs::check(&self.transport)?;
        whole_pages(self.memory, self.backing)?;
        a_page_each(self.memory, self.channels)
    }
}
