//! What a migration did and what it cost.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_utils::CachePadded;

use crate::transport::{
    ChannelCounters, PageCounts, Registration, WorkRequestCounts, ZeroCopyCounts,
};

/// Time the guest stood still, in parts that follow one another and leave nothing out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Downtime {
    /// [`crate::Machine::pause`].
    pub pause: Duration,
    /// Asking the trackers what was written until the pause.
    pub final_harvest: Duration,
    /// Sending the last pages, until all have landed. Device state is saved meanwhile.
    pub final_pages: Duration,
    /// Sending device state and loading it at the destination.
    pub device_state: Duration,
    /// Releasing resources, the commit's way and its answer's way back.
    pub commit: Duration,
    /// Acquiring resources and resuming at the destination, by its clock.
    pub resume: Duration,
    /// Comparing memory by digest, with verification only. The guest stands still for it, and it
    /// is not counted in [`Self::total`].
    pub verify: Duration,
}

impl Downtime {
    /// The downtime: all parts but verification, which nobody uses in production.
    pub fn total(&self) -> Duration {
        self.pause
            + self.final_harvest
            + self.final_pages
            + self.device_state
            + self.commit
            + self.resume
    }

    /// All the guest stood still, verification included.
    pub fn standstill(&self) -> Duration {
        self.total() + self.verify
    }
}

/// What was done to make destination memory ready ahead of the data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Populated {
    /// Threads that did it; 0 if nothing was to be done.
    pub threads: u16,
    /// Bytes of guest memory populated.
    pub bytes: u64,
    /// From the beginning until the last thread was through.
    pub took: Duration,
}

/// One round of pre-copy. The last one, with the guest paused, is among them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoundStatistics {
    /// Pages dirty when it began.
    pub dirty_pages: u64,
    /// Page bytes that landed during it.
    pub landed_bytes: u64,
    /// How long it took.
    pub took: Duration,
}

/// What saving and loading device state took. Saving goes on beside the last pages, so that it is
/// no part of the standstill as long as they take longer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceStateFigures {
    /// Its length.
    pub bytes: u64,
    /// In [`Machine::save`](crate::Machine::save); 0 at the destination.
    pub save: Duration,
    /// In [`Machine::load`](crate::Machine::load), by the destination's clock.
    pub load: Duration,
}

/// Figures of a whole migration; meaningful for as far as it came if it failed.
#[derive(Debug, Clone, Default)]
pub struct Statistics {
    /// From the call to its return.
    pub total: Duration,
    /// Handshake, registration, opening of channels: before the first page.
    pub setup: Duration,
    /// From the first page to the last one landed.
    pub transfer: Duration,
    /// The rounds, the last one with the guest paused. Of more than [`MAX_ROUNDS_KEPT`] the first
    /// one, and those that came last.
    pub rounds: Vec<RoundStatistics>,
    /// How many rounds there were.
    pub round_count: u32,
    /// Pages sent, by kind. `zero` counts all found to be zero, also those never mentioned on
    /// the wire.
    pub pages: PageCounts,
    /// Bytes on the wire: data channels and control messages, both ways, without TCP/IP headers.
    pub wire_bytes: u64,
    /// Page bytes that user space copied; 0 on the raw path.
    pub user_copied_bytes: u64,
    /// System calls made to move data on the data channels.
    pub system_calls: u64,
    /// What became of zero-copy sends.
    pub zero_copy: ZeroCopyCounts,
    /// What was asked of a NIC; 0 where there are only sockets.
    pub work_requests: WorkRequestCounts,
    /// What registering guest memory cost before the first page.
    pub registration: Registration,
    /// What of it the data channels did while pages flowed; the time is the sum of theirs.
    pub registered_on_the_way: Registration,
    /// At the destination: memory populated ahead of the data.
    pub populated: Populated,
    /// Unique pages the guest dirtied a second, in the last round that it ran, or in the last quarter of a second if
    /// that was shorter.
    pub dirty_pages_per_second: f64,
    /// Page bytes that landed a second, as the switchover was decided on it.
    pub bytes_per_second: f64,
    /// How often the link was made anew: because it was lost, or lacked data channels.
    pub rejoins: u32,
    /// Data channels that were lost on the way; others took over.
    pub lost_channels: u32,
    /// How many of them were there again later, on another link.
    pub reopened_channels: u32,
    /// At the source: pages that had arrived otherwise than they were sent, with those that lie near, and were sent again.
    pub damaged_pages: u64,
    /// How often pages were dealt out anew since a channel lagged.
    pub rebalances: u32,
    /// The machine's own part in the last switchover.
    pub device_state: DeviceStateFigures,
    /// The guest's standstill, by the last switchover.
    pub downtime: Downtime,
    /// Switchovers that were begun.
    pub switchover_attempts: u32,
    /// How long the guest stood still for those that were called off, all together.
    pub called_off: Duration,
    /// The downtime that was predicted when the last one was decided on.
    pub predicted_downtime: Option<Duration>,
    /// The downtime limit that held for it.
    pub downtime_limit: Option<Duration>,
    /// By how much the guest was slowed down at most.
    pub throttle_max_percent: u8,
    /// What became of convergence.
    pub convergence: Ending,
}

