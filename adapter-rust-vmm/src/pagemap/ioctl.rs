//! The pagemap call that finds pages, and protects those that were written.
#![expect(unsafe_code, reason = "a system call on address ranges of this process")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use linux_raw_sys::general::{
    PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING,
    page_region, pm_scan_arg,
};
use rustix::ioctl::{Opcode, opcode};

const PAGEMAP_SCAN: Opcode = opcode::read_write::<pm_scan_arg>(b'f', 16);

/// Fills `found` with runs of pages written since they were write-protected, and protects them
/// again, each in one step. Returns how many runs, and the address up to which was looked.
///
/// An empty range only tells whether the kernel has the call.
pub(super) fn scan_and_protect(
    pagemap: &File,
    range: &Range<u64>,
    found: &mut [page_region],
) -> io::Result<(usize, u64)> {
    // For just this the kernel has a short way.
    let flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC;
    let all_of = PAGE_IS_WRITTEN;
    scan(pagemap, range, found, Wanted { flags, all_of, any_of: 0 })
}

/// The same for pages that are in the page table, or were and are in swap now; protects nothing.
pub(super) fn scan_present(
    pagemap: &File,
    range: &Range<u64>,
    found: &mut [page_region],
) -> io::Result<(usize, u64)> {
    let any_of = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
    scan(pagemap, range, found, Wanted { flags: 0, all_of: 0, any_of })
}

/// Which pages, by their categories, and what becomes of them.
struct Wanted {
    flags: u32,
    all_of: u32,
    any_of: u32,
}

fn scan(
    pagemap: &File,
    range: &Range<u64>,
    found: &mut [page_region],
    Wanted { flags, all_of, any_of }: Wanted,
) -> io::Result<(usize, u64)> {
    let mut scan = pm_scan_arg {
        size: size_of::<pm_scan_arg>() as u64,
        flags: flags.into(),
        start: range.start,
        end: range.end,
        walk_end: 0,
        vec: found.as_mut_ptr().expose_provenance() as u64,
        vec_len: found.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: all_of.into(),
        category_anyof_mask: any_of.into(),
        return_mask: (all_of | any_of).into(),
    };
    let fd = pagemap.as_raw_fd();
    // SAFETY: the opcode reads and writes a pm_scan_arg, and writes at most `vec_len` entries
    // to `vec`, which are ours to write. Write-protection ends no access differently: in
    // asynchronous mode the kernel lets writes through by itself.
    // (libc, not rustix: the number of entries is the return value.)
    let runs = unsafe { libc::ioctl(fd, libc::Ioctl::from(PAGEMAP_SCAN), &raw mut scan) };
    let runs = usize::try_from(runs).map_err(|_| io::Error::last_os_error())?;
    Ok((runs.min(found.len()), scan.walk_end))
}
