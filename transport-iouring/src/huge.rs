//! Whether guest memory lies in huge pages.
#![expect(unsafe_code, reason = "a system call on address ranges of this process")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use linux_raw_sys::general::{PAGE_IS_HUGE, page_region, pm_scan_arg};
use rustix::ioctl::{Opcode, opcode};

const PAGEMAP_SCAN: Opcode = opcode::read_write::<pm_scan_arg>(b'f', 16);

/// Whether any of the pages that are there is a huge one. Fails where the kernel (before Linux
/// 6.7), a file system that is not mounted or a filter does not tell.
pub(crate) fn any_in(ranges: impl Iterator<Item = (usize, usize)>) -> io::Result<bool> {
    let pagemap = File::open("/proc/self/pagemap")?;
    for (addr, len_bytes) in ranges {
        let mut found = [page_region { start: 0, end: 0, categories: 0 }];
        let mut scan = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: 0,
            start: addr as u64,
            end: (addr + len_bytes) as u64,
            walk_end: 0,
            vec: found.as_mut_ptr().expose_provenance() as u64,
            vec_len: 1,
            max_pages: 1,
            category_inverted: 0,
            category_mask: PAGE_IS_HUGE.into(),
            category_anyof_mask: 0,
            return_mask: PAGE_IS_HUGE.into(),
        };
        // SAFETY: the opcode reads and writes a pm_scan_arg, and writes at most one entry to
        // `vec`, which is ours to write. Nothing is protected or changed.
        // (libc, not rustix: the number of entries is the return value.)
        let runs = unsafe {
            libc::ioctl(pagemap.as_raw_fd(), libc::Ioctl::from(PAGEMAP_SCAN), &raw mut scan)
        };
        match runs {
            0 => {}
            1.. => return Ok(true),
            _ => return Err(io::Error::last_os_error()),
        }
    }
    Ok(false)
}
