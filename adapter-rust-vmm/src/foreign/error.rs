//! Why another process's writes cannot be tracked.

use std::io;
use std::ops::Range;
use std::time::Duration;

use procfs::ProcError;
use thiserror::Error;

use crate::misuse::MisuseError;
use crate::pagemap::PagemapError;

/// Why another process's writes cannot be tracked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ForeignError {
    /// There is no such process.
    #[error("failed to open process {pid}")]
    Open {
        /// Its number.
        pid: u32,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// The process has ended.
    #[error("process {pid} has ended")]
    Ended {
        /// Its number.
        pid: u32,
    },
    /// What the kernel tells of the process could not be read.
    #[error("failed to read /proc/{pid}/{file}")]
    Proc {
        /// The process's number.
        pid: u32,
        /// Which file.
        file: &'static str,
        /// The cause.
        #[source]
        cause: ProcError,
    },
    /// A region has no file that another process could have mapped too.
    #[error("the region at guest address {guest_addr:#x} is no shared mapping of a file")]
    NoFile {
        /// The region's guest physical address.
        guest_addr: u64,
    },
    /// The file behind a region could not be looked at.
    #[error("failed to look at the file of the region at guest address {guest_addr:#x}")]
    File {
        /// The region's guest physical address.
        guest_addr: u64,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// The process has a part of the memory not mapped.
    #[error(
        "process {pid} has not mapped pages {} to {} of the region at guest address \
         {guest_addr:#x}: is this the file of its guest's RAM?",
        .missing.start,
        .missing.end
    )]
    NotMapped {
        /// The process's number.
        pid: u32,
        /// The region's guest physical address.
        guest_addr: u64,
        /// Its first pages that are not there.
        missing: Range<u64>,
    },
    /// The process has the file mapped privately: what it writes is in none but its own memory.
    #[error(
        "process {pid} has mapped the file of the region at guest address {guest_addr:#x} privately, \
         so that what it writes stays its own (QEMU: share=on makes it a shared mapping)"
    )]
    Private {
        /// The process's number.
        pid: u32,
        /// The region's guest physical address.
        guest_addr: u64,
    },
    /// The process may not be traced.
    #[error("not permitted to trace process {pid}: {needed}")]
    NotPermitted {
        /// Its number.
        pid: u32,
        /// What would help.
        needed: String,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// Its thread could not be made to call the kernel.
    #[error("failed to {operation} of process {pid}")]
    Trace {
        /// The process's number.
        pid: u32,
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// No thread of it could be borrowed for a moment.
    #[error(
        "no thread of process {pid} waited in a 64-bit system call within {} s, so that none could be \
         borrowed for one",
        .waited.as_secs_f32()
    )]
    Busy {
        /// Its number.
        pid: u32,
        /// For so long.
        waited: Duration,
    },
    /// The kernel refused the process a userfaultfd.
    #[error(
        "process {pid} may not have a userfaultfd (only user-mode faults are asked for, which takes no \
         privilege: a seccomp filter or a security module forbids it there)"
    )]
    Userfaultfd {
        /// Its number.
        pid: u32,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// This machine cannot do it at all.
    #[error("a userfaultfd is put into another process on x86-64 only; hand one over")]
    Architecture,
    /// Its memory cannot be tracked.
    #[error(transparent)]
    Pagemap(#[from] PagemapError),
    /// The source was called against its contract.
    #[error(transparent)]
    Misuse(#[from] MisuseError),
}
