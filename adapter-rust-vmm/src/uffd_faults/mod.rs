//! Pages that are missing while the guest runs, by userfaultfd: for a destination of post-copy.
//!
//! Of shared memory (a memfd, tmpfs, hugetlbfs) pages land by another mapping of the same file, and are mapped for the
//! guest when they are whole (`UFFDIO_CONTINUE`, Linux 5.14): nothing is copied. Of anonymous memory they land in
//! memory of its own and are moved to the guest's (`UFFDIO_MOVE`, Linux 6.8), or copied where that cannot be. The kernel's
//! Documentation/admin-guide/mm/userfaultfd.rst describes it.
#![expect(unsafe_code, reason = "mappings of guest memory are made, and pages in them dropped")]

mod error;
mod landing;

use std::io;
use std::iter;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pageferry::dirty::{DirtyBitmap, runs};
use pageferry::faults::{Fault, FaultError, FaultSource};
use pageferry::memory::{GuestMemory, PAGE_BYTES, PageRange, RawRegion};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::addresses::{addresses, page_addresses, page_at, whole_pages};
use crate::misuse::check_bitmap;
use crate::pages::AtomicPages;
use crate::uffd::{self, fill};

pub use error::UffdFaultsError;

const NAME: &str = "userfaultfd";

/// Holds back who touches a page of guest memory that is missing, the guest's vCPUs, this process's threads and the
/// kernel on their behalf.
///
/// Kernel code touches guest memory for KVM, so that the userfaultfd has to serve its faults as well, which takes a
/// privilege: [`UffdFaultsError::NotPermitted`].
///
/// Transparent huge pages are switched off for the guest's memory by [`begin`](FaultSource::begin) (`MADV_NOHUGEPAGE`):
/// where one is mapped, 511 pages become visible with the one that has landed. They stay off.
///
/// # Thread safety
///
/// As [`FaultSource`] asks.
///
/// # Resource cleanup
///
/// The guest's memory and the landing are kept until the value and the last clone of [`landing`](FaultSource::landing)
/// are dropped. Dropped while pages are missing it leaves the userfaultfd open for as long as the process lives, for
/// who waits must not go on with something else.
#[derive(Debug)]
pub struct UffdFaults {
    memory: Arc<GuestMemory>,
    landing: Arc<GuestMemory>,
    /// Left open where pages are missing for good.
    uffd: Arc<OwnedFd>,
    /// Readable when `next` is to return.
    woken: OwnedFd,
    missing: AtomicPages,
    begun: AtomicBool,
    /// Whether pages can be moved.
    moves: bool,
    copied_bytes: AtomicU64,
}

