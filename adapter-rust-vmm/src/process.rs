//! Tracking memory of this process, by the best means the kernel has.

use std::sync::Arc;

use pageferry::dirty::DirtySource;
use pageferry::memory::GuestMemory;
use thiserror::Error;

use crate::pagemap::{PagemapError, PagemapScan};
use crate::uffd_wp::{UffdWp, UffdWpError};

/// Why this process cannot track its memory at all.
#[derive(Debug, Error)]
#[error("no way to track this process's writes: by PAGEMAP_SCAN, {scan}; by userfaultfd")]
#[non_exhaustive]
pub struct ProcessMemoryError {
    /// Why not by [`PagemapScan`].
    pub scan: PagemapError,
    /// Why not by [`UffdWp`].
    #[source]
    pub wp: UffdWpError,
}

/// The best source for every write through this process's page tables: [`PagemapScan`], or
/// [`UffdWp`] where the kernel has no asynchronous write-protection (before Linux 6.7).
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::sync::Arc;
///
/// use pageferry::dirty::DirtySources;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let memory = Arc::new(pageferry_rust_vmm::guest_memory(Arc::new(memory))?);
/// let sources = DirtySources::new(vec![pageferry_rust_vmm::process_memory_source(&memory)?]);
/// # Ok(())
/// # }
/// ```
pub fn process_memory_source(
    memory: &Arc<GuestMemory>,
) -> Result<Box<dyn DirtySource>, ProcessMemoryError> {
    Ok(ProcessTracker::best()?.source(memory))
}

/// The means to track this process's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessTracker {
    /// [`PagemapScan`].
    PagemapScan,
    /// [`UffdWp`].
    UffdWp,
}

impl ProcessTracker {
    /// The best that this process may use on this machine.
    pub fn best() -> Result<Self, ProcessMemoryError> {
        let Err(scan) = PagemapScan::supported() else { return Ok(Self::PagemapScan) };
        match UffdWp::supported() {
            Ok(()) => {
                tracing::debug!(%scan, "no PAGEMAP_SCAN, write faults are served by a thread");
                Ok(Self::UffdWp)
            }
            Err(wp) => Err(ProcessMemoryError { scan, wp }),
        }
    }

    /// A source that tracks all of `memory` by it.
    pub fn source(self, memory: &Arc<GuestMemory>) -> Box<dyn DirtySource> {
        let memory = Arc::clone(memory);
        match self {
            Self::PagemapScan => Box::new(PagemapScan::new(memory)),
            Self::UffdWp => Box::new(UffdWp::new(memory)),
        }
    }
}
