//! The command line of `compare-guests`.

use std::time::Duration;

use clap::Args;
use pageferry::memory::PAGE_BYTES;
use pageferry_cli::units::{size, time, time_text};

use crate::words::{RdmaArgs, Transport};

pub(crate) const EXAMPLES: &str = "\
Examples:
  QEMU's own migration, with and without multifd, and pageferry by tcp and by io_uring:
    pageferry-bench compare-guests

  A larger guest, four channels, by tcp alone:
    pageferry-bench compare-guests --memory 2G --working-set 512M --channels 4 --transport tcp";

pub(crate) const METHOD: &str = "\
What is measured:
  A Linux guest that writes its working set all the time moves from one QEMU to another over
  loopback, in turn by each contestant, each time a guest that was booted for it, under TCG. Of the
  times the table has the median (least–most).

  total        from the call to its return; of QEMU's own migration what QEMU says
  downtime     what the engine says, or QEMU
  standstill   from the guest's last sign of life here to its first there; it gives one each
               millisecond, when it gets to it. Too short where this machine has other things to do
  bytes        on the wire, as the engine says, or QEMU
  CPU          of both QEMUs and of this process, but for the threads of virtual CPUs
  wrong        guests that found an error in their memory afterwards, of all that were moved

  Whoever has not moved a guest within two minutes has failed. Who fails is named as missing from then on, with the reason. Exit status 1 if that is pageferry
  after it has moved one, or a guest that it moved is wrong.

  Needs qemu-system-x86_64, a C compiler, and a kernel for the guest (`ci/lab install` gets it).";

#[derive(Debug, Args)]
pub(crate) struct CompareGuestsArgs {
    /// What moves pageferry's pages.
    #[arg(long, value_delimiter = ',', default_value = "tcp,iouring")]
    pub(crate) transport: Vec<Transport>,
    /// Memory of the guest.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = size)]
    pub(crate) memory: u64,
    /// What of it the guest writes, over and over.
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = size)]
    pub(crate) working_set: u64,
    /// Virtual CPUs. With more than one another process writes half as much.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub(crate) vcpus: u8,
    /// Data channels of pageferry's and of multifd's.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) channels: u16,
    /// How long the guest may stand still.
    #[arg(long, value_name = "TIME", default_value_t = Limit(Duration::from_millis(300)), value_parser = limit)]
    pub(crate) downtime_limit: Limit,
    /// How often each moves a guest.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) rounds: u16,
    /// Print one JSON object and nothing else on stdout.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) rdma: RdmaArgs,
}

/// A time, as it is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limit(pub(crate) Duration);

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&time_text(&self.0))
    }
}

/// In whole milliseconds, which is how QEMU takes it.
fn limit(text: &str) -> Result<Limit, String> {
    match time(text)? {
        time if (1..=2_000_000).contains(&time.as_millis()) => Ok(Limit(time)),
        _ => Err("QEMU takes 1 ms to 2000 s".to_owned()),
    }
}

const MEBIBYTE: u64 = 1 << 20;
/// What the guest's kernel takes.
const KERNEL_MEBIBYTES: u64 = 160;

impl CompareGuestsArgs {
    /// Whether what was given fits together.
    pub(crate) fn check(&self) -> Result<(), String> {
        RdmaArgs::check(&self.transport)?;
        let written = self.working_set + if self.vcpus > 1 { self.working_set / 2 } else { 0 };
        let room = (self.memory / MEBIBYTE).saturating_sub(KERNEL_MEBIBYTES) * MEBIBYTE;
        if !self.memory.is_multiple_of(MEBIBYTE) || self.mebibytes().is_none() {
            Err(format!("--memory {} is not a number of MiB that a guest can have", self.memory))
        } else if self.working_set < PAGE_BYTES || self.pages().is_none() {
            Err(format!("--working-set {} is not a number of pages", self.working_set))
        } else if written > room {
            Err(format!(
                "--working-set {} does not fit into --memory {}: at most {room} bytes can be written",
                self.working_set, self.memory
            ))
        } else {
            Ok(())
        }
    }

    pub(crate) fn mebibytes(&self) -> Option<u32> {
        u32::try_from(self.memory / MEBIBYTE).ok()
    }

    pub(crate) fn pages(&self) -> Option<u32> {
        u32::try_from(self.working_set / PAGE_BYTES).ok()
    }
}
