//! Dirty tracking of this process's own writes by userfaultfd write-protection and
//! `PAGEMAP_SCAN`.
//!
//! Memory is write-protected in asynchronous mode: the kernel lets the first write to a page
//! through and notes it in the page table, nobody handles a fault. A scan then returns the pages
//! noted and protects them again in the same step, so harvesting is re-arming. Linux 6.7 or
//! later; Documentation/admin-guide/mm/userfaultfd.rst ("Write Protect Notifications") and
//! mm/pagemap.rst ("Pagemap Scan IOCTL") of the kernel describe it.

mod ioctl;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageferry::dirty::DirtyBitmap;
use pageferry::memory::{GuestMemory, PAGE_BYTES, RawRegion};
use thiserror::Error;

use crate::addresses::{addresses, call_ranges};
use crate::bits::set_range;
use crate::misuse::MisuseError;
use crate::tracked::{Tracked, Tracker};
use crate::uffd;
use linux_raw_sys::general::page_region;

/// Runs of written pages that one call returns, 24 bytes each.
const RUNS: usize = 4096;

/// What tracking needs, by name.
const FEATURES: [(&str, u64); 3] = [
    ("UFFD_FEATURE_WP_ASYNC", uffd::UFFD_FEATURE_WP_ASYNC),
    ("UFFD_FEATURE_WP_UNPOPULATED", uffd::UFFD_FEATURE_WP_UNPOPULATED),
    ("UFFD_FEATURE_WP_HUGETLBFS_SHMEM", uffd::UFFD_FEATURE_WP_HUGETLBFS_SHMEM),
];

