//! The command line of `device-state`.

use clap::Args;
use pageferry_cli::units::size;

pub(crate) const METHOD: &str = "\
Example:
  pageferry-bench device-state --vcpus 64 --blob 16M

What is measured:
  A guest of so many vCPUs has run and stands still. Its whole device state is saved to bytes, as a
  migration does it between pause and handover, by 1, 2 and 4 threads, and loaded again: registers,
  model specific registers, local APICs and vector registers of each vCPU, interrupt controllers,
  timer, clock, serial port, heartbeat. Then a device of so many random bytes is encoded to a
  stream, checksum included, and decoded to a new device; and the same bytes are copied. Each of
  these takes fresh memory from the allocator. Figures are medians of the samples.";

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
