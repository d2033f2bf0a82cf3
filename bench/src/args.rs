//! The command line.

use std::net::IpAddr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pageferry::MAX_CHANNELS;
use pageferry::memory::{MAX_REGION_PAGES, PAGE_BYTES};
use pageferry_tcp::ZeroCopy;
use pageferry_vmm::ram::Backing;
use serde::{Deserialize, Serialize};

use crate::compare::{self, CompareArgs};
use crate::gate::{self, GateArgs};
use crate::hot::{self, HotArgs};
use crate::latency::{self, LatencyArgs};
use crate::migrate::{self, MigrateArgs};
use crate::page::{self, ReportArgs};
use crate::rearm::{self, RearmArgs};
use crate::simulate::{self, SimulateArgs};
use crate::throughput::SideName;

pub(crate) const HUGE_PAGE_BYTES: u64 = 2 << 20;

const EXIT_CODES: &str = "\
Exit status:
  0  everything was measured, and what arrived was checked
  1  something failed; the message says what
  2  the command line makes no sense
  3  cancelled";

const THROUGHPUT_EXAMPLES: &str = "\
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

  Over RDMA, against ib_write_bw with as many queue pairs and writes as large:
    pageferry-bench throughput --transport rdma --rdma-address 10.78.0.1 --memory 256M";

const THROUGHPUT_METHOD: &str = "\
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

  Over RDMA perftest's ib_write_bw takes the place of the bare loop: as many queue pairs, writes as
  large, as many bytes, both ends on this host. It registers one small buffer and writes it again
  and again. What the engine's registration costs is in its figure only if it happens on the way.

  CPU seconds are those of all threads of a process during the transfer, kernel included; on
  loopback the sender's thread does most of the receiving half of TCP, and that of a software RDMA
  device. What the thread costs that writes for --dirty-rate is taken off.

  Peak memory is how far the resident set of a process (VmHWM) grew during a migration, without
  what grew in guest memory (Rss of its mappings): heap, stacks and code of the engine. At a
  destination whose memory fills meanwhile, something freed long before the end does not show.";

const RUNS_METHOD: &str = "\
Example, on two hosts or in two network namespaces:
  host-b$ pageferry-bench runs --listen 10.0.0.2:7401
  host-a$ pageferry-bench runs --connect 10.0.0.2:7401

What is measured:
  One channel sends runs of one length, a page apart, out of 64 MiB, in batches of up to 4 MiB, in
  three ways in turn: copied by the kernel; zero-copy, pinned for each send; zero-copy from
  registered buffers. Times are from the first byte until all has landed, without connecting and
  registration; medians of the samples. CPU seconds are the source's, kernel included. Where the
  kernel copies what was to be zero-copy (loopback, most virtual NICs) the second way soon becomes
  the first, and the third shows what that costs.";

const BITMAP_EXAMPLES: &str = "\
Examples:
  All sizes, one thread and all CPUs:
    pageferry-bench bitmap

  A large guest, one thread, for a script:
    pageferry-bench bitmap --guest 16T --threads 1 --json";

const BITMAP_METHOD: &str = "\
What is measured, with a bit for each page of 4 KiB:
  read     all words are combined into one by OR, by so many threads, each a contiguous part: what
           is measured against
  harvest  a tracker's bitmap is added to the engine's, by one thread
  count    dirty pages are counted, by one thread
  scan     each sender finds the dirty stripes among its own, and the runs of pages in them

  \"clustered\" has dirty pages in runs of 512 (2 MiB), \"scattered\" has them one by one at random
  distances. A time is the median of the samples; small bitmaps are gone through many times in a
  sample, and so come from the CPU's caches. Takes 128 bytes of memory for each MiB of guest.";

const DEVICE_STATE_METHOD: &str = "\
Example:
  pageferry-bench device-state --vcpus 64 --blob 16M

What is measured:
  A guest of so many vCPUs has run and stands still. Its whole device state is saved to bytes, as a
  migration does it between pause and handover, by 1, 2 and 4 threads, and loaded again: registers,
  model specific registers, local APICs and vector registers of each vCPU, interrupt controllers,
  timer, clock, serial port, heartbeat. Then a device of so many random bytes is encoded to a
  stream, checksum included, and decoded to a new device; and the same bytes are copied. Each of
  these takes fresh memory from the allocator. Figures are medians of the samples.";

