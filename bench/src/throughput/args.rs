//! The command line of `throughput`.

use clap::Args;
use pageferry::MAX_CHANNELS;
use pageferry_cli::transport::ZeroCopyChoice;
use pageferry_cli::units::size;
use pageferry_vmm::ram::Backing;

use crate::words::{RdmaArgs, Transport, a_page_each, share, whole_pages};

pub(crate) const EXAMPLES: &str = "\
Examples:
  Three GiB in transparent huge pages, engine against bare loop, five times:
    pageferry-bench throughput

  Into a memfd, whose pages of 4 KiB the destination allocates as the bytes come:
    pageferry-bench throughput --backing memfd --memory 1G --channels 4

  In reserved huge pages; both sides need them:
    echo 3072 | sudo tee /proc/sys/vm/nr_hugepages
    pageferry-bench throughput --backing hugetlb

  A guest that is half empty and writes to 20000 pages a second, for a script:
    pageferry-bench throughput --zero-share 0.5 --dirty-rate 20000 --json

  Encrypted in the process, against a loop that does no more than that:
    pageferry-bench throughput --transport tcp-tls --memory 1G

  Over RDMA, against ib_write_bw with as many queue pairs and writes as large:
    pageferry-bench throughput --transport rdma --rdma-address 10.78.0.1 --memory 256M";

pub(crate) const METHOD: &str = "\
What is measured:
  Source and destination are two processes that talk over loopback. The source fills its memory
  once with bytes that cannot be compressed, and moves it again and again: by the engine, by the
  bare loop, by the bare loop, by the engine, and so on. The destination maps fresh memory for
  each. Before, the bare loop moves it once without being counted, so that nobody is the first to
  touch memory of this host. That, and what the engine moves first, is checked by digest.

  The engine's throughput is the bytes of pages sent (neither headers nor zero pages) over the
  time from the first page to the last one landed, the last round with the guest stopped
  included; without the handshake, without the device state.

  The bare loop has as many TCP connections as the engine has data channels. Each has a thread on
  both sides and its own contiguous part of the memory, sent by write(2) of 1 MiB straight from
  memory, and received in place by read(2) of all that is still missing, which returns what is
  there. Its time ends when the source has a byte from every receiver, which sends it when all
  bytes are there. It sends zero pages like all others, nobody writes meanwhile, and it checks
  nothing.

  Where the engine encrypts in its process (--transport tcp-tls) the bare loop does too: records of
  16 KiB, copied out of memory, sealed by AES-128-GCM in place, sent; received, opened in place and
  copied into memory. Where the kernel encrypts for the engine the bare loop sends plain text.

  Over RDMA perftest's ib_write_bw takes the place of the bare loop: as many queue pairs, writes as
  large, as many bytes, both ends on this host. It registers one small buffer and writes it again
  and again. What the engine's registration costs is in its figure only if it happens on the way.

  CPU seconds are those of all threads of a process during the transfer, kernel included; on
  loopback the sender's thread does most of the receiving half of TCP, and that of a software RDMA
  device. What the thread costs that writes for --dirty-rate is taken off.

  Peak memory is how far the resident set of a process (VmHWM) grew during a migration, without
  what grew in guest memory (Rss of its mappings): heap, stacks and code of the engine. At a
  destination whose memory fills meanwhile, something freed long before the end does not show.";

#[derive(Debug, Args)]
pub(crate) struct ThroughputArgs {
    /// Guest memory. Needs twice as much: both sides are here.
    #[arg(long, value_name = "SIZE", default_value = "3G", value_parser = size)]
    pub(crate) memory: u64,
    /// What backs the memory of both sides.
    #[arg(long, default_value = "anonymous")]
    pub(crate) backing: Backing,
    /// Share of pages that are zero, 0.0 to 1.0; allocated, in blocks of 64 KiB evenly spread.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    pub(crate) zero_share: f64,
    /// Pages that a thread writes to a second while the engine works, at random; tracked by
    /// PAGEMAP_SCAN. Without it nobody writes and nothing is tracked.
    #[arg(long, value_name = "PAGES", default_value_t = 0)]
    pub(crate) dirty_rate: u32,
    /// What moves the pages.
    #[arg(long, default_value = "tcp")]
    pub(crate) transport: Transport,
    /// Data channels of the engine, and connections of the bare loop.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_CHANNELS)))]
    pub(crate) channels: u16,
    /// The engine sends pages without a copy in the kernel (MSG_ZEROCOPY).
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub(crate) zero_copy: ZeroCopyChoice,
    /// Most page bytes in a batch [default: the engine's, 4 MiB].
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) batch: Option<u64>,
    /// Threads that allocate the destination's memory ahead of the data.
    #[arg(long, value_name = "THREADS", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=256))]
    pub(crate) populate: u16,
    /// How often both are measured.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) pairs: u16,
    /// Print one JSON object and nothing else on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) rdma: RdmaArgs,
}

impl ThroughputArgs {
    pub(crate) fn check(&self) -> Result<(), String> {
        RdmaArgs::check(&[self.transport])?;
        whole_pages(self.memory, self.backing)?;
        a_page_each(self.memory, self.channels)
    }
}
