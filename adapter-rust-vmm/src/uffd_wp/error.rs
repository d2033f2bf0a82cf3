//! Why write faults cannot be served.

use std::io;
use std::sync::Arc;

use pageferry::memory::PAGE_BYTES;
use thiserror::Error;

use crate::misuse::MisuseError;
use crate::uffd;

/// Why pages cannot be tracked by write faults.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UffdWpError {
    /// The process may not have a userfaultfd that serves kernel code's faults.
    #[error(
        "failed to create a userfaultfd: not permitted. Writes by KVM and by system calls fault in \
         kernel code, and to serve those takes CAP_SYS_PTRACE, or the sysctl \
         vm.unprivileged_userfaultfd=1, or (Linux 6.1) read and write permission for \
         /dev/userfaultfd; a seccomp filter may forbid the system call too"
    )]
    NotPermitted(#[source] io::Error),
    /// There is no userfaultfd, or none can be had now.
    #[error("failed to create a userfaultfd")]
    Userfaultfd(#[source] io::Error),
    /// The kernel's userfaultfd cannot write-protect.
    #[error("this kernel's userfaultfd lacks {missing}; {since} or later has it")]
    FeatureMissing {
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
    /// A region could not be registered for write-protection.
    #[error("failed to register the region at guest address {guest_addr:#x}{}", hint(.cause))]
    Register {
        /// The region's guest physical address.
        guest_addr: u64,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// Pages of a region could not be write-protected.
    #[error("failed to write-protect pages of the region at guest address {guest_addr:#x}")]
    Protect {
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
    /// The thread that serves the faults could not be started.
    #[error("failed to start the thread that serves write faults")]
    Thread(#[source] io::Error),
    /// Faults are not served any more, and memory is not protected any more, so that nothing
    /// waits; but writes since then are unknown.
    #[error("tracking ended by itself: a write fault could not be served")]
    Ended(#[source] Arc<io::Error>),
    /// The source was called against its contract.
    #[error(transparent)]
    Misuse(#[from] MisuseError),
}

/// What the kernel means by it.
fn hint(cause: &io::Error) -> &'static str {
    uffd::hint(
        cause,
        " (anonymous memory can be tracked, and since Linux 5.19 memfds and hugetlbfs, in \
             whole huge pages)",
    )
}
