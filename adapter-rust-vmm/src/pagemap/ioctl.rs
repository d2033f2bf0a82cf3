//! The pagemap call that finds and protects written pages.
#![expect(unsafe_code, reason = "a system call on address ranges of this process")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use linux_raw_sys::general::{
    PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, page_region, pm_scan_arg,
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
    let mut scan = pm_scan_arg {
        size: size_of::<pm_scan_arg>() as u64,
        flags: (PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC).into(),
        start: range.start,
        end: range.end,
        walk_end: 0,
        vec: found.as_mut_ptr().expose_provenance() as u64,
        vec_len: found.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: PAGE_IS_WRITTEN.into(),
        category_anyof_mask: 0,
        return_mask: PAGE_IS_WRITTEN.into(),
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
