//! Whether guest memory lies in huge pages.
//!
//! The layout of the call is that of linux/fs.h of Linux 6.7, the same on all architectures.
#![expect(unsafe_code, reason = "a system call on address ranges of this process")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::ioctl::{Opcode, opcode};

const PAGE_IS_HUGE: u64 = 1 << 6;

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

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGEMAP_SCAN: Opcode = opcode::read_write::<PmScanArg>(b'f', 16);

/// Whether any of the pages that are there is a huge one. Fails where the kernel (before Linux
/// 6.7), a file system that is not mounted or a filter does not tell.
pub(crate) fn any_in(ranges: impl Iterator<Item = (usize, usize)>) -> io::Result<bool> {
    let pagemap = File::open("/proc/self/pagemap")?;
    for (addr, len_bytes) in ranges {
        let mut found = [PageRegion::default()];
        let mut scan = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            flags: 0,
            start: addr as u64,
            end: (addr + len_bytes) as u64,
            walk_end: 0,
            vec: found.as_mut_ptr().expose_provenance() as u64,
            vec_len: 1,
            max_pages: 1,
            category_inverted: 0,
            category_mask: PAGE_IS_HUGE,
            category_anyof_mask: 0,
            return_mask: PAGE_IS_HUGE,
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
