//! The userfaultfd calls.
//!
//! The `userfaultfd` crate does not know the later features. Numbers are those of linux/userfaultfd.h of Linux 6.8;
//! they are the same on all architectures. [`protect`] has the calls for write-protection, [`fill`] those that give a
//! page that is missing.
#![expect(unsafe_code, reason = "system calls on address ranges of this process")]

pub(crate) mod fill;
pub(crate) mod protect;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use linux_raw_sys::general::{uffdio_api, uffdio_range, uffdio_register};
use rustix::ioctl::{Opcode, Setter, Updater, opcode};

pub(crate) const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
pub(crate) const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
pub(crate) const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
pub(crate) const UFFD_FEATURE_THREAD_ID: u64 = 1 << 8;
pub(crate) const UFFD_FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
pub(crate) const UFFD_FEATURE_MINOR_SHMEM: u64 = 1 << 10;
pub(crate) const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
pub(crate) const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
pub(crate) const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
pub(crate) const UFFD_FEATURE_MOVE: u64 = 1 << 16;

const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
/// What the system call is given for one that is told of faults in user code.
#[cfg(target_arch = "x86_64")]
pub(crate) const USER_MODE: u64 = (FLAGS | UFFD_USER_MODE_ONLY).cast_unsigned() as u64;
const UFFD_API: u64 = 0xaa;

/// What is told of a range: that a page is not mapped and there is none either.
pub(crate) const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
/// That a page is written to which is protected.
pub(crate) const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
/// That a page of a file is not mapped.
pub(crate) const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;

const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFD_PAGEFAULT_FLAG_WP: u64 = 1 << 1;

/// Bytes of a `struct uffd_msg`.
const MESSAGE_BYTES: usize = 32;
/// Messages read at once: more threads than this rarely fault at the same time.
const MESSAGES: usize = 16;

/// `_IO(0xaa, 0)`, of /dev/userfaultfd.
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
const UFFDIO_API: Opcode = opcode::read_write::<uffdio_api>(0xaa, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<uffdio_register>(0xaa, 0x00);
// Read, though the kernel reads and nothing is written: a slip its header owns up to.
const UFFDIO_UNREGISTER: Opcode = opcode::read::<uffdio_range>(0xaa, 0x01);

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
    let mut api = uffdio_api { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the opcode reads and writes a uffdio_api.
    let call = unsafe { Updater::<UFFDIO_API, _>::new(&mut api) };
    // SAFETY: the call touches nothing but its argument.
    unsafe { rustix::ioctl::ioctl(uffd, call) }?;
    Ok(api.features)
}

/// Has a range of addresses told of, by these modes.
pub(crate) fn register(uffd: &OwnedFd, range: &Range<u64>, mode: u64) -> io::Result<()> {
    let mut register = uffdio_register { range: to_kernel(range), mode, ioctls: 0 };
    // SAFETY: the opcode reads and writes a uffdio_register.
    let call = unsafe { Updater::<UFFDIO_REGISTER, _>::new(&mut register) };
    // SAFETY: registration changes no byte of the range. An access that faults waits for who reads the userfaultfd, and
    // ends as it would have.
    unsafe { rustix::ioctl::ioctl(uffd, call) }.map_err(io::Error::from)
}

/// What the kernel means by an error of [`register`] that says something else; `invalid` where it does not know such
/// memory.
pub(crate) fn hint(cause: &io::Error, invalid: &'static str) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EBUSY) => " (another userfaultfd has it)",
        Some(libc::EINVAL) => invalid,
        _ => "",
    }
}

/// Undoes [`register`] and all write-protection of the range; who waits for a fault there to be
/// served goes on.
pub(crate) fn unregister(uffd: &OwnedFd, range: &Range<u64>) -> io::Result<()> {
    // SAFETY: the opcode reads a uffdio_range.
    let call = unsafe { Setter::<UFFDIO_UNREGISTER, _>::new(to_kernel(range)) };
    // SAFETY: only what `register` did is undone; no byte changes.
    unsafe { rustix::ioctl::ioctl(uffd, call) }.map_err(io::Error::from)
}

/// Somebody waits at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageFault {
    /// Of the page, at least.
    pub(crate) address: u64,
    /// The kernel's number of the thread, where [`UFFD_FEATURE_THREAD_ID`] was chosen.
    pub(crate) thread: u32,
    /// Whether it is for write-protection that it waits.
    pub(crate) protected: bool,
}

/// Who waits. Empty if nobody does.
pub(crate) fn faults(uffd: &OwnedFd) -> io::Result<impl Iterator<Item = PageFault> + use<>> {
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
        page_fault(message)
    }))
}

fn page_fault(message: &[u8; MESSAGE_BYTES]) -> Option<PageFault> {
    // event: u8, 7 bytes reserved, flags: u64, address: u64, thread: u32.
    let words: [u64; 4] =
        std::array::from_fn(|word| std::array::from_fn(|byte| message[word * 8 + byte]))
            .map(u64::from_ne_bytes);
    let (thread, _) = message[24..].split_first_chunk()?;
    (message[0] == UFFD_EVENT_PAGEFAULT).then_some(PageFault {
        address: words[2],
        thread: u32::from_ne_bytes(*thread),
        protected: words[1] & UFFD_PAGEFAULT_FLAG_WP != 0,
    })
}

fn to_kernel(range: &Range<u64>) -> uffdio_range {
    uffdio_range { start: range.start, len: range.end - range.start }
}
