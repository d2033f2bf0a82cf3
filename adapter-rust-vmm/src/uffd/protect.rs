//! Write-protection of ranges.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use linux_raw_sys::general::uffdio_writeprotect;
use rustix::ioctl::{Opcode, Updater, opcode};

use super::to_kernel;

const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const UFFDIO_WRITEPROTECT: Opcode = opcode::read_write::<uffdio_writeprotect>(0xaa, 0x06);

/// Write-protects a range of addresses. A write goes through all the same, at once and noted in
/// asynchronous mode, else as soon as the fault was served.
pub(crate) fn write_protect(uffd: &OwnedFd, range: &Range<u64>) -> io::Result<()> {
    set_protection(uffd, range, UFFDIO_WRITEPROTECT_MODE_WP)
}

/// Ends write-protection of a range, and lets writes go on that wait for that.
pub(crate) fn allow_writes(uffd: &OwnedFd, range: &Range<u64>) -> io::Result<()> {
    set_protection(uffd, range, 0)
}

fn set_protection(uffd: &OwnedFd, range: &Range<u64>, mode: u64) -> io::Result<()> {
    loop {
        let mut protect = uffdio_writeprotect { range: to_kernel(range), mode };
        // SAFETY: the opcode reads a uffdio_writeprotect.
        let call = unsafe { Updater::<UFFDIO_WRITEPROTECT, _>::new(&mut protect) };
        // SAFETY: no byte changes, and no access ends differently: a write that faults waits
        // until it is let through, by the kernel itself or by who reads the userfaultfd.
        match unsafe { rustix::ioctl::ioctl(uffd, call) } {
            // A mapping of the process changed meanwhile (fork, mremap); it has to be retried.
            Err(rustix::io::Errno::AGAIN) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}
