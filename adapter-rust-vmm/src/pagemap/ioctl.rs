//! The pagemap call that finds and protects written pages.
//!
//! Layout and numbers are those of linux/fs.h of Linux 6.7; they are the same on all
//! architectures.
#![expect(unsafe_code, reason = "a system call on address ranges of this process")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use rustix::ioctl::{Opcode, opcode};

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Addresses in bytes that have the categories asked for.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PageRegion {
    pub(super) start: u64,
    pub(super) end: u64,
    categories: u64,
}

const PAGEMAP_SCAN: Opcode = opcode::read_write::<PmScanArg>(b'f', 16);

/// Fills `found` with runs of pages written since they were write-protected, and protects them
/// again, each in one step. Returns how many runs, and the address up to which was looked.
///
/// An empty range only tells whether the kernel has the call.
pub(super) fn scan_and_protect(
    pagemap: &File,
    range: &Range<u64>,
    found: &mut [PageRegion],
) -> io::Result<(usize, u64)> {
    let mut scan = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        start: range.start,
        end: range.end,
        walk_end: 0,
        vec: found.as_mut_ptr().expose_provenance() as u64,
        vec_len: found.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: PAGE_IS_WRITTEN,
        category_anyof_mask: 0,
        return_mask: PAGE_IS_WRITTEN,
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
