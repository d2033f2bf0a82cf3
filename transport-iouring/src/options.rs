//! Settings of the transport.

use std::time::Duration;

use pageferry_tcp::ZeroCopy;

use crate::features::Features;

/// Settings of rings and requests; both sides choose theirs freely.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoUringOptions {
    /// When a source has the kernel read guest memory without copying it first. `Auto`: a few
    /// sends at the beginning of each channel try it, and it is used if the kernel says that it
    /// did not copy after all, as it always does on loopback and on many virtual NICs. Where the
    /// kernel does not say (before Linux 6.2) it is not used. Nothing is registered: the kernel
    /// pins what it sends for as long as it sends it. `On`: all of guest memory is registered, and
    /// so allocated and pinned, before the first page goes out; each send costs less then. `Off`:
    /// all is copied, and nothing registered.
    pub zero_copy: ZeroCopy,
    /// Runs of at least so many bytes are sent zero-copy, where it is used; shorter ones go with
    /// the header of their batch. The default is what copying costs about as much as the request
    /// and its notification do (`docs/performance.md`).
    pub zero_copy_threshold_bytes: u64,
    /// At the source: page bytes that a channel collects before it tells the kernel, so that one
    /// system call covers many batches. Waiting for what was sent always tells it. At most 32 MiB,
    /// since an engine lets no more be under way on a channel.
    pub queue_bytes: u64,
    /// At the destination: whether guest memory is registered, and so allocated and pinned,
    /// before the first page comes. Receiving is faster then, for no page is allocated on the
    /// way; but memory that stays zero is allocated too, which can take longer than all the rest.
    pub register_destination: bool,
    /// Whether a link fails when memory that is to be registered cannot be, for want of
    /// `RLIMIT_MEMLOCK` say. Otherwise it goes on without: the kernel pins what it sends for as
    /// long as it sends it, and pages are allocated as they come.
    pub require_registration: bool,
    /// Whether a link fails when the kernel gives no rings for its channels, for want of
    /// `RLIMIT_MEMLOCK` say. Otherwise pages go as tcp moves them, with a warning; the other side
    /// need not know.
    pub require_rings: bool,
    /// A thread of the kernel polls each ring for work, and sleeps after having nothing to do for
    /// this long (`IORING_SETUP_SQPOLL`). Costs a CPU for each channel.
    pub sq_poll: Option<Duration>,
    /// Features not to use though the kernel has them.
    pub without: Features,
}

impl Default for IoUringOptions {
    fn default() -> Self {
        Self {
            zero_copy: ZeroCopy::Auto,
            zero_copy_threshold_bytes: 32 << 10,
            queue_bytes: 16 << 20,
            register_destination: false,
            require_registration: true,
            require_rings: true,
            sq_poll: None,
            without: Features::none(),
        }
    }
}
