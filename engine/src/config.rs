//! Settings that both sides have.

use std::sync::Arc;
use std::time::Duration;

use crate::threads::{Spawn, StdThreads};

/// Most data channels of one migration.
pub const MAX_CHANNELS: u16 = 256;

/// How long to wait for the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For each step of the handshake, and for opening the data channels.
    pub handshake: Duration,
    /// For the other side to register a GiB of guest memory (to pin it, say), on top of
    /// [`handshake`](Self::handshake); and as long for the source to begin its first round. Counts by the
    /// size of the guest, a started GiB as a whole one.
    pub registration_per_gib: Duration,
    /// For any page to land, while pages are being sent; and for the link to take a message. A
    /// [trial](crate::Source::try_out) takes four times as long at the destination at most.
    pub stall: Duration,
    /// For the destination to load the device state.
    pub load: Duration,
    /// At the destination, with the device state loaded: for the source to release what only one host
    /// may hold, as long as it says that it is at that.
    pub release: Duration,
    /// For a link that was lost to come back, as often as that happens; then the migration fails, or is uncertain if the
    /// source has committed. None of it where the two sides have
    /// [one link](crate::transport::OneLink) only, or one of them has 0 here.
    pub rejoin: Duration,
    /// For the commit and its answer. When it is over the migration is uncertain. At the destination two
    /// seconds at least: a source that is at its release says so twenty times in that, whatever its own
    /// limits are.
    pub commit: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            registration_per_gib: Duration::from_secs(5),
            stall: Duration::from_secs(30),
            load: Duration::from_secs(60),
            release: Duration::from_secs(300),
            rejoin: Duration::from_secs(30),
            commit: Duration::from_secs(30),
        }
    }
}

impl Timeouts {
    /// For the other side to register that much guest memory.
    pub(crate) fn registration(&self, bytes: u64) -> Duration {
        let gib = u32::try_from(bytes.div_ceil(1 << 30)).unwrap_or(u32::MAX);
        self.handshake.saturating_add(self.registration_per_gib.saturating_mul(gib))
    }
}

/// Whether the engine makes sure that the pages which landed are those that were sent, before the guest runs on them.
///
/// Over streams both sides keep a checksum of each page ([`sums`](crate::sums)); what differs is sent again, and the
/// switchover is called off for that. Over RDMA, where the destination's CPU sees no page land, up to
/// [`MAX_SAMPLES`](crate::protocol::MAX_SAMPLES) pages that are drawn at random are compared while the guest stands still,
/// and one that differs ends the migration: where 256 are drawn damage of a hundredth of the pages that hold data is found
/// with a probability of 0.92, that of a single page most likely not. Fewer are drawn of a guest that uses little of its
/// memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PageChecks {
    /// Where nothing else does: in plain text, to another host, or over a byte stream of the host's own
    /// ([`Capabilities::protects_pages`](crate::transport::Capabilities::protects_pages)).
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always. Fails over a transport of somebody else's that has no way to.
    On,
}

/// What [`crate::Source`] and [`crate::Destination`] have in common.
#[derive(Clone)]
pub(crate) struct Common {
    pub(crate) timeouts: Timeouts,
    pub(crate) spawn: Arc<dyn Spawn>,
}

impl Default for Common {
    fn default() -> Self {
        Self { timeouts: Timeouts::default(), spawn: Arc::new(StdThreads) }
    }
}

/// The settings that [`crate::Source`] and [`crate::Destination`] both have, of their `common` and `events`.
macro_rules! common_settings {
    () => {
        /// How long to wait for the other side.
        #[must_use]
        pub fn timeouts(mut self, timeouts: Timeouts) -> Self {
            self.common.timeouts = timeouts;
            self
        }

        /// Who starts the engine's threads.
        #[must_use]
        pub fn threads(mut self, spawn: Arc<dyn Spawn>) -> Self {
            self.common.spawn = spawn;
            self
        }

        /// Who is told what happens; called on the thread that runs the migration.
        #[must_use]
        pub fn on_event(mut self, sink: impl FnMut(&Event) + Send + 'static) -> Self {
            self.events = Box::new(sink);
            self
        }
    };
}

pub(crate) use common_settings;
