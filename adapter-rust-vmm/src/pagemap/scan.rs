//! Memory of a process, write-protected and scanned.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use linux_raw_sys::general::page_region;
use pageferry::dirty::DirtyBitmap;
use pageferry::memory::PAGE_BYTES;

use super::error::PagemapError;
use super::ioctl;
use crate::addresses::Mapped;
use crate::bits::set_range;
use crate::uffd;

/// Runs of written pages that one call returns, 24 bytes each.
const RUNS: usize = 4096;

const NO_RUN: page_region = page_region { start: 0, end: 0, categories: 0 };

/// What tracking needs, by name.
const FEATURES: [(&str, u64); 3] = [
    ("UFFD_FEATURE_WP_ASYNC", uffd::UFFD_FEATURE_WP_ASYNC),
    ("UFFD_FEATURE_WP_UNPOPULATED", uffd::UFFD_FEATURE_WP_UNPOPULATED),
    ("UFFD_FEATURE_WP_HUGETLBFS_SHMEM", uffd::UFFD_FEATURE_WP_HUGETLBFS_SHMEM),
];

/// A userfaultfd and the page map of one process, which need not be this one: both act on the address
/// space that they were opened in.
#[derive(Debug)]
pub(crate) struct Scan {
    uffd: OwnedFd,
    pagemap: File,
    /// Where the kernel writes what it found.
    runs: Vec<page_region>,
}

impl Scan {
    /// With a userfaultfd that is asked for only where the kernel has the rest.
    pub(crate) fn new<E: From<PagemapError>>(
        pagemap: File,
        uffd: impl FnOnce() -> Result<OwnedFd, E>,
    ) -> Result<Self, E> {
        let host_page_bytes = rustix::param::page_size();
        if host_page_bytes as u64 != PAGE_BYTES {
            return Err(PagemapError::HostPageSize { host_page_bytes }.into());
        }
        ioctl::scan_and_protect(&pagemap, &(0..0), &mut []).map_err(PagemapError::NoScan)?;
        Ok(Self { uffd: uffd()?, pagemap, runs: vec![NO_RUN; RUNS] })
    }

    /// Write-protects memory. What was done before a failure is undone by a drop.
    pub(crate) fn start(&self, memory: &[Mapped]) -> Result<(), PagemapError> {
        for Mapped { addresses, guest_addr, .. } in memory {
            let guest_addr = *guest_addr;
            uffd::register(&self.uffd, addresses, uffd::UFFDIO_REGISTER_MODE_WP)
                .map_err(|cause| PagemapError::Register { guest_addr, cause })?;
        }
        for mapped in memory {
            let guest_addr = mapped.guest_addr;
            for range in mapped.call_ranges() {
                // Also where nothing is populated: else a mere read of such a page would
                // report it, and the engine reads all pages.
                uffd::protect::write_protect(&self.uffd, &range)
                    .map_err(|cause| PagemapError::Protect { guest_addr, cause })?;
            }
        }
        Ok(())
    }

    /// Adds the pages that were written since, and protects them again.
    pub(crate) fn harvest(
        &mut self,
        memory: &[Mapped],
        into: &mut DirtyBitmap,
    ) -> Result<(), PagemapError> {
        for mapped in memory {
            let words = into.region_words_mut(mapped.region);
            let guest_addr = mapped.guest_addr;
            for range in mapped.call_ranges() {
                let (pagemap, runs) = (&self.pagemap, &mut self.runs);
                let call = |range: &_, runs: &mut _| ioctl::scan_and_protect(pagemap, range, runs);
                add_found(mapped, range, runs, words, call)
                    .map_err(|cause| PagemapError::Scan { guest_addr, cause })?;
            }
        }
        Ok(())
    }

    /// Ends write-protection, of all that can be freed of it.
    pub(crate) fn stop(&self, memory: &[Mapped]) -> Result<(), PagemapError> {
        let mut result = Ok(());
        for Mapped { addresses, guest_addr, .. } in memory {
            let guest_addr = *guest_addr;
            let unregistered = uffd::unregister(&self.uffd, addresses);
            if let Err(cause) = unregistered
                && result.is_ok()
            {
                result = Err(PagemapError::Unregister { guest_addr, cause });
            }
        }
        result
    }
}

/// Adds the pages that are in the page tables that the page map is of, or were and are in swap now.
pub(crate) fn present(pagemap: &File, memory: &[Mapped], into: &mut DirtyBitmap) -> io::Result<()> {
    let mut runs = vec![NO_RUN; RUNS];
    for mapped in memory {
        let words = into.region_words_mut(mapped.region);
        for range in mapped.call_ranges() {
            add_found(mapped, range, &mut runs, words, |range, runs| {
                ioctl::scan_present(pagemap, range, runs)
            })?;
        }
    }
    Ok(())
}

/// Adds the pages that a call finds in a part of what is mapped to the words of its region.
fn add_found(
    mapped: &Mapped,
    mut range: Range<u64>,
    runs: &mut [page_region],
    words: &mut [u64],
    call: impl Fn(&Range<u64>, &mut [page_region]) -> io::Result<(usize, u64)>,
) -> io::Result<()> {
    let base = mapped.addresses.start;
    while !range.is_empty() {
        let (found, looked_to) = call(&range, runs)?;
        for run in &runs[..found] {
            let first = run.start.saturating_sub(base) / PAGE_BYTES;
            let end = run.end.saturating_sub(base).div_ceil(PAGE_BYTES);
            set_range(words, mapped.first_page + first, mapped.first_page + end);
        }
        if looked_to <= range.start {
            return Err(io::Error::other("the kernel's scan made no progress"));
        }
        range.start = looked_to;
    }
    Ok(())
}

/// A userfaultfd of this process, before features were chosen.
pub(crate) fn userfaultfd() -> Result<OwnedFd, PagemapError> {
    uffd::userfaultfd(uffd::Faults::UserMode).map_err(|cause| match cause.kind() {
        io::ErrorKind::PermissionDenied => PagemapError::NotPermitted(cause),
        _ => PagemapError::Userfaultfd(cause),
    })
}

/// A userfaultfd with the features that tracking needs.
pub(crate) fn negotiated(uffd: OwnedFd) -> Result<OwnedFd, PagemapError> {
    let wanted = FEATURES.iter().fold(0, |all, (_, feature)| all | feature);
    let Err(refused) = uffd::negotiate(&uffd, wanted) else { return Ok(uffd) };
    // A descriptor negotiates once; another one says what there is.
    let offered = uffd::negotiate(&userfaultfd()?, 0).map_err(PagemapError::Userfaultfd)?;
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