impl UffdFaults {
    /// Prepares for pages of `memory` to be missing, and finds out whether the kernel can do that.
    pub fn new(memory: Arc<GuestMemory>) -> Result<Self, UffdFaultsError> {
        let host_page_bytes = rustix::param::page_size();
        if host_page_bytes as u64 != PAGE_BYTES {
            return Err(UffdFaultsError::HostPageSize { host_page_bytes });
        }
        let (uffd, features) = open(&memory)?;
        // It is used, rather than believed: a file may be any file.
        register(&uffd, &memory)?;
        unregister(&uffd, &memory)?;
        let landing = Arc::new(landing::landing(&memory)?);
        let woken = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| UffdFaultsError::Userfaultfd(error.into()))?;
        Ok(Self {
            missing: AtomicPages::new(memory.layout()),
            landing,
            memory,
            uffd: Arc::new(uffd),
            woken,
            begun: AtomicBool::new(false),
            moves: features & uffd::UFFD_FEATURE_MOVE != 0,
            copied_bytes: AtomicU64::new(0),
        })
    }

    fn region(&self, region: u16) -> &RawRegion {
        &self.memory.regions()[usize::from(region)]
    }

    fn drop_missing(&self, missing: &DirtyBitmap) -> Result<(), UffdFaultsError> {
        for (index, region) in (0..).zip(self.memory.regions()) {
            if region.layout.backing_page_bytes == PAGE_BYTES {
                // In vain on a kernel that has no transparent huge pages.
                let _ = advise(&addresses(region), libc::MADV_NOHUGEPAGE);
            }
            for run in runs(missing.region_words(index)) {
                let pages = whole_pages(region, run);
                // Of a shared mapping only the page tables; what is in the file stays. Locked pages too (Linux 5.18).
                let dropped = advise(&page_addresses(region, &pages), libc::MADV_DONTNEED_LOCKED);
                dropped.map_err(|cause| UffdFaultsError::Drop {
                    guest_addr: region.layout.guest_addr,
                    first_page: pages.start,
                    pages: pages.end - pages.start,
                    cause,
                })?;
            }
        }
        Ok(())
    }

    /// What somebody waits for, unless it is there: then it becomes visible.
    fn look_at(&self, fault: uffd::PageFault) -> Result<Option<Fault>, UffdFaultsError> {
        let Some((region, page)) = page_at(&self.memory, fault.address) else {
            return Err(UffdFaultsError::Stray(fault.address));
        };
        let pages = whole_pages(self.region(region), page..page + 1);
        let is_missing = |page: &u64| self.missing.any(region, *page..page + 1);
        // Of a huge page all that is missing is waited for.
        if let Some(page) = iter::once(page).chain(pages.clone()).find(is_missing) {
            let thread = Some(fault.thread).filter(|thread| *thread != 0);
            return Ok(Some(Fault { region, page, thread }));
        }
        self.show(region, pages)?;
        Ok(None)
    }

    /// Makes pages visible, whole ones of what is behind the region, all of which are there.
    fn show(&self, region: u16, pages: Range<u64>) -> Result<(), UffdFaultsError> {
        let described = self.region(region);
        let range = page_addresses(described, &pages);
        let landing = page_addresses(&self.landing.regions()[usize::from(region)], &pages).start;
        let step = described.layout.backing_page_bytes;
        let mut at = range.start;
        while at < range.end {
            let page = pages.start + (at - range.start) / PAGE_BYTES;
            let done = match described.file {
                Some(_) => self.map(&(at..range.end), (region, page), step),
                None => self.take(&(at..range.end), landing + (at - range.start)),
            };
            at += match done {
                Ok(bytes) => bytes,
                Err(Errno::EXIST) => {
                    // Somebody else was first; who waits has been let go on, or is now.
                    let _ = fill::wake(&self.uffd, &(at..at + step));
                    step
                }
                Err(error) => {
                    let guest_addr = described.layout.guest_addr;
                    return Err(UffdFaultsError::Resolve { guest_addr, page, cause: error.into() });
                }
            };
        }
        Ok(())
    }

    /// `landing` is the first of the pages.
    fn map(&self, range: &Range<u64>, landing: (u16, u64), step: u64) -> Result<u64, Errno> {
        match fill::map(&self.uffd, range) {
            Err(Errno::FAULT | Errno::NOENT) => {
                // A hole in the file, which reads as zero: reading it makes it a page.
                let _ = self.landing.is_zero(landing.0, landing.1);
                fill::map(&self.uffd, &(range.start..range.start + step))
            }
            done => done,
        }
    }

    fn take(&self, range: &Range<u64>, landing: u64) -> Result<u64, Errno> {
        if !self.moves {
            return self.copy(range, landing);
        }
        let one = range.start..range.start + PAGE_BYTES;
        // SAFETY: of the landing, in which pages only land.
        match unsafe { fill::take(&self.uffd, range, landing) } {
            // Nothing has landed there but zeros, if anything.
            Err(Errno::NOENT) => fill::zero(&self.uffd, &one),
            // Something else has the page too: it was pinned, or is shared after a fork.
            Err(Errno::BUSY | Errno::INVAL) => self.copy(&one, landing),
            done => done,
        }
    }

    fn copy(&self, range: &Range<u64>, landing: u64) -> Result<u64, Errno> {
        let bytes = fill::copy(&self.uffd, range, landing)?;
        self.copied_bytes.fetch_add(bytes, Ordering::Relaxed);
        let _ = advise(&(landing..landing + bytes), libc::MADV_DONTNEED);
        Ok(bytes)
    }

    fn try_begin(&self, missing: &DirtyBitmap) -> Result<(), UffdFaultsError> {
        check_bitmap(self.memory.layout(), missing)?;
        if self.begun.swap(true, Ordering::AcqRel) {
            return Err(UffdFaultsError::AlreadyBegun);
        }
        // First, so that nobody sees anything in place of what is dropped.
        self.missing.add(missing);
        register(&self.uffd, &self.memory)?;
        self.drop_missing(missing)
    }

    fn try_next(&self, faults: &mut Vec<Fault>, timeout: Duration) -> Result<(), UffdFaultsError> {
        // A time that is too long to say is as good as for ever.
        let timeout = Timespec::try_from(timeout).ok();
        let mut polled = [
            PollFd::new(&self.uffd, PollFlags::IN),
            PollFd::from_borrowed_fd(self.woken.as_fd(), PollFlags::IN),
        ];
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(UffdFaultsError::Read(error.into())),
        }
        let (faulted, woken) = (polled[0].revents(), polled[1].revents());
        if !woken.is_empty() {
            // Whatever it says: it is quiet afterwards.
            let _ = rustix::io::read(&self.woken, &mut [0; 8]);
        }
        if faulted.intersects(PollFlags::ERR | PollFlags::HUP) {
            let cause = io::Error::other("the userfaultfd is in an error state");
            return Err(UffdFaultsError::Read(cause));
        }
        if faulted.is_empty() {
            return Ok(());
        }
        for fault in uffd::faults(&self.uffd).map_err(UffdFaultsError::Read)? {
            faults.extend(self.look_at(fault)?);
        }
        Ok(())
    }

    fn try_resolve(&self, range: PageRange) -> Result<(), UffdFaultsError> {
        self.memory.span(range)?;
        let described = self.region(range.region);
        let pages = range.first_page..range.first_page + u64::from(range.pages);
        if described.file.is_none() {
            // Before anybody could take it for a page that was never there.
            self.show(range.region, pages.clone())?;
            self.missing.take(range.region, pages);
            return Ok(());
        }
        self.missing.take(range.region, pages.clone());
        let backing = (described.layout.backing_page_bytes / PAGE_BYTES).max(1);
        let mut whole = whole_pages(described, pages);
        if backing == 1 {
            return self.show(range.region, whole);
        }
        while whole.start < whole.end {
            let one = whole_pages(described, whole.start..whole.start + 1);
            if !self.missing.any(range.region, one.clone()) {
                self.show(range.region, one.clone())?;
            }
            whole.start = one.end;
        }
        Ok(())
    }

    fn try_end(&self) -> Result<(), UffdFaultsError> {
        match self.missing.count() {
            0 => unregister(&self.uffd, &self.memory),
            pages => Err(UffdFaultsError::StillMissing { pages }),
        }
    }
}

