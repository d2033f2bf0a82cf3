//! What a sender hands to a transport: runs of pages.

use crate::pages::memory::{PAGE_BYTES, PageRange};

/// Most runs any batch may have. With one more vector for the header, a batch fits in one
/// `sendmsg` (`IOV_MAX` is 1024, see `sendmsg(2)`).
pub const MAX_BATCH_RUNS: usize = 512;

/// Most pages that the zero runs of any batch may cover: 64 MiB, about what a batch may carry as
/// data on a stream. They cost nothing on the wire, but a receiver writes all of them: without a
/// bound a few bytes could keep it busy for as long as a peer likes, and an honest guest that frees
/// memory by the hundred GiB would seem to stand still.
pub const MAX_BATCH_ZERO_PAGES: u64 = (64 << 20) / PAGE_BYTES;

/// How the pages of a run travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunKind {
    /// Their bytes as they are.
    Data,
    /// Only the mention that they are all zero now.
    Zero,
}

/// Consecutive pages of one region that travel the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Which pages.
    pub range: PageRange,
    /// How they travel.
    pub kind: RunKind,
}

impl Run {
    /// Page bytes that follow on the wire.
    pub fn payload_bytes(&self) -> u64 {
        match self.kind {
            RunKind::Data => self.range.len_bytes(),
            RunKind::Zero => 0,
        }
    }
}

/// Pages by the way they travelled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Pages whose bytes were sent.
    pub data: u64,
    /// Pages that are zero. A transport counts those mentioned on the wire; the engine's
    /// statistics also those that the destination knew to be zero.
    pub zero: u64,
    /// Pages sent in an encoded form. None yet.
    pub encoded: u64,
}

impl PageCounts {
    /// Counts the pages of runs.
    pub fn of(runs: &[Run]) -> Self {
        let mut counts = Self::default();
        for run in runs {
            let pages = u64::from(run.range.pages);
            match run.kind {
                RunKind::Data => counts.data += pages,
                RunKind::Zero => counts.zero += pages,
            }
        }
        counts
    }

    /// Adds others.
    pub fn add(&mut self, other: &Self) {
        self.data += other.data;
        self.zero += other.zero;
        self.encoded += other.encoded;
    }

    /// Bytes of the pages sent as they are.
    pub fn data_bytes(&self) -> u64 {
        self.data.saturating_mul(PAGE_BYTES)
    }

    /// All pages.
    pub fn total(&self) -> u64 {
        self.data + self.zero + self.encoded
    }
}
