//! What the guest does to its memory, and how to tell whether a move lost any of it.
//!
//! Every virtual CPU works on its own slice of the working set:
//!
//! - `sequential` increments one byte in every page in order, over and over. At any instant the
//!   bytes are all equal but for one step at the current position.
//! - `random` picks pages at random and increments their counters and a total. The counters' sum
//!   is the total, or one ahead of it if the guest stands just between the two.
//! - `hot-cold` does the same, with nine of ten writes going to the first sixteenth of the slice.
//! - `idle` writes nothing; the working set holds a pattern that must not change.
//! - `fpu` writes as `random` does, and computes with all x87, SSE and AVX registers before each
//!   write. What they hold follows from the number of the step, exactly, and now and then the guest
//!   stores it. For KVM guests only.
//!
//! Every page but each eighth also carries a tag that tells it from all others, so a page that
//! landed in another's place shows. The eighth ones pass through all-zero contents, as a migration
//! has to handle that too.

pub(crate) mod arithmetic;
pub(crate) mod contents;
pub(crate) mod oracle;
pub(crate) mod pacer;

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::kind::GuestKind;

pub use oracle::OracleReport;

/// How the guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum WorkloadKind {
    /// Every page in order, over and over.
    Sequential,
    /// Pages at random.
    Random,
    /// Most writes go to a small part.
    HotCold,
    /// No writes, only beats.
    Idle,
    /// Pages at random, and arithmetic in all x87, SSE and AVX registers; KVM guests only.
    Fpu,
}

impl WorkloadKind {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Sequential, Self::Random, Self::HotCold, Self::Idle, Self::Fpu];

    /// Whether guests of that kind can do it. What a KVM makes of it shows when one is created.
    pub fn check(self, kind: GuestKind) -> Result<(), WorkloadError> {
        match (self, kind) {
            (Self::Fpu, GuestKind::Process) => Err(WorkloadError::NeedsVirtualCpus(self)),
            _ => Ok(()),
        }
    }

    /// The kind as the parameter block in guest memory has it.
    pub(crate) fn code(self) -> u64 {
        match self {
            Self::Sequential => 1,
            Self::Random => 2,
            Self::HotCold => 3,
            Self::Idle => 4,
            Self::Fpu => 5,
        }
    }
}

impl fmt::Display for WorkloadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Sequential => "sequential",
            Self::Random => "random",
            Self::HotCold => "hot-cold",
            Self::Idle => "idle",
            Self::Fpu => "fpu",
        })
    }
}

impl FromStr for WorkloadKind {
    type Err = UnknownWorkload;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.to_string() == name)
            .ok_or_else(|| UnknownWorkload(name.to_owned()))
    }
}

/// A name that is no [`WorkloadKind`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown workload \"{0}\": it is sequential, random, hot-cold, idle or fpu")]
pub struct UnknownWorkload(String);

/// Why a guest can't do a workload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WorkloadError {
    /// It works on registers.
    #[error(
        "failed to set up the {0} workload: it computes in the registers of virtual CPUs, which \
         only a kvm guest has"
    )]
    NeedsVirtualCpus(WorkloadKind),
    /// This host's KVM does not run it.
    #[error("failed to set up the {workload} workload: this host's KVM does not run it: {reason}")]
    NotRunByKvm {
        /// Which.
        workload: WorkloadKind,
        /// What it said.
        reason: String,
    },
}

/// What a guest is told to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadConfig {
    /// How it writes.
    pub kind: WorkloadKind,
    /// Memory it writes to, cut into one contiguous slice per virtual CPU.
    pub working_set_bytes: u64,
    /// Pages written per second by all virtual CPUs together; `None` is as fast as it goes.
    pub dirty_rate_pages_per_second: Option<u64>,
    /// Seeds page choice, page tags, the idle pattern and the register contents.
    pub seed: u64,
}

/// Writes to the hot part before one goes anywhere in the slice.
pub(crate) const HOT_WRITES_IN_A_ROW: u64 = 9;

/// Multiplier of the page choice's generator (Lehmer, 64 bits; the state is odd). Only its high
/// bits are used: guest code gets a page number as the high half of one multiplication.
pub(crate) const GENERATOR_MULTIPLIER: u64 = 0xd134_2543_de82_ef95;

/// Pages of the hot part of a slice.
pub(crate) fn hot_pages(slice_pages: u64) -> u64 {
    (slice_pages / 16).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for kind in WorkloadKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
            let value = kind.to_possible_value().unwrap();
            assert_eq!(value.get_name(), kind.to_string());
        }
        assert!("busy".parse::<WorkloadKind>().is_err());
    }
}
