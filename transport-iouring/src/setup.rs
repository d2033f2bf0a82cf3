//! How the ring of a channel is made.

use std::io;
use std::time::Duration;

use io_uring::IoUring;

use crate::features::{Feature, Features};
use crate::limits::no_ring;

/// Most requests of a chain.
pub(crate) const MAX_CHAIN: usize = 128;
/// Room for completions: those of a chain, and of the notifications that may be outstanding.
const COMPLETIONS: u32 = 2048;

/// How rings are made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RingSetup {
    pub(crate) features: Features,
    pub(crate) sq_poll: Option<Duration>,
}

impl RingSetup {
    /// A ring that must be enabled by the thread that will use it.
    pub(crate) fn build(&self) -> io::Result<IoUring> {
        let mut builder = IoUring::builder();
        builder.setup_r_disabled().setup_cqsize(COMPLETIONS).dontfork();
        if self.features.has(Feature::SubmitAll) {
            builder.setup_submit_all();
        }
        if self.features.has(Feature::SingleIssuer) {
            builder.setup_single_issuer();
        }
        if let Some(idle) = self.sq_poll {
            // The kernel's thread does the work: there is none to defer.
            builder.setup_sqpoll(u32::try_from(idle.as_millis()).unwrap_or(u32::MAX));
        } else if self.features.has(Feature::DeferTaskrun) {
            builder.setup_defer_taskrun();
        } else if self.features.has(Feature::CoopTaskrun) {
            builder.setup_coop_taskrun();
        }
        builder.build(u32::try_from(MAX_CHAIN).unwrap_or(u32::MAX)).map_err(no_ring)
    }
}