/// Measures the pageferry live-migration engine.
#[derive(Debug, Parser)]
#[command(version, after_long_help = format!("{THROUGHPUT_EXAMPLES}\n\n{EXIT_CODES}"))]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Move memory between two processes of this host, by the engine and by a bare loop.
    #[command(after_long_help = format!("{THROUGHPUT_METHOD}\n\n{THROUGHPUT_EXAMPLES}\n\n{EXIT_CODES}"))]
    Throughput(ThroughputArgs),
    /// Send runs of pages of each length by io_uring, copied by the kernel and zero-copy, to where
    /// the same command listens.
    #[command(after_long_help = format!("{RUNS_METHOD}\n\n{EXIT_CODES}"))]
    Runs(RunsArgs),
    /// Do what the engine does with dirty bitmaps, and read the same bitmaps.
    #[command(after_long_help = format!("{BITMAP_METHOD}\n\n{BITMAP_EXAMPLES}\n\n{EXIT_CODES}"))]
    Bitmap(BitmapArgs),
    /// Re-arm KVM's dirty log under a running guest, as a sender does and by bare loops.
    #[command(after_long_help = format!("{}\n\n{EXIT_CODES}", rearm::METHOD))]
    Rearm(RearmArgs),
    /// Migrate modelled guests over modelled networks with the engine's own state machines, and
    /// compare estimators and policies.
    #[command(after_long_help = format!("{}\n\n{EXIT_CODES}", simulate::METHOD))]
    Simulate(SimulateArgs),
    /// Save and load the device state of a guest, and encode and decode that of a large device.
    #[command(after_long_help = format!("{DEVICE_STATE_METHOD}\n\n{EXIT_CODES}"))]
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

/// What moves the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Transport {
    /// TCP sockets.
    Tcp,
    /// TCP sockets driven by io_uring.
    #[value(name = "iouring")]
    IoUring,
    /// RDMA, in programs that were built with it; against perftest's ib_write_bw.
    Rdma,
}

/// Settings of `--transport rdma`.
#[expect(clippy::struct_field_names, reason = "as the command line has them")]
#[derive(Debug, Clone, Copy, Default, Args, Serialize, Deserialize)]
#[command(next_help_heading = "With --transport rdma")]
pub(crate) struct RdmaArgs {
    /// Address of the RDMA device, where both sides are [default: the first there is].
    #[arg(long, value_name = "ADDR")]
    pub(crate) rdma_address: Option<IpAddr>,
    /// Most bytes of one write, and bytes of each of perftest's [default: the transport's, 1 MiB].
    #[arg(long, value_name = "SIZE", value_parser = slice)]
    pub(crate) rdma_slice: Option<u32>,
    /// When guest memory is registered.
    #[arg(long, value_name = "WHEN", default_value = "at-start")]
    pub(crate) rdma_registration: RdmaRegistration,
}

/// When guest memory is registered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum RdmaRegistration {
    /// All of it before the first page; that time is not counted.
    #[default]
    AtStart,
    /// Chunk by chunk while pages flow.
    Ahead,
}

impl RdmaArgs {
    /// Where RDMA is among the transports: that this program was built with it.
    pub(crate) fn check(transports: &[Transport]) -> Result<(), String> {
        if !transports.contains(&Transport::Rdma) {
            Ok(())
        } else if !cfg!(feature = "rdma") {
            Err("--transport rdma: this program was built without RDMA; build it with --features \
                 rdma (which needs cmake and libclang)"
                .to_owned())
        } else {
            Ok(())
        }
    }
}

impl std::fmt::Display for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::IoUring => "iouring",
            Self::Rdma => "rdma",
        })
    }
}

/// Whether the kernel is asked not to copy what it sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ZeroCopyChoice {
    /// As long as it pays: not where the kernel copies anyway, as on loopback.
    Auto,
    /// Never.
    Off,
    /// Always, also where the kernel copies anyway.
    On,
}

impl From<ZeroCopyChoice> for ZeroCopy {
    fn from(choice: ZeroCopyChoice) -> Self {
        match choice {
            ZeroCopyChoice::Auto => Self::Auto,
            ZeroCopyChoice::Off => Self::Off,
            ZeroCopyChoice::On => Self::On,
        }
    }
}

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
    fn check(&self) -> Result<(), String> {
        RdmaArgs::check(&[self.transport])?;
        whole_pages(self.memory, self.backing)?;
        a_page_each(self.memory, self.channels)
    }
}

