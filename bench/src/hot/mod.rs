//! `hot`: one of the engine's inner loops, alone on one thread, so that what it costs can be
//! counted: by the program itself, by valgrind, by strace. `ci/gate` compares the counts of two
//! trees.

mod paths;
mod transports;

use std::time::Instant;

use clap::{Args, ValueEnum};
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::transport::ZeroCopyChoice;
use pageferry_report::document::ZeroCopy;
use serde::{Deserialize, Serialize};

use crate::links::Way;
use crate::output::line;
use crate::words::{RdmaArgs, Transport};

pub(crate) use transports::BATCHES;

pub(crate) const METHOD: &str = "\
Each does its work so often on one thread; twice as much work less once as much is what the loop
itself costs, without what comes before and after it.

  scan      finding the dirty stripes of a bitmap that is mostly clean, and the runs in them
  coalesce  a sender's round over scattered dirty pages, up to a transport that does nothing
  zero      the same over pages that are all zero
  framing   the heads of batches, encoded and decoded
  work-requests
            the work requests of batches, built as RDMA does and not posted
  tcp, iouring
            batches of 32 pages in four runs, sent and received over loopback, one after the other
  tcp-zero-copy, iouring-zero-copy
            the same, and the kernel is asked not to copy
  rdma      the same over an RDMA device

work-requests and rdma are only there if RDMA was built in.";

/// An inner loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Loop {
    Scan,
    Coalesce,
    Zero,
    Framing,
    Tcp,
    #[value(name = "iouring")]
    IoUring,
    TcpZeroCopy,
    #[value(name = "iouring-zero-copy")]
    IoUringZeroCopy,
    #[cfg(feature = "rdma")]
    WorkRequests,
    #[cfg(feature = "rdma")]
    Rdma,
}

#[derive(Debug, Args)]
pub(crate) struct HotArgs {
    /// Which.
    pub(crate) which: Loop,
    /// How much of it; what one is differs from loop to loop.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) work: u32,
    /// How often it is done, for who measures time.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) repeat: u32,
    #[command(flatten)]
    pub(crate) rdma: RdmaArgs,
}

/// What can be counted from inside.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Counts {
    /// Heap allocations on this thread.
    pub(crate) allocations: u64,
    /// As the transport counts them, both ends together.
    pub(crate) system_calls: u64,
    pub(crate) user_copied_bytes: u64,
    pub(crate) wire_bytes: u64,
    pub(crate) zero_copy: ZeroCopy,
    /// Work requests of a NIC: posted, with a completion, and the calls that posted them.
    #[serde(default)]
    pub(crate) posted: u64,
    #[serde(default)]
    pub(crate) signalled: u64,
    #[serde(default)]
    pub(crate) doorbells: u64,
    /// The shortest time of all repetitions.
    pub(crate) nanoseconds: u64,
}

type Work = Box<dyn FnMut() -> Result<Counts, Failure>>;

/// Does it, and prints the counts.
pub(crate) fn run(args: &HotArgs) -> Result<Outcome, Failure> {
    let by = |transport, zero_copy| -> Result<Work, Failure> {
        let way = Way { transport, rdma: args.rdma };
        Ok(Box::new(transports::pages(way, zero_copy, args.work)?))
    };
    let mut work: Work = match args.which {
        Loop::Scan => Box::new(paths::scan(args.work)?),
        Loop::Coalesce => Box::new(paths::coalesce(args.work)?),
        Loop::Zero => Box::new(paths::zero(args.work)?),
        Loop::Framing => Box::new(paths::framing(args.work)?),
        Loop::Tcp => by(Transport::Tcp, ZeroCopyChoice::Off)?,
        Loop::IoUring => by(Transport::IoUring, ZeroCopyChoice::Off)?,
        Loop::TcpZeroCopy => by(Transport::Tcp, ZeroCopyChoice::On)?,
        Loop::IoUringZeroCopy => by(Transport::IoUring, ZeroCopyChoice::On)?,
        #[cfg(feature = "rdma")]
        Loop::Rdma => by(Transport::Rdma, ZeroCopyChoice::Off)?,
        #[cfg(feature = "rdma")]
        Loop::WorkRequests => Box::new(paths::work_requests(args.work)?),
    };
    let mut shortest = u64::MAX;
    let mut counts = Counts::default();
    for _ in 0..args.repeat {
        let mut result = Ok(Counts::default());
        let began = Instant::now();
        let allocated = allocation_counter::measure(|| result = work());
        shortest = shortest.min(u64::try_from(began.elapsed().as_nanos())?);
        counts = Counts { allocations: allocated.count_total, ..result? };
    }
    counts.nanoseconds = shortest;
    line(&serde_json::to_string(&counts)?)?;
    Ok(Outcome::Completed)
}