impl FaultSource for UffdFaults {
    fn name(&self) -> &'static str {
        NAME
    }

    fn landing(&self) -> &Arc<GuestMemory> {
        &self.landing
    }

    fn begin(&self, missing: &DirtyBitmap) -> Result<(), FaultError> {
        self.try_begin(missing).map_err(failed("begin"))
    }

    fn next(&self, faults: &mut Vec<Fault>, timeout: Duration) -> Result<(), FaultError> {
        self.try_next(faults, timeout).map_err(failed("wait for faults"))
    }

    fn resolve(&self, pages: PageRange) -> Result<(), FaultError> {
        self.try_resolve(pages).map_err(failed("resolve"))
    }

    fn wake(&self) {
        if let Err(error) = rustix::io::write(&self.woken, &1_u64.to_ne_bytes()) {
            // It is full: it says so already.
            tracing::debug!(%error, "failed to wake who waits for faults");
        }
    }

    fn copied_bytes(&self) -> u64 {
        self.copied_bytes.load(Ordering::Relaxed)
    }

    fn end(&self) -> Result<(), FaultError> {
        self.try_end().map_err(failed("end"))
    }
}

impl Drop for UffdFaults {
    fn drop(&mut self) {
        let pages = self.missing.count();
        if pages > 0 {
            tracing::error!(
                pages,
                "pages are missing for good: who touches one waits until this process ends"
            );
            std::mem::forget((Arc::clone(&self.uffd), Arc::clone(&self.memory)));
        }
    }
}