/// What became of convergence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ending {
    /// The migration ended before that was decided.
    #[default]
    Undecided,
    /// The guest left, and was not slowed down for it.
    Converged,
    /// The guest was slowed down, and left.
    Throttled,
    /// The guest dirtied memory too fast, and stayed.
    GaveUp,
}

/// Most rounds of which figures are kept. A guest that does not converge may make thousands a
/// minute, for as long as the host likes.
pub const MAX_ROUNDS_KEPT: usize = 1024;

impl Statistics {
    pub(crate) fn add_round(&mut self, round: RoundStatistics) {
        if self.rounds.len() == MAX_ROUNDS_KEPT {
            // The first one moved all memory, and tells most.
            self.rounds.remove(1);
        }
        self.rounds.push(round);
        self.round_count = self.round_count.saturating_add(1);
    }

    /// Adds up what the channels did.
    pub(crate) fn take_from(&mut self, gauges: &[CachePadded<ChannelGauge>], control_bytes: u64) {
        let mut counters = ChannelCounters::default();
        let mut pages = PageCounts::default();
        for gauge in gauges {
            counters.add(&gauge.counters());
            pages.add(&gauge.pages());
        }
        self.pages = pages;
        self.wire_bytes = counters.wire_bytes + control_bytes;
        self.user_copied_bytes = counters.user_copied_bytes;
        self.system_calls = counters.system_calls;
        self.zero_copy = counters.zero_copy;
        self.work_requests = counters.work_requests;
        self.registered_on_the_way = counters.registered;
    }

    /// Bits on the wire a second, from the first page to the last one landed, in 10⁹.
    pub fn throughput_gbps(&self) -> f64 {
        let seconds = self.transfer.as_secs_f64();
        if seconds > 0.0 { self.wire_bytes as f64 * 8.0 / seconds / 1e9 } else { 0.0 }
    }
}

/// What one channel's thread publishes while it works; everyone else only reads.
#[derive(Debug, Default)]
pub(crate) struct ChannelGauge {
    pub(crate) data_pages: AtomicU64,
    pub(crate) zero_pages: AtomicU64,
    pub(crate) landed_bytes: AtomicU64,
    /// Pages that were mentioned as zero, and are so at the destination.
    pub(crate) landed_zero_pages: AtomicU64,
    /// Counts up while nothing is sent because of the bandwidth limit, and nothing is to land.
    pub(crate) held_back: AtomicU64,
    pub(crate) wire_bytes: AtomicU64,
    pub(crate) user_copied_bytes: AtomicU64,
    pub(crate) system_calls: AtomicU64,
    /// Stripes the channel has been through since they were dealt out, and all it was given.
    pub(crate) stripes_done: AtomicU64,
    pub(crate) stripes_given: AtomicU64,
    /// Set by the driver: others do its work.
    pub(crate) lost: AtomicBool,
    zero_copy: ZeroCopyGauge,
    work_requests: WorkRequestGauge,
    registered_bytes: AtomicU64,
    registering_nanoseconds: AtomicU64,
    /// What the channels of earlier links did.
    earlier: Mutex<ChannelCounters>,
}

#[derive(Debug, Default)]
struct ZeroCopyGauge {
    sent: AtomicU64,
    copied_by_kernel: AtomicU64,
    sent_bytes: AtomicU64,
    copied_bytes: AtomicU64,
}

