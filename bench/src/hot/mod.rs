//! `hot`: one of the engine's inner loops, alone on one thread, so that what it costs can be
//! counted: by the program itself, by valgrind, by strace. `ci/gate` compares the counts of two
//! trees.

mod paths;
mod transports;

use std::time::Instant;

use clap::{Args, ValueEnum};
use pageferry_report::document::ZeroCopy;
use serde::{Deserialize, Serialize};

use crate::args::{Transport, ZeroCopyChoice};
use crate::outcome::{Failure, Outcome};
use crate::output::line;

pub(crate) use transports::BATCHES;

pub(crate) const METHOD: &str = "\
Each does its work so often on one thread; twice as much work less once as much is what the loop
itself costs, without what comes before and after it.

  scan      finding the dirty stripes of a bitmap that is mostly clean, and the runs in them
  coalesce  a sender's round over scattered dirty pages, up to a transport that does nothing
  zero      the same over pages that are all zero
  framing   the heads of batches, encoded and decoded
  tcp, iouring
            batches of 32 pages in four runs, sent and received over loopback, one after the other
  tcp-zero-copy, iouring-zero-copy
            the same, and the kernel is asked not to copy";

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
    /// The shortest time of all repetitions.
    pub(crate) nanoseconds: u64,
}

/// Does it, and prints the counts.
pub(crate) fn run(args: &HotArgs) -> Result<Outcome, Failure> {
    let mut work: Box<dyn FnMut() -> Result<Counts, Failure>> = match args.which {
        Loop::Scan => Box::new(paths::scan(args.work)?),
        Loop::Coalesce => Box::new(paths::coalesce(args.work)?),
        Loop::Zero => Box::new(paths::zero(args.work)?),
        Loop::Framing => Box::new(paths::framing(args.work)?),
        Loop::Tcp => Box::new(transports::pages(Transport::Tcp, ZeroCopyChoice::Off, args.work)?),
        Loop::IoUring => {
            Box::new(transports::pages(Transport::IoUring, ZeroCopyChoice::Off, args.work)?)
        }
        Loop::TcpZeroCopy => {
            Box::new(transports::pages(Transport::Tcp, ZeroCopyChoice::On, args.work)?)
        }
        Loop::IoUringZeroCopy => {
            Box::new(transports::pages(Transport::IoUring, ZeroCopyChoice::On, args.work)?)
        }
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
