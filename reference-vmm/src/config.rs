//! What a guest is made of, and whether this host can run it.

use std::sync::Arc;

use pageferry_report::document::Setting;
use pageferry_rust_vmm::cpu::CpuProfile;
use pageferry_rust_vmm::{DirtyRings, PagemapScan, UffdWp};
use serde::{Deserialize, Serialize};

use crate::error::GuestError;
use crate::kind::GuestKind;
use crate::kvm;
use crate::ram::Backing;
use crate::tracking::{DirtyTracking, TrackingError};
use crate::workload::{WorkloadConfig, WorkloadError, WorkloadKind};

/// What a guest is made of. Source and destination have the same, but for the backing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// What runs it.
    pub kind: GuestKind,
    /// Its memory: (guest physical address, length in bytes).
    pub regions: Vec<(u64, u64)>,
    /// What backs its memory.
    pub backing: Backing,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// What it does.
    pub workload: WorkloadConfig,
    /// What its virtual CPUs are made of: KVM has to offer it, here and wherever the guest goes. None for all
    /// that KVM has here, which [`Guest::config`](crate::guest::Guest::config) tells then; and for a process guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuProfile>,
}

impl GuestConfig {
    /// The memory of all regions together.
    pub fn memory_bytes(&self) -> u64 {
        self.regions.iter().map(|(_, len_bytes)| len_bytes).sum()
    }

    /// How a migration of such a guest is set up, for reports; without load beside it.
    pub fn setting(&self, transport: &str, channels: u16, dirty_source: &str) -> Setting {
        let workload = &self.workload;
        Setting {
            transport: transport.to_owned(),
            channels,
            backing: self.backing.to_string(),
            guest: self.kind.to_string(),
            dirty_source: dirty_source.to_owned(),
            workload: workload.kind.to_string(),
            vcpus: self.vcpus,
            memory_bytes: self.memory_bytes(),
            working_set_bytes: workload.working_set_bytes,
            dirty_rate: workload.dirty_rate_pages_per_second,
            guest_load: 0,
            host_load: 0,
        }
    }
}

/// Whether KVM guests can run here; the reason when not.
pub fn kvm_available() -> Result<(), String> {
    kvm::open().map(|_| ())
}

/// All that KVM has for virtual CPUs here.
pub fn host_cpu() -> Result<CpuProfile, GuestError> {
    let kvm = kvm::open().map_err(|reason| GuestError::KvmUnavailable { reason })?;
    Ok(CpuProfile::of_host(&kvm)?)
}

/// Whether guests of that kind can do the workload here. For `fpu` the first call tries it.
pub fn workload_available(kind: GuestKind, workload: WorkloadKind) -> Result<(), WorkloadError> {
    workload.check(kind)?;
    if kind == GuestKind::Kvm && workload == WorkloadKind::Fpu {
        kvm::computes().map_err(|reason| WorkloadError::NotRunByKvm { workload, reason })?;
    }
    Ok(())
}

/// Whether guests can be tracked that way here, apart from KVM itself.
pub fn tracking_available(tracking: DirtyTracking) -> Result<(), GuestError> {
    match tracking {
        DirtyTracking::Ring { entries } => {
            let kvm = kvm::open().map_err(|reason| GuestError::KvmUnavailable { reason })?;
            let vm = kvm.create_vm().map_err(|source| GuestError::Kvm {
                operation: "create a virtual machine".to_owned(),
                source,
            })?;
            DirtyRings::enable(Arc::new(vm), entries).map_err(TrackingError::Ring)?;
        }
        DirtyTracking::Pagemap => PagemapScan::supported().map_err(TrackingError::Pagemap)?,
        DirtyTracking::UffdWp => UffdWp::supported().map_err(TrackingError::UffdWp)?,
        DirtyTracking::Auto | DirtyTracking::Log | DirtyTracking::Bitmap => {}
    }
    Ok(())
}
