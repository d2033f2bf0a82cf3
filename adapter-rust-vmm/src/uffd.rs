//! The userfaultfd calls for write-protection.
//!
//! The `userfaultfd` crate does not know the later features. Layouts and numbers are those of
//! linux/userfaultfd.h of Linux 6.7; they are the same on all architectures.
#![expect(unsafe_code, reason = "system calls on address ranges of this process")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::ioctl::{Opcode, Setter, Updater, opcode};

pub(crate) const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
pub(crate) const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
pub(crate) const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
pub(crate) const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;

const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
/// What the system call is given for one that is told of faults in user code.
#[cfg(target_arch = "x86_64")]
pub(crate) const USER_MODE: u64 = (FLAGS | UFFD_USER_MODE_ONLY).cast_unsigned() as u64;
const UFFD_API: u64 = 0xaa;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFD_PAGEFAULT_FLAG_WP: u64 = 1 << 1;

/// Bytes of a `struct uffd_msg`.
const MESSAGE_BYTES: usize = 32;
/// Messages read at once: more threads than this rarely fault at the same time.
const MESSAGES: usize = 16;

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

/// `_IO(0xaa, 0)`, of /dev/userfaultfd.
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
const UFFDIO_API: Opcode = opcode::read_write::<UffdioApi>(0xaa, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<UffdioRegister>(0xaa, 0x00);
// Read, though the kernel reads and nothing is written: a slip its header owns up to.
const UFFDIO_UNREGISTER: Opcode = opcode::read::<UffdioRange>(0xaa, 0x01);
const UFFDIO_WRITEPROTECT: Opcode = opcode::read_write::<UffdioWriteprotect>(0xaa, 0x06);

/// Whose faults a userfaultfd is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Faults {
    /// Those of user code; every process may have such a userfaultfd.
    UserMode,
    /// Those of kernel code on behalf of the process too: system calls, KVM. Needs a privilege.
    All,
}

/// A userfaultfd, before features were chosen.
pub(crate) fn userfaultfd(faults: Faults) -> io::Result<OwnedFd> {
    match faults {
        Faults::UserMode => by_system_call(FLAGS | UFFD_USER_MODE_ONLY),
        // The device file is a privilege that can be given by file permissions (Linux 6.1).
        Faults::All => by_system_call(FLAGS).or_else(|refused| by_device().ok_or(refused)),
    }
}

fn by_system_call(flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: userfaultfd takes flags and returns a descriptor; it touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::c_long::from(flags)) };
    opened(fd)
}

fn by_device() -> Option<OwnedFd> {
    let device = File::options().read(true).write(true).open("/dev/userfaultfd").ok()?;
    // SAFETY: the call takes flags and returns a descriptor; it touches no memory.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, FLAGS) };
    opened(fd.into()).ok()
}

/// What a call returned that opens a descriptor or returns -1.
fn opened(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = libc::c_int::try_from(fd)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or_else(io::Error::last_os_error)?;
    // SAFETY: both callers' calls just opened it, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Chooses features; returns those the kernel has. May be called once for a userfaultfd.
pub(crate) fn negotiate(uffd: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the opcode reads and writes a uffdio_api.
    let call = unsafe { Updater::<UFFDIO_API, _>::new(&mut api) };
    // SAFETY: the call touches nothing but its argument.
    unsafe { rustix::ioctl::ioctl(uffd, call) }?;
    Ok(api.features)
}

/// Makes ready to write-protect a range of addresses.
pub(crate) fn register(uffd: &OwnedFd, range: &Range<u64>) -> io::Result<()> {
    let mut register =
        UffdioRegister { range: uffdio_range(range), mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
    // SAFETY: the opcode reads and writes a uffdio_register.
    let call = unsafe { Updater::<UFFDIO_REGISTER, _>::new(&mut register) };
    // SAFETY: registration in write-protect mode changes no byte of the range and, before
    // anything is protected, how no access to it ends.
    unsafe { rustix::ioctl::ioctl(uffd, call) }.map_err(io::Error::from)
}

/// Undoes [`register`] and all write-protection of the range; who waits for a fault there to be
/// served goes on.
pub(crate) fn unregister(uffd: &OwnedFd, range: &Range<u64>) -> io::Result<()> {
    // SAFETY: the opcode reads a uffdio_range.
    let call = unsafe { Setter::<UFFDIO_UNREGISTER, _>::new(uffdio_range(range)) };
    // SAFETY: only what `register` did is undone; no byte changes.
    unsafe { rustix::ioctl::ioctl(uffd, call) }.map_err(io::Error::from)
}

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
        let mut protect = UffdioWriteprotect { range: uffdio_range(range), mode };
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

/// Addresses at which writes wait to be let through. Empty if there is none.
pub(crate) fn write_faults(uffd: &OwnedFd) -> io::Result<impl Iterator<Item = u64> + use<>> {
    let mut messages = [0; MESSAGES * MESSAGE_BYTES];
    let read = match rustix::io::read(uffd, &mut messages) {
        Ok(read) => read,
        // The fault was settled otherwise (its thread got a signal).
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
        Err(error) => return Err(error.into()),
    };
    let count = read / MESSAGE_BYTES;
    Ok((0..count).filter_map(move |index| {
        let (message, _) = messages[index * MESSAGE_BYTES..].split_first_chunk()?;
        write_fault(message)
    }))
}

fn write_fault(message: &[u8; MESSAGE_BYTES]) -> Option<u64> {
    // event: u8, 7 bytes reserved, flags: u64, address: u64, thread.
    let words: [u64; 4] =
        std::array::from_fn(|word| std::array::from_fn(|byte| message[word * 8 + byte]))
            .map(u64::from_ne_bytes);
    let fault = message[0] == UFFD_EVENT_PAGEFAULT && words[1] & UFFD_PAGEFAULT_FLAG_WP != 0;
    fault.then_some(words[2])
}

fn uffdio_range(range: &Range<u64>) -> UffdioRange {
    UffdioRange { start: range.start, len: range.end - range.start }
}
