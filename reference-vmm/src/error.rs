//! What can go wrong with a guest.

use std::io;

use pageferry_device_state::{LoadError, RegisterError, SaveError};
use pageferry_rust_vmm::cpu::{CpuError, Lacks};
use pageferry_rust_vmm::kvm::KvmRingError;
use pageferry_rust_vmm::time::TimeError;
use vm_memory::GuestMemoryError;

use crate::layout::LayoutError;
use crate::ram::RamError;
pub use crate::tracking::TrackingError;
pub use crate::workload::WorkloadError;

/// Why an operation on a guest failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// Guest memory could not be allocated.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The guest does not fit its memory.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// KVM can't be used.
    #[error("failed to open KVM: {reason}")]
    KvmUnavailable {
        /// Why.
        reason: String,
    },
    /// A KVM call failed.
    #[error("failed to {operation}")]
    Kvm {
        /// What was tried.
        operation: String,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
    /// The guest's time could not be read or set.
    #[error(transparent)]
    Time(#[from] TimeError),
    /// It is not known what KVM has for virtual CPUs, or what the guest had makes no sense.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// The guest's virtual CPUs had what KVM lacks here.
    #[error(transparent)]
    CpuLacks(#[from] Lacks),
    /// The guest's writes can't be tracked that way.
    #[error(transparent)]
    Tracking(#[from] TrackingError),
    /// The guest can't do its workload.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// KVM's dirty rings can't be used.
    #[error(transparent)]
    DirtyRing(#[from] KvmRingError),
    /// The kernel let only part of the model specific registers through.
    #[error("failed to {operation} model specific register {index:#x} (value {value:#x})")]
    Msr {
        /// "read" or "restore".
        operation: &'static str,
        /// Which.
        index: u32,
        /// The value to restore.
        value: u64,
    },
    /// The guest has turned on what runs guests of its own. What KVM keeps of those is not in the state.
    #[error(
        "failed to save a virtual CPU: the guest runs guests of its own (VMX or SVM is on), which do not move \
         with it; it moves when they have ended and its kvm module is unloaded"
    )]
    Nested,
    /// A device of the VMM failed.
    #[error("failed to {operation}")]
    Device {
        /// What was tried.
        operation: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Guest memory could not be accessed.
    #[error("failed to access guest memory")]
    Memory(#[from] GuestMemoryError),
    /// A thread could not be started.
    #[error("failed to start the guest's threads")]
    Thread(#[source] io::Error),
    /// Only a paused guest can do that.
    #[error("failed to {operation}: the guest is running")]
    Running {
        /// What was asked.
        operation: &'static str,
    },
    /// The guest has neither been booted nor been given a state.
    #[error("failed to {operation}: the guest was neither booted nor loaded")]
    Empty {
        /// What was asked.
        operation: &'static str,
    },
    /// A load failed half-way, so the guest is a mix of two.
    #[error("failed to {operation}: loading the guest's state failed earlier")]
    HalfLoaded {
        /// What was asked.
        operation: &'static str,
    },
    /// A virtual CPU ended by itself.
    #[error("failed to {operation}: {detail}")]
    Failed {
        /// What was asked.
        operation: &'static str,
        /// How it ended.
        detail: String,
    },
    /// Virtual CPUs did not leave the guest in time. The request to pause stays.
    #[error("failed to pause the guest: {vcpus} virtual CPUs still running after {waited_ms} ms")]
    PauseTimedOut {
        /// How many.
        vcpus: usize,
        /// How long was waited.
        waited_ms: u128,
    },
    /// A saved state can't be used.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Why a guest's state can't be saved or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// It could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// It could not be saved.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// Two devices are one.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The vector registers have components that virtual CPUs here cannot have: loading them would have KVM
    /// fail, or leave some of it behind.
    #[error(
        "the XSAVE area has components that this guest's virtual CPUs lack: bits {components:#x} of XSTATE_BV"
    )]
    XsaveComponents {
        /// A bit each, as in XCR0.
        components: u64,
    },
    /// The state is of a guest unlike this one.
    #[error("{what} is {found}, this guest's is {expected}")]
    Mismatch {
        /// What differs.
        what: &'static str,
        /// As saved.
        found: String,
        /// As configured here.
        expected: String,
    },
}
