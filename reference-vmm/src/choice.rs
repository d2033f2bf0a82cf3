//! A guest as a command line asks for it, and what comes of that on this host.

use clap::ValueEnum;
use pageferry_cli::say;

use crate::error::GuestError;
use crate::guest::{GuestKind, kvm_available, tracking_available, workload_available};
use crate::layout::{MAX_MEMORY_BYTES, PAGE_BYTES, WORKING_SET};
use crate::ram::Backing;
use crate::tracking::DirtyTracking;
use crate::workload::WorkloadKind;

/// What runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GuestChoice {
    /// KVM, or a process where there is no /dev/kvm.
    Auto,
    /// A KVM virtual machine.
    Kvm,
    /// Threads of a process.
    Process,
}

impl GuestChoice {
    /// Decides; without KVM, says so on stderr.
    pub fn decide(self) -> GuestKind {
        let (kind, why) = self.kind();
        if let Some(reason) = why {
            say!("no KVM guest, because {reason}: threads of a process instead");
        }
        kind
    }

    /// What it comes to, and why it is not KVM where that was not asked for.
    pub fn kind(self) -> (GuestKind, Option<String>) {
        match self {
            Self::Kvm => (GuestKind::Kvm, None),
            Self::Process => (GuestKind::Process, None),
            Self::Auto => match kvm_available() {
                Ok(()) => (GuestKind::Kvm, None),
                Err(reason) => (GuestKind::Process, Some(reason)),
            },
        }
    }
}

/// What will track a guest of this kind, once it is known that this host has both, and that such a
/// guest can do each of these.
pub fn decide_tracking(
    kind: GuestKind,
    workloads: &[WorkloadKind],
    wanted: DirtyTracking,
) -> Result<DirtyTracking, GuestError> {
    if kind == GuestKind::Kvm {
        kvm_available().map_err(|reason| GuestError::KvmUnavailable { reason })?;
    }
    for &workload in workloads {
        workload_available(kind, workload)?;
    }
    let tracking = wanted.decide(kind)?;
    tracking.check(kind)?;
    tracking_available(tracking)?;
    Ok(tracking)
}

/// Whether `--memory`, `--working-set` and `--vcpus` fit together, and each of `--backing`.
pub fn check_sizes(
    memory: u64,
    working_set: u64,
    vcpus: u8,
    backings: &[Backing],
) -> Result<(), String> {
    let needed = working_set.saturating_add(WORKING_SET);
    let unit = backings.iter().map(|backing| backing.page_bytes()).max().unwrap_or(PAGE_BYTES);
    if memory < needed {
        Err(format!(
            "--working-set {working_set} needs at least {needed} bytes of memory, --memory is {memory}"
        ))
    } else if memory > MAX_MEMORY_BYTES {
        Err(format!("--memory {memory} is too much, at most {MAX_MEMORY_BYTES} is possible"))
    } else if !memory.is_multiple_of(unit) {
        Err(format!("--memory {memory} is not a multiple of the page size, {unit} bytes"))
    } else if working_set / PAGE_BYTES < u64::from(vcpus) {
        Err(format!(
            "--working-set {working_set} has less than one page of {PAGE_BYTES} bytes for each of \
             --vcpus {vcpus}"
        ))
    } else {
        Ok(())
    }
}
