//! Why pages cannot be tracked by their page tables.

use std::io;

use pageferry::memory::PAGE_BYTES;
use thiserror::Error;

use crate::misuse::MisuseError;
use crate::uffd;

/// Why pages cannot be tracked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PagemapError {
    /// The process may not have a userfaultfd.
    #[error(
        "failed to create a userfaultfd: not permitted. Only user-mode faults are asked for, so \
         neither CAP_SYS_PTRACE nor the sysctl vm.unprivileged_userfaultfd is needed: a seccomp \
         filter or a security module forbids the system call"
    )]
    NotPermitted(#[source] io::Error),
    /// There is no userfaultfd, or none can be had now.
    #[error("failed to create a userfaultfd")]
    Userfaultfd(#[source] io::Error),
    /// The kernel's userfaultfd lacks what asynchronous write-protection needs.
    #[error("this kernel's userfaultfd lacks {missing}; Linux 6.7 or later has it")]
    FeatureMissing {
        /// Names of what is missing.
        missing: String,
    },
    /// The kernel has no `PAGEMAP_SCAN`.
    #[error("this kernel has no PAGEMAP_SCAN; Linux 6.7 or later has it")]
    NoScan(#[source] io::Error),
    /// The process's page map could not be opened.
    #[error("failed to open /proc/self/pagemap")]
    OpenPagemap(#[source] io::Error),
    /// The host's pages are not the engine's.
    #[error("host pages of {host_page_bytes} bytes are not supported, only {PAGE_BYTES}")]
    HostPageSize {
        /// Bytes in a page of the host.
        host_page_bytes: usize,
    },
    /// A region could not be registered for write-protection.
    #[error("failed to register the region at guest address {guest_addr:#x}{}", hint(.cause))]
    Register {
        /// The region's guest physical address.
        guest_addr: u64,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// A region could not be write-protected.
    #[error("failed to write-protect the region at guest address {guest_addr:#x}")]
    Protect {
        /// The region's guest physical address.
        guest_addr: u64,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// A region could not be scanned.
    #[error("failed to scan the region at guest address {guest_addr:#x}{}", hint(.cause))]
    Scan {
        /// The region's guest physical address.
        guest_addr: u64,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// A region could not be unregistered.
    #[error("failed to unregister the region at guest address {guest_addr:#x}")]
    Unregister {
        /// The region's guest physical address.
        guest_addr: u64,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// The source was called against its contract.
    #[error(transparent)]
    Misuse(#[from] MisuseError),
}

/// What the kernel means by it.
fn hint(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EPERM) => " (it was mapped anew since tracking started)",
        _ => uffd::hint(
            cause,
            " (only anonymous memory, memfds and hugetlbfs can be tracked, in whole huge pages)",
        ),
    }
}