/// Why pages cannot be tracked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PagemapError {
    /// The process may not have a userfaultfd.
    #[error(
        "failed to create a userfaultfd: not permitted. Only user-mode faults are asked for, so \
         neither CAP_SYS_PTRACE nor the sysctl vm.unprivileged_userfaultfd is needed: a seccomp \
         filter or a security module forbids the system call"
    )]
    NotPermitted(#[source] io::Error),
    /// There is no userfaultfd, or none can be had now.
    #[error("failed to create a userfaultfd")]
    Userfaultfd(#[source] io::Error),
    /// The kernel's userfaultfd lacks what asynchronous write-protection needs.
    #[error("this kernel's userfaultfd lacks {missing}; Linux 6.7 or later has it")]
    FeatureMissing {
        /// Names of what is missing.
        missing: String,
    },
    /// The kernel has no `PAGEMAP_SCAN`.
    #[error("this kernel has no PAGEMAP_SCAN; Linux 6.7 or later has it")]
    NoScan(#[source] io::Error),
    /// The process's page map could not be opened.
    #[error("failed to open /proc/self/pagemap")]
    OpenPagemap(#[source] io::Error),
    /// The host's pages are not the engine's.
    #[error("host pages of {host_page_bytes} bytes are not supported, only {PAGE_BYTES}")]
    HostPageSize {
        /// Bytes in a page of the host.
        host_page_bytes: usize,
    },
    /// A region could not be registered for write-protection.
    #[error("failed to register the region at guest address {guest_addr:#x}{}", hint(.cause))]
    Register {
        /// The region's guest physical address.
        guest_addr: u64,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// A region could not be write-protected.
    #[error("failed to write-protect the region at guest address {guest_addr:#x}")]
    Protect {
        /// The region's guest physical address.
        guest_addr: u64,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// A region could not be scanned.
    #[error("failed to scan the region at guest address {guest_addr:#x}{}", hint(.cause))]
    Scan {
        /// The region's guest physical address.
        guest_addr: u64,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// A region could not be unregistered.
    #[error("failed to unregister the region at guest address {guest_addr:#x}")]
    Unregister {
        /// The region's guest physical address.
        guest_addr: u64,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// The source was called against its contract.
    #[error(transparent)]
    Misuse(#[from] MisuseError),
}

/// What the kernel means by an error that says something else.
fn hint(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EBUSY) => " (another userfaultfd has it)",
        Some(libc::EINVAL) => {
            " (only anonymous memory, memfds and hugetlbfs can be tracked, in whole huge pages)"
        }
        Some(libc::EPERM) => " (it was mapped anew since tracking started)",
        _ => "",
    }
}

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
    memory: Arc<GuestMemory>,
    active: Mutex<Option<Active>>,
}

#[derive(Debug)]
struct Active {
    uffd: OwnedFd,
    pagemap: File,
    /// Where the kernel writes what it found.
    runs: Vec<page_region>,
}

impl PagemapScan {
    /// Prepares to track all of `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        let layout = memory.layout().clone();
        Self::by(PagemapTracker { memory, active: Mutex::new(None) }, &layout)
    }

    /// Whether this process can track memory on this machine; if not, why.
    pub fn supported() -> Result<(), PagemapError> {
        Active::open().map(drop)
    }
}

impl PagemapTracker {
    fn lock(&self) -> MutexGuard<'_, Option<Active>> {
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
        let new = Active::open()?;
        for region in self.memory.regions() {
            let guest_addr = region.layout.guest_addr;
            uffd::register(&new.uffd, &addresses(region))
                .map_err(|cause| PagemapError::Register { guest_addr, cause })?;
        }
        for region in self.memory.regions() {
            let guest_addr = region.layout.guest_addr;
            for range in call_ranges(region) {
                // Also where nothing is populated: else a mere read of such a page would
                // report it, and the engine reads all pages.
                uffd::write_protect(&new.uffd, &range)
                    .map_err(|cause| PagemapError::Protect { guest_addr, cause })?;
            }
        }
        *self.lock() = Some(new);
        Ok(())
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), PagemapError> {
        let mut active = self.lock();
        let active = active.as_mut().ok_or(MisuseError::NotStarted)?;
        for (index, region) in (0..).zip(self.memory.regions()) {
            let words = into.region_words_mut(index);
            let guest_addr = region.layout.guest_addr;
            for range in call_ranges(region) {
                active
                    .scan(region, range, words)
                    .map_err(|cause| PagemapError::Scan { guest_addr, cause })?;
            }
        }
        Ok(())
    }

    /// A harvest has protected the pages again already.
    fn rearm(&self, _: u16, _: u64, _: &[u64]) -> Result<(), PagemapError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), PagemapError> {
        let active = self.lock().take().ok_or(MisuseError::NotStarted)?;
        let mut result = Ok(());
        for region in self.memory.regions() {
            let guest_addr = region.layout.guest_addr;
            let unregistered = uffd::unregister(&active.uffd, &addresses(region));
            if let Err(cause) = unregistered
                && result.is_ok()
            {
                result = Err(PagemapError::Unregister { guest_addr, cause });
            }
        }
        result
    }
}

impl Active {
    fn open() -> Result<Self, PagemapError> {
        let host_page_bytes = rustix::param::page_size();
        if host_page_bytes as u64 != PAGE_BYTES {
            return Err(PagemapError::HostPageSize { host_page_bytes });
        }
        let pagemap = File::open("/proc/self/pagemap").map_err(PagemapError::OpenPagemap)?;
        ioctl::scan_and_protect(&pagemap, &(0..0), &mut []).map_err(PagemapError::NoScan)?;
        let uffd = open_userfaultfd()?;
        let none = page_region { start: 0, end: 0, categories: 0 };
        Ok(Self { uffd, pagemap, runs: vec![none; RUNS] })
    }

    /// Adds the written pages of a part of `region` to its words.
    fn scan(
        &mut self,
        region: &RawRegion,
        mut range: Range<u64>,
        words: &mut [u64],
    ) -> io::Result<()> {
        let base = addresses(region).start;
        while !range.is_empty() {
            let (found, looked_to) =
                ioctl::scan_and_protect(&self.pagemap, &range, &mut self.runs)?;
            for run in &self.runs[..found] {
                let first = run.start.saturating_sub(base) / PAGE_BYTES;
                let end = run.end.saturating_sub(base).div_ceil(PAGE_BYTES);
                set_range(words, first, end);
            }
            if looked_to <= range.start {
                return Err(io::Error::other("the kernel's scan made no progress"));
            }
            range.start = looked_to;
        }
        Ok(())
    }
}

fn open_userfaultfd() -> Result<OwnedFd, PagemapError> {
    let open = || {
        // In asynchronous mode no fault is delivered at all, so those of user mode will do, which
        // need no privilege.
        uffd::userfaultfd(uffd::Faults::UserMode).map_err(|cause| match cause.kind() {
            io::ErrorKind::PermissionDenied => PagemapError::NotPermitted(cause),
            _ => PagemapError::Userfaultfd(cause),
        })
    };
    let wanted = FEATURES.iter().fold(0, |all, (_, feature)| all | feature);
    let uffd = open()?;
    let Err(refused) = uffd::negotiate(&uffd, wanted) else { return Ok(uffd) };
    // A descriptor negotiates once; another one says what there is.
    let offered = uffd::negotiate(&open()?, 0).map_err(PagemapError::Userfaultfd)?;
    let missing: Vec<_> = FEATURES
        .iter()
        .filter(|(_, feature)| offered & feature == 0)
        .map(|(name, _)| *name)
        .collect();
    if missing.is_empty() {
        return Err(PagemapError::Userfaultfd(refused));
    }
    Err(PagemapError::FeatureMissing { missing: missing.join(", ") })
}
