//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use pageferry_cli::migration::MigrationArgs;
use pageferry_cli::observers::ObserverArgs;
use pageferry_cli::transport::{LinkArgs, RdmaArgs, Transport};

/// Moves the guest of a running QEMU, which is left as it is, to another host.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "\
Both QEMUs have their RAM in a shared file, and the one at the source a monitor for this program:

  qemu-system-x86_64 … -object memory-backend-file,id=ram,mem-path=/dev/shm/vm1,size=4G,share=on \\
      -machine q35,memory-backend=ram -qmp unix:/run/vm1.qmp,server=on,wait=off

  host-b$ pageferry-qemu receive --listen 0.0.0.0:7400 --shared-key key --ram /dev/shm/vm1 -- qemu-system-x86_64 …
  host-a$ pageferry-qemu migrate --qmp /run/vm1.qmp --to host-b:7400 --shared-key key --downtime-limit 50ms

Exit status: 0 moved, 1 failed, 2 a command line that makes no sense, 3 cancelled, 4 it is uncertain who has the
guest. The guest stays where it was unless it was moved."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Moves the guest of a QEMU on this host to a destination that waits for it.
    Migrate(MigrateArgs),
    /// Waits for a guest, and runs it in a QEMU that this command starts.
    Receive(ReceiveArgs),
    /// Tells what a migration has left whose command was killed, and ends it.
    Recover(RecoverArgs),
}

impl Command {
    /// Whether what was given fits together.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self {
            Self::Migrate(args) => args.migration.check(),
            Self::Receive(args) => args.rdma.check(args.transport),
            Self::Recover(_) => Ok(()),
        }
    }

    /// The transport of a report in JSON, if it is to print one.
    pub(crate) fn reports(&self) -> Option<Transport> {
        match self {
            Self::Migrate(args) => args.json.then_some(args.migration.transport),
            Self::Receive(args) => args.json.then_some(args.transport),
            Self::Recover(_) => None,
        }
    }
}

/// `migrate`.
#[derive(Debug, Args)]
#[command(after_help = "\
While it migrates it takes lines on stdin: cancel, limit SIZE|off, downtime-limit TIME, downtime-bound
strict|best-effort, not-converging POLICY, channels N. Ctrl-C cancels; the guest runs on here.")]
pub(crate) struct MigrateArgs {
    /// Socket of QEMU's monitor (-qmp unix:PATH,server=on,wait=off), that no other program uses.
    #[arg(long, value_name = "PATH")]
    pub(crate) qmp: PathBuf,
    /// Where the destination waits.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) to: String,
    /// QEMU's process [default: the one that listens at its monitor].
    #[arg(long, value_name = "PID")]
    pub(crate) pid: Option<u32>,
    /// Socket at which QEMU hands a userfaultfd over, by libpageferry_qemu_preload.so and the variable
    /// PAGEFERRY_USERFAULTFD; on kernels before 6.7 none is needed [default: one is made in QEMU, by ptrace].
    #[arg(long, value_name = "PATH")]
    pub(crate) userfaultfd: Option<PathBuf>,
    /// Control group (a folder in /sys/fs/cgroup) of the guest's vCPU threads, whose CPU quota is lowered where the
    /// guest writes too fast (--not-converging throttle); several times where they are in several [default: the
    /// guest is not slowed down].
    #[arg(long, value_name = "DIR")]
    pub(crate) throttle_cgroup: Vec<PathBuf>,
    /// Compare all of memory before the destination has the guest; it stands still for that.
    #[arg(long)]
    pub(crate) verify: bool,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) observers: ObserverArgs,
    #[command(flatten)]
    pub(crate) migration: MigrationArgs,
}

/// `receive`.
#[derive(Debug, Args)]
#[command(after_help = "\
The RAM's file is made by this command, before it starts QEMU. Once the guest runs the report is printed, and the
command stays until QEMU ends; a Ctrl-C ends the command alone, and QEMU runs on.")]
pub(crate) struct ReceiveArgs {
    /// Where to wait for the source.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) listen: String,
    /// The file of the guest's RAM, which must not be there yet; several times where it is in several.
    #[arg(long, value_name = "PATH", required = true)]
    pub(crate) ram: Vec<PathBuf>,
    /// Socket of a monitor that the guest's QEMU gets for this program: for the next migration, and for `recover`
    /// [default: the first --ram, with .qmp behind it].
    #[arg(long, value_name = "PATH")]
    pub(crate) qmp: Option<PathBuf>,
    /// What moves the pages.
    #[arg(long, default_value = "auto")]
    pub(crate) transport: Transport,
    /// CPUs to bind the threads of data channels to, in turn: 0,1 [default: not bound].
    #[arg(long, value_name = "CPUS", value_delimiter = ',')]
    pub(crate) pin: Vec<usize>,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) observers: ObserverArgs,
    #[command(flatten)]
    pub(crate) link: LinkArgs,
    #[command(flatten)]
    pub(crate) rdma: RdmaArgs,
    /// QEMU and its arguments, as at the source; -incoming and -S are added.
    #[arg(last = true, required = true, value_name = "QEMU")]
    pub(crate) qemu: Vec<OsString>,
}

/// `recover`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each side of a migration writes down how it stands beside the monitor's socket (PATH.migration). Where the command was
killed this shows it, with what QEMU says and what that means; --run or --quit is what the operator decides, who knows
of both sides.

  host-b$ pageferry-qemu recover --qmp /dev/shm/vm1.qmp
  host-a$ pageferry-qemu recover --qmp /run/vm1.qmp --run")]
pub(crate) struct RecoverArgs {
    /// Socket of the monitor of a QEMU here: as --qmp of migrate or receive.
    #[arg(long, value_name = "PATH")]
    pub(crate) qmp: PathBuf,
    /// What is decided; nothing, if it is only to be shown.
    #[command(flatten)]
    pub(crate) decision: Decision,
    /// Also where the guest might be, or not be, at the other side.
    #[arg(long)]
    pub(crate) force: bool,
    /// Print what is known as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What to do with a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Args)]
pub(crate) struct Decision {
    /// Lets the guest run here.
    #[arg(long, conflicts_with = "quit")]
    pub(crate) run: bool,
    /// Ends QEMU here, and removes the RAM that was made for it.
    #[arg(long)]
    pub(crate) quit: bool,
}