#[derive(Debug, Args)]
pub(crate) struct RunsArgs {
    /// Take what is sent, at this address, until the process is ended.
    #[arg(long, value_name = "ADDR", required_unless_present = "connect")]
    pub(crate) listen: Option<String>,
    /// Send, to this address.
    #[arg(long, value_name = "ADDR", conflicts_with = "listen")]
    pub(crate) connect: Option<String>,
    /// Lengths of runs.
    #[arg(long, value_name = "SIZES", default_value = "4K,8K,16K,32K,64K,128K,256K,1M", value_delimiter = ',', value_parser = size)]
    pub(crate) sizes: Vec<u64>,
    /// Bytes of each sample.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = size)]
    pub(crate) bytes: u64,
    /// How often each is measured.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) samples: u16,
    /// Print one JSON object and nothing else on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

impl RunsArgs {
    fn check(&self) -> Result<(), String> {
        let fits = |size: &u64| size.is_multiple_of(PAGE_BYTES) && *size <= 4 << 20;
        match self.sizes.iter().find(|size| !fits(size)) {
            Some(size) => Err(format!("--sizes {size}: runs are of whole pages, at most 4 MiB")),
            None => Ok(()),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct BitmapArgs {
    /// Sizes of guest memory.
    #[arg(long, value_name = "SIZES", default_value = "1G,64G,1T,16T", value_delimiter = ',', value_parser = size)]
    pub(crate) guest: Vec<u64>,
    /// Shares of pages that are dirty, 0.0 to 1.0.
    #[arg(long, value_name = "SHARES", default_value = "0,0.001,0.1,1", value_delimiter = ',', value_parser = share)]
    pub(crate) dirty: Vec<f64>,
    /// Numbers of threads [default: 1 and its doubles up to the number of CPUs].
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_CHANNELS)))]
    pub(crate) threads: Vec<u16>,
    /// How often each is measured.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) samples: u16,
    /// Print one JSON object and nothing else on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

impl BitmapArgs {
    fn check(&self) -> Result<(), String> {
        for guest in &self.guest {
            if guest / PAGE_BYTES > MAX_REGION_PAGES {
                let most = MAX_REGION_PAGES * PAGE_BYTES;
                return Err(format!("--guest {guest} is too much, at most {most} is possible"));
            }
            if !guest.is_multiple_of(PAGE_BYTES) {
                return Err(format!("--guest {guest} is not a multiple of {PAGE_BYTES} bytes"));
            }
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(crate) struct DeviceStateArgs {
    /// Virtual CPUs.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) vcpus: u8,
    /// Length of the large device, less than 4G.
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = blob_size)]
    pub(crate) blob: u64,
    /// How often each is measured.
    #[arg(long, value_name = "N", default_value_t = 25, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) samples: u16,
    /// Print one JSON object and nothing else on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

/// As long as a field can be.
fn blob_size(text: &str) -> Result<u64, String> {
    match size(text)? {
        bytes if bytes < 4 << 30 => Ok(bytes),
        bytes => Err(format!("{bytes} is too much for a device: less than 4G")),
    }
}

/// Memory of whole pages of its backing, no more than a region can have.
pub(crate) fn whole_pages(memory: u64, backing: Backing) -> Result<(), String> {
    let unit = if backing == Backing::Hugetlb { HUGE_PAGE_BYTES } else { PAGE_BYTES };
    if memory / PAGE_BYTES > MAX_REGION_PAGES {
        let most = MAX_REGION_PAGES * PAGE_BYTES;
        Err(format!("--memory {memory} is too much, at most {most} is possible"))
    } else if !memory.is_multiple_of(unit) {
        Err(format!("--memory {memory} is not a multiple of the page size, {unit} bytes"))
    } else {
        Ok(())
    }
}

/// Memory that has a page for each channel.
pub(crate) fn a_page_each(memory: u64, channels: u16) -> Result<(), String> {
    if memory / PAGE_BYTES < u64::from(channels) {
        return Err(format!(
            "--memory {memory} has less than one page for each of --channels {channels}"
        ));
    }
    Ok(())
}

/// "512M", "1G", "64MiB": binary units.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    match parse_size::Config::new().with_binary().parse_size(text) {
        Ok(0) => Err("nothing is too little; a size is like 512M or 1G".to_owned()),
        Ok(bytes) => Ok(bytes),
        Err(error) => Err(format!("{error}; a size is like 512M or 1G")),
    }
}

/// Whole pages, as many as one RDMA write can have.
fn slice(text: &str) -> Result<u32, String> {
    match u32::try_from(size(text)?) {
        Ok(bytes) if u64::from(bytes).is_multiple_of(PAGE_BYTES) && bytes <= 1 << 30 => Ok(bytes),
        _ => Err(format!("a write is of whole pages of {PAGE_BYTES} bytes, at most 1 GiB")),
    }
}

/// "0.25".
fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("a share is between 0.0 and 1.0".to_owned()),
    }
}
