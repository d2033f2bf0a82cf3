//! The userfaultfd and pagemap calls for asynchronous write-protection.
//!
//! The `userfaultfd` crate does not know `UFFD_FEATURE_WP_ASYNC`. Layouts and numbers are those
//! of linux/userfaultfd.h and linux/fs.h of Linux 6.7; they are the same on all architectures.
#![expect(unsafe_code, reason = "system calls on address ranges of this process")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use rustix::ioctl::{Opcode, Setter, Updater, opcode};

/// Faults of kernel code are not delivered. In asynchronous mode none is delivered at all, and
/// this lets processes without privileges have a userfaultfd.
const UFFD_USER_MODE_ONLY: libc::c_long = 1;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// What tracking needs, by name.
pub(super) const FEATURES: [(&str, u64); 3] = [
    ("UFFD_FEATURE_WP_ASYNC", UFFD_FEATURE_WP_ASYNC),
    ("UFFD_FEATURE_WP_UNPOPULATED", UFFD_FEATURE_WP_UNPOPULATED),
    ("UFFD_FEATURE_WP_HUGETLBFS_SHMEM", UFFD_FEATURE_WP_HUGETLBFS_SHMEM),
];

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

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

const UFFDIO_API: Opcode = opcode::read_write::<UffdioApi>(0xaa, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<UffdioRegister>(0xaa, 0x00);
// Read, though the kernel reads and nothing is written: a slip its header owns up to.
const UFFDIO_UNREGISTER: Opcode = opcode::read::<UffdioRange>(0xaa, 0x01);
const UFFDIO_WRITEPROTECT: Opcode = opcode::read_write::<UffdioWriteprotect>(0xaa, 0x06);
const PAGEMAP_SCAN: Opcode = opcode::read_write::<PmScanArg>(b'f', 16);

/// A userfaultfd, before features were chosen.
pub(super) fn userfaultfd() -> io::Result<OwnedFd> {
    let flags = libc::c_long::from(libc::O_CLOEXEC | libc::O_NONBLOCK) | UFFD_USER_MODE_ONLY;
    // SAFETY: userfaultfd takes flags and returns a descriptor; it touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let fd = libc::c_int::try_from(fd)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the call above just opened it, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Chooses features; returns those the kernel has. May be called once for a userfaultfd.
pub(super) fn negotiate(uffd: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the opcode reads and writes a uffdio_api.
    let call = unsafe { Updater::<UFFDIO_API, _>::new(&mut api) };
    // SAFETY: the call touches nothing but its argument.
    unsafe { rustix::ioctl::ioctl(uffd, call) }?;
    Ok(api.features)
}

/// Makes ready to write-protect a range of addresses.
pub(super) fn register(uffd: &OwnedFd, range: &Range<u64>) -> io::Result<()> {
    let mut register =
        UffdioRegister { range: uffdio_range(range), mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
    // SAFETY: the opcode reads and writes a uffdio_register.
    let call = unsafe { Updater::<UFFDIO_REGISTER, _>::new(&mut register) };
    // SAFETY: registration in write-protect mode changes no byte of the range and, in
    // asynchronous mode, how no access to it ends; it holds for the ranges of guest memory.
    unsafe { rustix::ioctl::ioctl(uffd, call) }.map_err(io::Error::from)
}

/// Undoes [`register`] and all write-protection of the range.
pub(super) fn unregister(uffd: &OwnedFd, range: &Range<u64>) -> io::Result<()> {
    // SAFETY: the opcode reads a uffdio_range.
    let call = unsafe { Setter::<UFFDIO_UNREGISTER, _>::new(uffdio_range(range)) };
    // SAFETY: only what `register` did is undone; no byte changes.
    unsafe { rustix::ioctl::ioctl(uffd, call) }.map_err(io::Error::from)
}

/// Write-protects a range of addresses. Writes go through all the same, and are noted.
pub(super) fn write_protect(uffd: &OwnedFd, range: &Range<u64>) -> io::Result<()> {
    loop {
        let mut protect =
            UffdioWriteprotect { range: uffdio_range(range), mode: UFFDIO_WRITEPROTECT_MODE_WP };
        // SAFETY: the opcode reads a uffdio_writeprotect.
        let call = unsafe { Updater::<UFFDIO_WRITEPROTECT, _>::new(&mut protect) };
        // SAFETY: in asynchronous mode the kernel resolves the faults of writes by itself, so
        // every access ends as before.
        match unsafe { rustix::ioctl::ioctl(uffd, call) } {
            // A mapping of the process changed meanwhile (fork, mremap); it has to be retried.
            Err(rustix::io::Errno::AGAIN) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}

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
    let fd = std::os::fd::AsRawFd::as_raw_fd(&pagemap.as_fd());
    // SAFETY: the opcode reads and writes a pm_scan_arg, and writes at most `vec_len` entries
    // to `vec`, which are ours to write. Write-protection ends no access differently, as above.
    // (libc, not rustix: the number of entries is the return value.)
    let runs = unsafe { libc::ioctl(fd, libc::Ioctl::from(PAGEMAP_SCAN), &raw mut scan) };
    let runs = usize::try_from(runs).map_err(|_| io::Error::last_os_error())?;
    Ok((runs.min(found.len()), scan.walk_end))
}

fn uffdio_range(range: &Range<u64>) -> UffdioRange {
    UffdioRange { start: range.start, len: range.end - range.start }
}
