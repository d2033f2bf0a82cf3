//! What tracks a guest's writes.

use std::fmt;

use clap::ValueEnum;
use clap::builder::PossibleValue;
use pageferry_rust_vmm::DirtyRings;
use pageferry_rust_vmm::kvm::KvmRingError;
use pageferry_rust_vmm::pagemap::PagemapError;
use pageferry_rust_vmm::process::{ProcessMemoryError, ProcessTracker};
use pageferry_rust_vmm::uffd_wp::UffdWpError;

use crate::kind::GuestKind;

/// What tells which pages the guest wrote. KVM's rings and the bitmap have to be known when a
/// guest is made. It is a matter of the host that the guest runs on: what arrives from another
/// one may be tracked by something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum DirtyTracking {
    /// KVM's dirty log for a KVM guest, the best that the kernel has for a process guest.
    #[default]
    Auto,
    /// KVM's dirty log.
    Log,
    /// A dirty ring of KVM's for each virtual CPU.
    Ring {
        /// Entries of each, a power of two.
        entries: u32,
    },
    /// Write faults that a thread of this process serves.
    UffdWp,
    /// Scans of this process's page tables.
    Pagemap,
    /// `vm-memory`'s bitmap.
    Bitmap,
}

/// Why a guest's writes can't be tracked that way.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackingError {
    /// It would not see them.
    #[error("failed to track a {kind} guest by {tracking}: {why}")]
    Kind {
        /// What was to track it.
        tracking: DirtyTracking,
        /// What runs the guest.
        kind: GuestKind,
        /// Why not.
        why: &'static str,
    },
    /// This kernel's KVM has no dirty rings.
    #[error("failed to track a guest by ring")]
    Ring(#[source] KvmRingError),
    /// This process can't scan its page tables.
    #[error("failed to track a guest by pagemap")]
    Pagemap(#[source] PagemapError),
    /// This process can't serve write faults.
    #[error("failed to track a guest by uffd-wp")]
    UffdWp(#[source] UffdWpError),
    /// This process can't track its memory at all.
    #[error(transparent)]
    Process(#[from] ProcessMemoryError),
}

impl DirtyTracking {
    /// A dirty ring for each virtual CPU, as large as most VMMs have them.
    pub const RING: Self = Self::Ring { entries: DirtyRings::DEFAULT_ENTRIES };

    /// Whether it sees what such a guest writes, on a host that has it.
    pub fn check(self, kind: GuestKind) -> Result<(), TrackingError> {
        let why = match (self, kind) {
            (Self::Log | Self::Ring { .. }, GuestKind::Process) => {
                "KVM sees only what virtual machines write, and this guest is none"
            }
            (Self::Bitmap, GuestKind::Kvm) => {
                "vm-memory's bitmap sees only what the VMM writes, not what virtual CPUs do"
            }
            _ => return Ok(()),
        };
        Err(TrackingError::Kind { tracking: self, kind, why })
    }

    /// What [`Self::Auto`] is for such a guest, on this host.
    pub fn decide(self, kind: GuestKind) -> Result<Self, TrackingError> {
        Ok(match (self, kind) {
            (Self::Auto, GuestKind::Kvm) => Self::Log,
            (Self::Auto, GuestKind::Process) => match ProcessTracker::best()? {
                ProcessTracker::PagemapScan => Self::Pagemap,
                ProcessTracker::UffdWp => Self::UffdWp,
            },
            (decided, _) => decided,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Log => "log",
            Self::Ring { .. } => "ring",
            Self::UffdWp => "uffd-wp",
            Self::Pagemap => "pagemap",
            Self::Bitmap => "bitmap",
        }
    }
}

impl fmt::Display for DirtyTracking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// On a command line, rings have their usual size.
impl ValueEnum for DirtyTracking {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Auto, Self::Log, Self::RING, Self::UffdWp, Self::Pagemap, Self::Bitmap]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let help = match self {
            Self::Auto => {
                "The log for a KVM guest; pagemap for a process guest, or uffd-wp where the kernel \
                 has no pagemap scans"
            }
            Self::Log => "KVM's dirty log (KVM guests)",
            Self::Ring { .. } => "KVM's dirty rings (KVM guests)",
            Self::UffdWp => "Write faults, served by a thread of this process (all guests)",
            Self::Pagemap => "Scans of this process's page tables, since Linux 6.7 (all guests)",
            Self::Bitmap => "A bitmap that who writes keeps, vm-memory's (process guests)",
        };
        Some(PossibleValue::new(self.name()).help(help))
    }
}
