//! The guest: what it is made of, and what it does.

use std::path::PathBuf;

use clap::Args;
use pageferry_cli::units::size;
use pageferry_vmm::choice::{GuestChoice, check_sizes};
use pageferry_vmm::guest::GuestKind;
use pageferry_vmm::layout::{MAX_MEMORY_BYTES, WORKING_SET};
use pageferry_vmm::ram::{Backing, HUGE_PAGE_BYTES};
use pageferry_vmm::tracking::DirtyTracking;
use pageferry_vmm::workload::WorkloadKind;

const DEFAULT_MEMORY_BYTES: u64 = 512 << 20;
const DEFAULT_WORKING_SET_BYTES: u64 = 64 << 20;

#[derive(Debug, Args)]
pub(crate) struct GuestArgs {
    /// Guest memory [default: 512M, or what the working set needs].
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// Memory the guest writes to [default: 64M, or what there is].
    #[arg(long, value_name = "SIZE", value_parser = size)]
    working_set: Option<u64>,
    /// How the guest writes.
    #[arg(long, default_value = "sequential")]
    pub(crate) workload: WorkloadKind,
    /// Pages the guest writes a second, by all vCPUs together [default: as fast as it can].
    #[arg(long, value_name = "PAGES")]
    pub(crate) dirty_rate: Option<u64>,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) vcpus: u8,
    /// Give the virtual CPUs no more than this file says (`pageferry-vmm cpu` makes one) [default: all that KVM
    /// has here].
    #[arg(long, value_name = "FILE")]
    pub(crate) cpu_baseline: Option<PathBuf>,
    /// What backs the guest's memory.
    #[arg(long, default_value = "anonymous")]
    pub(crate) backing: Backing,
    /// What runs the guest.
    #[arg(long, default_value = "auto")]
    pub(crate) guest: GuestChoice,
    /// What tells which pages the guest wrote.
    #[arg(long, value_name = "SOURCE", default_value = "auto")]
    pub(crate) dirty_source: DirtyTracking,
    /// Seed of everything random in the guest.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
}

impl GuestArgs {
    /// Guest memory, in bytes.
    pub(crate) fn memory(&self) -> u64 {
        let needed = self.working_set.unwrap_or(0).saturating_add(WORKING_SET);
        let needed = needed.checked_next_multiple_of(HUGE_PAGE_BYTES).unwrap_or(u64::MAX);
        self.memory.unwrap_or(DEFAULT_MEMORY_BYTES.max(needed).min(MAX_MEMORY_BYTES))
    }

    /// Memory the guest writes to, in bytes.
    pub(crate) fn working_set(&self) -> u64 {
        let room = self.memory().saturating_sub(WORKING_SET);
        self.working_set.unwrap_or(DEFAULT_WORKING_SET_BYTES.min(room))
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let (kind, no_kvm) = self.guest.kind();
        self.dirty_source.check(kind).map_err(|error| {
            let why = no_kvm.as_ref().map(|why| format!(" (no KVM guest, because {why})"));
            format!("--dirty-source {}: {error}{}", self.dirty_source, why.unwrap_or_default())
        })?;
        self.workload.check(kind).map_err(|error| {
            let why = no_kvm.map(|reason| format!(" (no KVM guest, because {reason})"));
            format!("--workload {}: {error}{}", self.workload, why.unwrap_or_default())
        })?;
        if self.cpu_baseline.is_some() && kind != GuestKind::Kvm {
            return Err(
                "--cpu-baseline is for a KVM guest: a process has the CPUs of this host".to_owned()
            );
        }
        let (memory, working_set, vcpus) = (self.memory(), self.working_set(), self.vcpus);
        check_sizes(memory, working_set, vcpus, &[self.backing])
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        guest: GuestArgs,
    }

    fn parsed(args: &[&str]) -> GuestArgs {
        Command::try_parse_from([&["program"], args].concat()).expect("a command line").guest
    }

    /// A default that cannot work with what was given is none.
    #[test]
    fn one_size_alone_is_enough() {
        const MIB: u64 = 1 << 20;
        for (args, memory, working_set) in [
            (&[][..], 512 * MIB, 64 * MIB),
            (&["--memory=16M"], 16 * MIB, 14 * MIB),
            (&["--memory=64M"], 64 * MIB, 62 * MIB),
            (&["--working-set=1G"], 1026 * MIB, 1024 * MIB),
            (&["--working-set=511M", "--backing=hugetlb"], 514 * MIB, 511 * MIB),
        ] {
            let args = parsed(&[args, &["--guest=process"]].concat());
            assert_eq!((args.memory(), args.working_set()), (memory, working_set));
            assert_eq!(args.check(), Ok(()), "{args:?}");
        }
        let both = parsed(&["--memory=64M", "--working-set=64M"]);
        assert!(both.check().is_err_and(|error| error.contains("--working-set")));
    }
}
