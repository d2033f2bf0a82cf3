//! Dirty tracking of this process's own writes by userfaultfd write-protection and
//! `PAGEMAP_SCAN`.
//!
//! Memory is write-protected in asynchronous mode: the kernel lets the first write to a page
//! through and notes it in the page table, nobody handles a fault. A scan then returns the pages
//! noted and protects them again in the same step, so harvesting is re-arming. Linux 6.7 or
//! later; Documentation/admin-guide/mm/userfaultfd.rst ("Write Protect Notifications") and
//! mm/pagemap.rst ("Pagemap Scan IOCTL") of the kernel describe it.

mod error;
mod ioctl;
mod scan;

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageferry::dirty::DirtyBitmap;
use pageferry::memory::GuestMemory;

use crate::addresses::{Mapped, mapped_here};
use crate::misuse::MisuseError;
use crate::tracked::{Tracked, Tracker};
pub use error::PagemapError;
pub(crate) use scan::{Scan, negotiated, present, userfaultfd};

/// Tracks every write to guest memory through this process's page tables: by threads of the
/// process, by buffered system calls, and by KVM's vCPUs, whose mappings follow the page tables.
///
/// Not seen are writes that do not go through them as they happen: by another mapping of the
/// same memfd, in this process or another, by `write` to the memfd, and by whoever was given the pages
/// before. That is DMA and io_uring's registered buffers, and for the time of a call a read of a file
/// that was opened with `O_DIRECT`, AIO, and `process_vm_writev`: their pages count as written when they
/// are pinned, and what comes after a harvest is lost. [`DirectWrites`](crate::DirectWrites) beside this
/// source is for them. Discarding pages (`MADV_DONTNEED`, hole punching)
/// is not reported reliably; block it during a migration.
///
/// Works for anonymous memory, with transparent huge pages too (a huge page is split when it is
/// first written after a harvest), for memfds, and for hugetlb memory, where a huge page written
/// is reported whole.
///
/// # Thread safety
///
/// As [`DirtySource`](pageferry::dirty::DirtySource) asks. Re-arming takes no lock and no system call.
///
/// # Resource cleanup
///
/// `stop`, or dropping the value while it tracks, ends write-protection and closes the
/// userfaultfd. While it tracks, the page tables of all guest memory are populated: 2 MiB for
/// each GiB. `memory` is kept until the value is dropped.
pub type PagemapScan = Tracked<PagemapTracker>;

/// How [`PagemapScan`] sees writes.
#[derive(Debug)]
pub struct PagemapTracker {
    mapped: Vec<Mapped>,
    active: Mutex<Option<Scan>>,
    _memory: Arc<GuestMemory>,
}

impl PagemapScan {
    /// Prepares to track all of `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        let layout = memory.layout().clone();
        let mapped = mapped_here(&memory);
        Self::by(PagemapTracker { mapped, active: Mutex::new(None), _memory: memory }, &layout)
    }

    /// Whether this process can track memory on this machine; if not, why.
    pub fn supported() -> Result<(), PagemapError> {
        own_scan().map(drop)
    }
}

impl PagemapTracker {
    fn lock(&self) -> MutexGuard<'_, Option<Scan>> {
        // Nothing panics between two changes of what it holds.
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tracker for PagemapTracker {
    const NAME: &'static str = "pagemap scan";
    const LEFT: &'static str = "guest memory write-protected";

    type Error = PagemapError;

    fn start(&self) -> Result<(), PagemapError> {
        // Dropped on failure, which closes the userfaultfd and so undoes what was done.
        let scan = own_scan()?;
        scan.start(&self.mapped)?;
        *self.lock() = Some(scan);
        Ok(())
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), PagemapError> {
        self.lock().as_mut().ok_or(MisuseError::NotStarted)?.harvest(&self.mapped, into)
    }

    /// A harvest has protected the pages again already.
    fn rearm(&self, _: u16, _: u64, _: &[u64]) -> Result<(), PagemapError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), PagemapError> {
        let scan = self.lock().take().ok_or(MisuseError::NotStarted)?;
        scan.stop(&self.mapped)
    }
}

fn own_scan() -> Result<Scan, PagemapError> {
    let pagemap = File::open("/proc/self/pagemap").map_err(PagemapError::OpenPagemap)?;
    // In asynchronous mode no fault is delivered at all, so those of user mode will do, which
    // need no privilege.
    Scan::new(pagemap, || negotiated(userfaultfd()?))
}
