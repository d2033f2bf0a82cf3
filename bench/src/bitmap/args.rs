//! The command line of `bitmap`.

use clap::Args;
use pageferry::MAX_CHANNELS;
use pageferry::memory::{MAX_REGION_PAGES, PAGE_BYTES};
use pageferry_cli::units::size;

use crate::words::share;

pub(crate) const EXAMPLES: &str = "\
Examples:
  All sizes, one thread and all CPUs:
    pageferry-bench bitmap

  A large guest, one thread, for a script:
    pageferry-bench bitmap --guest 16T --threads 1 --json";

pub(crate) const METHOD: &str = "\
What is measured, with a bit for each page of 4 KiB:
  read     all words are combined into one by OR, by so many threads, each a contiguous part: what
           is measured against
  harvest  a tracker's bitmap is added to the engine's, by one thread
  count    dirty pages are counted, by one thread
  scan     each sender finds the dirty stripes among its own, and the runs of pages in them

  \"clustered\" has dirty pages in runs of 512 (2 MiB), \"scattered\" has them one by one at random
  distances. A time is the median of the samples; small bitmaps are gone through many times in a
  sample, and so come from the CPU's caches. Takes 128 bytes of memory for each MiB of guest.";

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
    pub(crate) fn check(&self) -> Result<(), String> {
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
