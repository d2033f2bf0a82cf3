//! Why faults on missing pages cannot be served.

use std::io;

use pageferry::memory::{LayoutError, OutOfRange, PAGE_BYTES};
use thiserror::Error;

use crate::misuse::MisuseError;
use crate::uffd;

/// Why a guest cannot run, or go on, while pages are missing.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UffdFaultsError {
    /// The process may not have a userfaultfd that serves kernel code's faults.
    #[error(
        "failed to create a userfaultfd: not permitted. KVM and system calls touch guest memory in kernel code, and to \
         serve those faults takes CAP_SYS_PTRACE, or the sysctl vm.unprivileged_userfaultfd=1, or (Linux 6.1) read and \
         write permission for /dev/userfaultfd; a seccomp filter may forbid the system call too"
    )]
    NotPermitted(#[source] io::Error),
    /// There is no userfaultfd, or none can be had now.
    #[error("failed to create a userfaultfd")]
    Userfaultfd(#[source] io::Error),
    /// The kernel's userfaultfd does not know such memory.
    #[error(
        "this kernel's userfaultfd lacks {missing} for the region at guest address {guest_addr:#x}; {since} or later has it"
    )]
    FeatureMissing {
        /// The region's guest physical address.
        guest_addr: u64,
        /// Name of what is missing.
        missing: &'static str,
        /// The release that brought it.
        since: &'static str,
    },
    /// The host's pages are not the engine's.
    #[error("host pages of {host_page_bytes} bytes are not supported, only {PAGE_BYTES}")]
    HostPageSize {
        /// Bytes in a page of the host.
        host_page_bytes: usize,
    },
    /// Huge pages without a file, or of a private mapping.
    #[error(
        "the region at guest address {guest_addr:#x} is of huge pages that are not shared, in which no page can land \
         unseen; a memfd mapped shared can be used"
    )]
    PrivateHugePages {
        /// The region's guest physical address.
        guest_addr: u64,
    },
    /// Memory to land in could not be mapped.
    #[error(
        "failed to map memory that pages of the region at guest address {guest_addr:#x} land in"
    )]
    Landing {
        /// The region's guest physical address.
        guest_addr: u64,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// Memory to land in was refused by the engine.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A region could not be registered.
    #[error("failed to register the region at guest address {guest_addr:#x}{}", hint(.cause))]
    Register {
        /// The region's guest physical address.
        guest_addr: u64,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// What was in the place of missing pages could not be dropped.
    #[error(
        "failed to drop {pages} pages from page {first_page} of the region at guest address {guest_addr:#x}"
    )]
    Drop {
        /// The region's guest physical address.
        guest_addr: u64,
        /// The first of them.
        first_page: u64,
        /// How many.
        pages: u64,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// Faults could not be read.
    #[error("failed to read faults")]
    Read(#[source] io::Error),
    /// A fault outside of guest memory.
    #[error("a fault at {0:#x}, where no guest memory is")]
    Stray(u64),
    /// A page that has landed could not be made visible.
    #[error("failed to make page {page} of the region at guest address {guest_addr:#x} visible")]
    Resolve {
        /// The region's guest physical address.
        guest_addr: u64,
        /// The page.
        page: u64,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// Pages that are not of guest memory.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// It was to begin twice.
    #[error("pages are missing already, or were: a fault source begins once")]
    AlreadyBegun,
    /// It was to end while pages are missing.
    #[error("{pages} pages are missing still")]
    StillMissing {
        /// How many.
        pages: u64,
    },
    /// The source was called against its contract.
    #[error(transparent)]
    Misuse(#[from] MisuseError),
}

/// What the kernel means by it.
fn hint(cause: &io::Error) -> &'static str {
    uffd::hint(cause, " (it can be anonymous memory, a memfd, or a file of tmpfs or hugetlbfs)")
}