#[derive(Debug, Default)]
struct WorkRequestGauge {
    posted: AtomicU64,
    signalled: AtomicU64,
    doorbells: AtomicU64,
    polls: AtomicU64,
}

impl ChannelGauge {
    /// One for each channel, each in cache lines of its own.
    pub(crate) fn for_channels(channels: u16) -> Vec<CachePadded<Self>> {
        (0..channels).map(|_| CachePadded::new(Self::default())).collect()
    }

    pub(crate) fn publish_counters(&self, counters: &ChannelCounters) {
        self.wire_bytes.store(counters.wire_bytes, Relaxed);
        self.user_copied_bytes.store(counters.user_copied_bytes, Relaxed);
        self.system_calls.store(counters.system_calls, Relaxed);
        let ZeroCopyCounts { sent, copied_by_kernel, sent_bytes, copied_bytes } =
            counters.zero_copy;
        self.zero_copy.sent.store(sent, Relaxed);
        self.zero_copy.copied_by_kernel.store(copied_by_kernel, Relaxed);
        self.zero_copy.sent_bytes.store(sent_bytes, Relaxed);
        self.zero_copy.copied_bytes.store(copied_bytes, Relaxed);
        let WorkRequestCounts { posted, signalled, doorbells, polls } = counters.work_requests;
        self.work_requests.posted.store(posted, Relaxed);
        self.work_requests.signalled.store(signalled, Relaxed);
        self.work_requests.doorbells.store(doorbells, Relaxed);
        self.work_requests.polls.store(polls, Relaxed);
        let Registration { registered_bytes, took } = counters.registered;
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.registered_bytes.store(registered_bytes, Relaxed);
        self.registering_nanoseconds.store(nanoseconds, Relaxed);
    }

    fn earlier(&self) -> MutexGuard<'_, ChannelCounters> {
        self.earlier.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The link is lost, and the channel with it: another one goes on counting.
    pub(crate) fn begin_epoch(&self) {
        let mut earlier = self.earlier();
        earlier.add(&self.since_epoch());
        self.publish_counters(&ChannelCounters::default());
        self.lost.store(false, Relaxed);
    }

    /// Of all links.
    pub(crate) fn counters(&self) -> ChannelCounters {
        let mut counters = *self.earlier();
        counters.add(&self.since_epoch());
        counters
    }

    fn since_epoch(&self) -> ChannelCounters {
        ChannelCounters {
            wire_bytes: self.wire_bytes.load(Relaxed),
            user_copied_bytes: self.user_copied_bytes.load(Relaxed),
            system_calls: self.system_calls.load(Relaxed),
            zero_copy: ZeroCopyCounts {
                sent: self.zero_copy.sent.load(Relaxed),
                copied_by_kernel: self.zero_copy.copied_by_kernel.load(Relaxed),
                sent_bytes: self.zero_copy.sent_bytes.load(Relaxed),
                copied_bytes: self.zero_copy.copied_bytes.load(Relaxed),
            },
            work_requests: WorkRequestCounts {
                posted: self.work_requests.posted.load(Relaxed),
                signalled: self.work_requests.signalled.load(Relaxed),
                doorbells: self.work_requests.doorbells.load(Relaxed),
                polls: self.work_requests.polls.load(Relaxed),
            },
            registered: Registration {
                registered_bytes: self.registered_bytes.load(Relaxed),
                took: Duration::from_nanos(self.registering_nanoseconds.load(Relaxed)),
            },
        }
    }

    pub(crate) fn pages(&self) -> PageCounts {
        PageCounts {
            data: self.data_pages.load(Relaxed),
            zero: self.zero_pages.load(Relaxed),
            encoded: 0,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_counted_and_the_first_and_the_last_are_kept() {
        let mut statistics = Statistics::default();
        for number in 0..5000 {
            statistics.add_round(RoundStatistics { dirty_pages: number, ..Default::default() });
        }
        assert_eq!(statistics.round_count, 5000);
        let kept: Vec<_> = statistics.rounds.iter().map(|round| round.dirty_pages).collect();
        assert_eq!((kept.len(), kept[0], kept[1]), (MAX_ROUNDS_KEPT, 0, 3977));
        assert_eq!(kept.last(), Some(&4999));
    }
}
