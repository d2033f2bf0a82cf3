//! The command line of `runs`.

use clap::Args;
use pageferry::memory::PAGE_BYTES;
use pageferry_cli::units::size;

pub(crate) const METHOD: &str = "\
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
    pub(crate) fn check(&self) -> Result<(), String> {
        let fits = |size: &u64| size.is_multiple_of(PAGE_BYTES) && *size <= 4 << 20;
        match self.sizes.iter().find(|size| !fits(size)) {
            Some(size) => Err(format!("--sizes {size}: runs are of whole pages, at most 4 MiB")),
            None => Ok(()),
        }
    }
}
