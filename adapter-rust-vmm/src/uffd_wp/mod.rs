//! Dirty tracking of this process's own writes by userfaultfd write-protection, with a thread
//! that serves the faults: for kernels without `PAGEMAP_SCAN`.
//!
//! Memory is write-protected. The first write to a page waits while a thread of ours is told of
//! it, notes the page and lets the write go on. Re-arming protects the page again. Linux 5.7 or
//! later for anonymous memory, 5.19 for memfds and hugetlbfs; the kernel's
//! Documentation/admin-guide/mm/userfaultfd.rst ("Write Protect Notifications") describes it.

mod error;
mod handler;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;

use pageferry::dirty::DirtyBitmap;
use pageferry::memory::{GuestMemory, PAGE_BYTES};
use pageferry::threads::ThreadBody;

use crate::addresses::{addresses, call_ranges};
use crate::misuse::MisuseError;
use crate::tracked::{Tracked, Tracker};
use crate::uffd;
use handler::Shared;

pub use error::UffdWpError;

/// Name of the thread; fits the kernel's 15 bytes.
const THREAD_NAME: &str = "ferry-uffd-wp";

/// How pages of anonymous memory are protected that were never touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Untouched {
    /// The kernel marks them (`UFFD_FEATURE_WP_UNPOPULATED`, Linux 6.4).
    Marked,
    /// `start` reads a byte of each page first, which maps the zero page there; the kernel
    /// protects only what is mapped. It costs time, and of memory just page tables.
    ReadFirst,
}

/// Starts the thread that serves write faults: see [`UffdWp::threads`].
pub type SpawnHandler = dyn Fn(ThreadBody) -> io::Result<JoinHandle<()>> + Send + Sync;

/// Tracks every write to guest memory through this process's page tables, by faults that a
/// thread serves. It sees and misses what [`PagemapScan`](crate::PagemapScan) does, and works on
/// older kernels, but each page's first write after it was re-armed waits for a thread to run:
/// tens of microseconds. Prefer the other, as
/// [`process_memory_source`](crate::process_memory_source) does.
///
/// System calls and KVM's vCPUs write in kernel code, and the userfaultfd has to serve those
/// faults as well; that takes a privilege, which [`supported`](Self::supported) checks. Who pins
/// guest memory for a device, for io_uring or for a read with `O_DIRECT` writes to every page by doing
/// so, as far as this source can tell; the bytes that come later are for
/// [`DirectWrites`](crate::DirectWrites) to see.
///
/// Discarding pages (`MADV_DONTNEED`, hole punching) drops their protection; block it during a
/// migration. Hugetlb memory is tracked in huge pages.
///
/// # Thread safety
///
/// As [`DirtySource`](pageferry::dirty::DirtySource) asks. Threads that re-arm do not exclude each
/// other; they and the thread that
/// serves faults do.
///
/// # Resource cleanup
///
/// `stop`, or dropping the value while it tracks, ends the thread and write-protection, and
/// closes the userfaultfd. A thread that dies, or a fault that cannot be served, ends protection
/// too, so that no vCPU waits for ever; the next harvest or re-arm fails then. Nothing else may
/// end the thread: block signals that would. `memory` is kept until the value is dropped. While
/// it tracks, the page tables of all guest memory are populated: 2 MiB for each GiB.
pub type UffdWp = Tracked<UffdTracker>;

/// How [`UffdWp`] sees writes.
pub struct UffdTracker {
    memory: Arc<GuestMemory>,
    untouched: Option<Untouched>,
    spawn: Arc<SpawnHandler>,
    /// Written by `start` and `stop` alone; re-arming threads read.
    active: RwLock<Option<Active>>,
}

#[derive(Debug)]
struct Active {
    shared: Arc<Shared>,
    handler: JoinHandle<()>,
}

impl std::fmt::Debug for UffdTracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UffdTracker")
            .field("memory", &self.memory)
            .field("untouched", &self.untouched)
            .field("active", &self.active)
            .finish_non_exhaustive()
    }
}

impl UffdWp {
    /// Prepares to track all of `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        let layout = memory.layout().clone();
        let spawn = Arc::new(|body: ThreadBody| {
            std::thread::Builder::new().name(THREAD_NAME.to_owned()).spawn(body)
        });
        let tracker = UffdTracker { memory, untouched: None, spawn, active: RwLock::new(None) };
        Self::by(tracker, &layout)
    }

    /// Has the thread started by `spawn`: a name, a seccomp filter, a CPU set. It waits in
    /// `poll`, and calls `read` and `ioctl` on the userfaultfd, and `futex`. It must never write
    /// to guest memory: that would wait for itself.
    #[must_use]
    pub fn threads(mut self, spawn: Arc<SpawnHandler>) -> Self {
        self.tracker.spawn = spawn;
        self
    }

    /// Chooses how untouched pages are protected, instead of the best way that is offered.
    #[must_use]
    pub fn untouched(mut self, untouched: Untouched) -> Self {
        self.tracker.untouched = Some(untouched);
        self
    }

    /// Whether this process can track memory on this machine; if not, why.
    pub fn supported() -> Result<(), UffdWpError> {
        open(None).map(drop)
    }
}

impl UffdTracker {
    fn protect_all(&self, shared: &Shared, untouched: Untouched) -> Result<(), UffdWpError> {
        for (index, region) in (0..).zip(self.memory.regions()) {
            let guest_addr = region.layout.guest_addr;
            // Of files the kernel marks untouched pages in any case.
            let anonymous = region.file.is_none() && region.layout.backing_page_bytes == PAGE_BYTES;
            if untouched == Untouched::ReadFirst && anonymous {
                self.read_all(index, region.layout.pages());
            }
            for range in call_ranges(region) {
                uffd::protect::write_protect(&shared.uffd, &range)
                    .map_err(|cause| UffdWpError::Protect { guest_addr, cause })?;
            }
        }
        Ok(())
    }

