//! Another process's writes, by `PAGEMAP_SCAN` of its page map.

use std::sync::{Mutex, PoisonError};

use pageferry::dirty::DirtyBitmap;
use pageferry::memory::GuestMemory;

use super::call::ForeignUserfaultfd;
use super::error::ForeignError;
use super::process::ForeignProcess;
use crate::addresses::Mapped;
use crate::pagemap::Scan;
use crate::tracked::{Tracked, Tracker};

/// Tracks every write to guest memory through the page tables of another process: by its threads, by buffered
/// system calls of its, and by its KVM vCPUs. As [`PagemapScan`](crate::PagemapScan), with the same limits,
/// from outside.
///
/// # Thread safety
///
/// As [`DirtySource`](pageferry::dirty::DirtySource) asks. Re-arming takes no lock and no system call.
///
/// # Resource cleanup
///
/// `stop` ends write-protection; dropping the value, or the end of this process however it comes, closes the
/// userfaultfd, which ends it too. The other process never waits for this one.
pub type ForeignPagemapScan = Tracked<ForeignPagemapTracker>;

/// How [`ForeignPagemapScan`] sees writes.
#[derive(Debug)]
pub struct ForeignPagemapTracker {
    process: ForeignProcess,
    mapped: Vec<Mapped>,
    scan: Mutex<Scan>,
}

impl ForeignPagemapScan {
    /// Prepares to track what `process` writes to `memory`, whose regions are shared mappings of files that it
    /// has mapped too, by a userfaultfd of its.
    pub fn new(
        process: ForeignProcess,
        memory: &GuestMemory,
        userfaultfd: impl FnOnce(&ForeignProcess) -> Result<ForeignUserfaultfd, ForeignError>,
    ) -> Result<Self, ForeignError> {
        let mapped = process.mapped(memory)?;
        let uffd = || Ok::<_, ForeignError>(userfaultfd(&process)?.into_inner());
        let scan = Mutex::new(Scan::new(process.pagemap()?, uffd)?);
        Ok(Self::by(ForeignPagemapTracker { process, mapped, scan }, memory.layout()))
    }
}

impl Tracker for ForeignPagemapTracker {
    const NAME: &'static str = "foreign pagemap scan";
    const LEFT: &'static str = "guest memory of another process write-protected";

    type Error = ForeignError;

    fn start(&self) -> Result<(), ForeignError> {
        let scan = self.scan.lock().unwrap_or_else(PoisonError::into_inner);
        let started = scan.start(&self.mapped);
        if started.is_err() {
            // What was not begun cannot be ended, and does not matter.
            let _ = scan.stop(&self.mapped);
        }
        self.told(started)
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), ForeignError> {
        let mut scan = self.scan.lock().unwrap_or_else(PoisonError::into_inner);
        let harvested = scan.harvest(&self.mapped, into);
        // An empty address space has no written pages either.
        self.told(harvested)
    }

    /// A harvest has protected the pages again already.
    fn rearm(&self, _: u16, _: u64, _: &[u64]) -> Result<(), ForeignError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), ForeignError> {
        let scan = self.scan.lock().unwrap_or_else(PoisonError::into_inner);
        match scan.stop(&self.mapped) {
            // With the process all of it is gone.
            Err(_) if self.process.check_alive().is_err() => Ok(()),
            stopped => Ok(stopped?),
        }
    }
}

impl ForeignPagemapTracker {
    /// A result that counts only while the process lives.
    fn told(&self, result: Result<(), crate::pagemap::PagemapError>) -> Result<(), ForeignError> {
        self.process.check_alive()?;
        Ok(result?)
    }
}
