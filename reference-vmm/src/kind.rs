//! The kinds of guests.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum GuestKind {
    /// A KVM virtual machine.
    Kvm,
    /// Threads of this process.
    Process,
}

impl fmt::Display for GuestKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Kvm => "kvm",
            Self::Process => "process",
        })
    }
}