    /// Reads every page of a region: something is mapped there then.
    fn read_all(&self, region: u16, pages: u64) {
        for page in 0..pages {
            // It fails for pages outside the memory map alone.
            let _ = self.memory.is_zero(region, page);
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Option<Active>> {
        self.active.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn tracking(active: Option<&Active>) -> Result<&Shared, UffdWpError> {
        let shared = &active.ok_or(MisuseError::NotStarted)?.shared;
        match shared.failure() {
            Some(cause) => Err(UffdWpError::Ended(Arc::clone(cause))),
            None => Ok(shared),
        }
    }
}

impl Tracker for UffdTracker {
    const NAME: &'static str = "uffd write-protect";
    const LEFT: &'static str = "guest memory write-protected";

    type Error = UffdWpError;

    fn start(&self) -> Result<(), UffdWpError> {
        let (uffd, untouched) = open(self.untouched)?;
        // Dropped on failure, which closes the userfaultfd and so undoes what was done.
        let shared = Shared::new(uffd, Arc::clone(&self.memory));
        let shared = Arc::new(shared.map_err(UffdWpError::Thread)?);
        for region in self.memory.regions() {
            let guest_addr = region.layout.guest_addr;
            uffd::register(&shared.uffd, &addresses(region), uffd::UFFDIO_REGISTER_MODE_WP)
                .map_err(|cause| UffdWpError::Register { guest_addr, cause })?;
        }
        // Before anything is protected, for from then on writes wait for it.
        let body = {
            let shared = Arc::clone(&shared);
            Box::new(move || shared.serve())
        };
        let handler = (self.spawn)(body).map_err(UffdWpError::Thread)?;
        let new = Active { shared, handler };
        if let Err(error) = self.protect_all(&new.shared, untouched) {
            if let Err(error) = new.end(&self.memory) {
                tracing::warn!(%error, "left guest memory write-protected");
            }
            return Err(error);
        }
        *self.active.write().unwrap_or_else(PoisonError::into_inner) = Some(new);
        Ok(())
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), UffdWpError> {
        let active = self.read();
        let shared = Self::tracking(active.as_ref())?;
        shared.dirty.merge_into(into);
        // What is noted is reported all the same; that more is missing counts.
        Self::tracking(active.as_ref()).map(drop)
    }

    fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), UffdWpError> {
        let active = self.read();
        let shared = Self::tracking(active.as_ref())?;
        shared.rearm(region, first_page, words).map_err(|cause| {
            let guest_addr = self.memory.layout().regions()[usize::from(region)].guest_addr;
            UffdWpError::Protect { guest_addr, cause }
        })
    }

    fn stop(&self) -> Result<(), UffdWpError> {
        let active = self.active.write().unwrap_or_else(PoisonError::into_inner).take();
        active.ok_or(MisuseError::NotStarted)?.end(&self.memory)
    }
}

impl Active {
    fn end(self, memory: &GuestMemory) -> Result<(), UffdWpError> {
        self.shared.end().map_err(UffdWpError::Thread)?;
        // It does not panic; if it did, what it would have said was printed.
        let _ = self.handler.join();
        let mut result = Ok(());
        for region in memory.regions() {
            let guest_addr = region.layout.guest_addr;
            // Writes that wait to be noted go on.
            if let Err(cause) = uffd::unregister(&self.shared.uffd, &addresses(region))
                && self.shared.failure().is_none()
                && result.is_ok()
            {
                result = Err(UffdWpError::Unregister { guest_addr, cause });
            }
        }
        result
    }
}

/// A userfaultfd that write-protects, and how untouched pages are protected by it.
fn open(untouched: Option<Untouched>) -> Result<(OwnedFd, Untouched), UffdWpError> {
    let host_page_bytes = rustix::param::page_size();
    if host_page_bytes as u64 != PAGE_BYTES {
        return Err(UffdWpError::HostPageSize { host_page_bytes });
    }
    let open = || {
        uffd::userfaultfd(uffd::Faults::All).map_err(|cause| match cause.kind() {
            io::ErrorKind::PermissionDenied => UffdWpError::NotPermitted(cause),
            _ => UffdWpError::Userfaultfd(cause),
        })
    };
    // A descriptor negotiates once; another one says what there is.
    let offered = uffd::negotiate(&open()?, 0).map_err(UffdWpError::Userfaultfd)?;
    if offered & uffd::UFFD_FEATURE_PAGEFAULT_FLAG_WP == 0 {
        let missing = "UFFD_FEATURE_PAGEFAULT_FLAG_WP";
        return Err(UffdWpError::FeatureMissing { missing, since: "Linux 5.7" });
    }
    let marks = offered & uffd::UFFD_FEATURE_WP_UNPOPULATED != 0;
    let untouched = match untouched {
        Some(Untouched::Marked) if !marks => {
            let missing = "UFFD_FEATURE_WP_UNPOPULATED";
            return Err(UffdWpError::FeatureMissing { missing, since: "Linux 6.4" });
        }
        Some(untouched) => untouched,
        None if marks => Untouched::Marked,
        None => Untouched::ReadFirst,
    };
    let mut wanted =
        uffd::UFFD_FEATURE_PAGEFAULT_FLAG_WP | offered & uffd::UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
    if untouched == Untouched::Marked {
        wanted |= uffd::UFFD_FEATURE_WP_UNPOPULATED;
    }
    let uffd = open()?;
    uffd::negotiate(&uffd, wanted).map_err(UffdWpError::Userfaultfd)?;
    Ok((uffd, untouched))
}
