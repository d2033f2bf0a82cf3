//! The command line of `simulate`.

use std::path::PathBuf;

use clap::Args;

pub(crate) const METHOD: &str = "\
Example:
  pageferry-bench simulate --html simulated.html

What is simulated:
  Each scenario is drawn from a seed: a guest (1 GiB to 16 TiB; its pages are written evenly, hot and
  cold, in bursts or in phases), a link (1 to 400 Gb/s, round trips of 0.05 to 100 ms, jitter,
  episodes of loss, a slow channel, a step to another speed), two hosts (what pausing, harvesting,
  saving, loading and resuming cost) and a downtime limit (20 ms to 1 s). Estimators and policies
  migrate the same scenarios. No thread and no clock is in it: the same seed gives the same figures
  anywhere, but for elapsed_ms.

  left             the guest runs at the destination (slowed: it was throttled on the way)
  called off       switchovers given up in time: the guest went on at the source
  over the limit   downtimes longer than allowed
  error            how far the prediction was from the downtime
  effort           total time, as a multiple of sending everything once";

#[derive(Debug, Args)]
pub(crate) struct SimulateArgs {
    /// How many scenarios.
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) scenarios: u32,
    /// Seed of the first; each further one has the next.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Write plots to this file, a page that needs nothing else.
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// Print one JSON object and nothing else on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}
