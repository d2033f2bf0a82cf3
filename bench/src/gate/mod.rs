//! `gate`: whether one build of this program is worse than another. `ci/gate` makes both.

mod binary;
mod counts;
mod histograms;
mod interval;
mod pairs;
mod verdict;

use std::path::PathBuf;

use clap::Args;

use binary::Binary;
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_cli::say;
use verdict::{Report, Row};

pub(crate) const METHOD: &str = "\
What is compared, of two builds of this program, on this machine and in this run:
  instructions  of each loop of `hot`, under valgrind. More than 3 % more is worse
  counts        allocations, system calls (seen by strace), page bytes copied in user space, bytes
                that the kernel copied though they were sent zero-copy. Any more is worse
  time          pairs of runs, base and head in turn: the median of their ratios, and the interval
                that 95 % of resampled medians are in. Worse is when all of it is above 1.05,
                and then once more in as many new pairs
  histograms    of latencies over each transport, kept for who looks at them; nothing depends on them

  A base that cannot do something yet is no reason to fail: what is compared is what both can do.";

#[derive(Debug, Args)]
pub(crate) struct GateArgs {
    /// The build to compare.
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) head: PathBuf,
    /// The build to compare it with [default: none, and nothing can be worse].
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) base: Option<PathBuf>,
    /// Pairs of runs for each comparison of times.
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u16).range(5..=1000))]
    pub(crate) pairs: u16,
    /// Where to keep histograms [default: none are made].
    #[arg(long, value_name = "DIR")]
    pub(crate) histograms: Option<PathBuf>,
    /// Print one JSON object and nothing else on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Compares, prints what came of it, and fails if something is worse.
pub(crate) fn run(args: &GateArgs) -> Result<Outcome, Failure> {
    let head = Binary::new("head", &args.head)?;
    let base = args.base.as_ref().map(|path| Binary::new("base", path)).transpose()?;
    let base = base.as_ref();
    if base.is_none() {
        say!("there is no base: nothing is compared");
    }
    let mut rows: Vec<Row> = Vec::new();
    rows.extend(counts::instructions(&head, base)?);
    rows.extend(counts::counters(&head, base)?);
    if rows.iter().any(Row::is_worse) {
        say!("something is worse by its count: times are not compared");
    } else {
        rows.extend(pairs::times(&head, base, args.pairs)?);
    }
    let latencies = match &args.histograms {
        Some(directory) => histograms::make(&head, base, directory)?,
        None => Vec::new(),
    };
    let report = Report::new(rows, latencies);
    report.print(args.json)?;
    Ok(if report.is_worse() { Outcome::Failed } else { Outcome::Completed })
}