fn failed(operation: &'static str) -> impl FnOnce(UffdFaultsError) -> FaultError {
    move |cause| FaultError { source_name: NAME, operation, cause: Box::new(cause) }
}

fn advise(range: &Range<u64>, advice: libc::c_int) -> io::Result<()> {
    let address = usize::try_from(range.start).map_err(io::Error::other)?;
    let len_bytes = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
    // SAFETY: of guest memory or the landing. What it drops is missing, or has been copied: nobody may see it again. Other
    // advice changes no byte.
    match unsafe { libc::madvise(ptr::with_exposed_provenance_mut(address), len_bytes, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A userfaultfd with what the memory needs, and the features that it has.
fn open(memory: &GuestMemory) -> Result<(OwnedFd, u64), UffdFaultsError> {
    let open = || {
        uffd::userfaultfd(uffd::Faults::All).map_err(|cause| match cause.kind() {
            io::ErrorKind::PermissionDenied => UffdFaultsError::NotPermitted(cause),
            _ => UffdFaultsError::Userfaultfd(cause),
        })
    };
    // A descriptor negotiates once; another one says what there is.
    let offered = uffd::negotiate(&open()?, 0).map_err(UffdFaultsError::Userfaultfd)?;
    let mut wanted = offered & (uffd::UFFD_FEATURE_THREAD_ID | uffd::UFFD_FEATURE_MOVE);
    for region in memory.regions() {
        wanted |= needed(region, offered)?;
    }
    let uffd = open()?;
    uffd::negotiate(&uffd, wanted).map_err(UffdFaultsError::Userfaultfd)?;
    Ok((uffd, wanted))
}

/// Features for a region.
fn needed(region: &RawRegion, offered: u64) -> Result<u64, UffdFaultsError> {
    let guest_addr = region.layout.guest_addr;
    let is_huge = region.layout.backing_page_bytes != PAGE_BYTES;
    let (features, missing, since) = match (region.file, is_huge) {
        (None, true) => return Err(UffdFaultsError::PrivateHugePages { guest_addr }),
        (None, false) => return Ok(0),
        (Some(_), false) => (
            uffd::UFFD_FEATURE_MISSING_SHMEM | uffd::UFFD_FEATURE_MINOR_SHMEM,
            "UFFD_FEATURE_MINOR_SHMEM",
            "Linux 5.14",
        ),
        (Some(_), true) => (
            uffd::UFFD_FEATURE_MISSING_HUGETLBFS | uffd::UFFD_FEATURE_MINOR_HUGETLBFS,
            "UFFD_FEATURE_MINOR_HUGETLBFS",
            "Linux 5.13",
        ),
    };
    if offered & features == features {
        Ok(features)
    } else {
        Err(UffdFaultsError::FeatureMissing { guest_addr, missing, since })
    }
}

fn register(uffd: &OwnedFd, memory: &GuestMemory) -> Result<(), UffdFaultsError> {
    memory.regions().iter().try_for_each(|region| {
        let minor = if region.file.is_some() { uffd::UFFDIO_REGISTER_MODE_MINOR } else { 0 };
        let modes = uffd::UFFDIO_REGISTER_MODE_MISSING | minor;
        let guest_addr = region.layout.guest_addr;
        uffd::register(uffd, &addresses(region), modes)
            .map_err(|cause| UffdFaultsError::Register { guest_addr, cause })
    })
}

fn unregister(uffd: &OwnedFd, memory: &GuestMemory) -> Result<(), UffdFaultsError> {
    memory.regions().iter().try_for_each(|region| {
        let guest_addr = region.layout.guest_addr;
        uffd::unregister(uffd, &addresses(region))
            .map_err(|cause| UffdFaultsError::Register { guest_addr, cause })
    })
}
