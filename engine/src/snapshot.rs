//! A moment of a migration, for whoever polls: a progress bar, an exporter of metrics.

use std::fmt;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;

use crate::control::convergence::Forecast;
use crate::pages::memory::PAGE_BYTES;
use crate::stats::ChannelGauge;
use crate::transport::PageCounts;

/// Where a migration stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// Handshake, registration, opening of channels.
    #[default]
    Setup,
    /// Rounds over a running guest.
    PreCopy,
    /// The guest is paused, the last pages are on their way.
    Switchover,
    /// The link is lost, and another one is being made.
    LinkLost,
    /// The point of no return is behind.
    Committed,
    /// Over, well or not.
    Ended,
}

impl Phase {
    /// All, in their order. A switchover that is called off leads back to pre-copy, and a link may be lost, and found
    /// again, in each.
    pub const ALL: [Self; 6] = [
        Self::Setup,
        Self::PreCopy,
        Self::Switchover,
        Self::LinkLost,
        Self::Committed,
        Self::Ended,
    ];
}

impl fmt::Display for Phase {
    /// In one word, for reports and metrics.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Setup => "setup",
            Self::PreCopy => "pre_copy",
            Self::Switchover => "switchover",
            Self::LinkLost => "link_lost",
            Self::Committed => "committed",
            Self::Ended => "ended",
        })
    }
}

/// A moment of a migration. Counters count from its beginning and only grow; they are read one after the other
/// while it goes on, so that one may be a batch ahead of another.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Snapshot {
    /// Where it stands.
    pub phase: Phase,
    /// Since its [`Source`](crate::Source) or [`Destination`](crate::Destination) was made, until it ended.
    pub elapsed: Duration,
    /// The round, from 1; 0 before the first.
    pub round: u32,
    /// Pages to look at in this round.
    pub round_pages: u64,
    /// Those of them that were not looked at yet. At the destination an estimate: pages may come before the
    /// word that their round begins, and what is zero from the beginning is not mentioned.
    pub left_pages: u64,
    /// Pages looked at in all rounds, by kind.
    pub pages: PageCounts,
    /// Page bytes known to have landed.
    pub landed_bytes: u64,
    /// Bytes on the wire of data channels.
    pub wire_bytes: u64,
    /// At the source: unique pages that the guest dirtied a second, in the last round, or in the last quarter of a
    /// second if that was shorter.
    pub dirty_pages_per_second: f64,
    /// At the source: page bytes that land a second, as decisions count on it.
    pub bytes_per_second: f64,
    /// At the source: the downtime to expect if the guest were paused now, as of the last decision.
    pub expected_downtime: Option<Duration>,
    /// At the source: where further rounds lead, once two have told.
    pub forecast: Option<Forecast>,
    /// At the source: by how much the guest is slowed down. 0 is full speed.
    pub throttle_percent: u8,
    /// Switchovers that were called off.
    pub called_off: u32,
    /// Each data channel, lost ones too. None before they are open.
    pub channels: Vec<ChannelSnapshot>,
}

/// A data channel's part in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ChannelSnapshot {
    /// Pages looked at, by kind.
    pub pages: PageCounts,
    /// Page bytes known to have landed.
    pub landed_bytes: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Whether it is lost, and others do its work.
    pub lost: bool,
}

impl Snapshot {
    /// Bytes of guest memory that this round has not looked at yet: at most so many go out.
    pub fn left_bytes(&self) -> u64 {
        self.left_pages.saturating_mul(PAGE_BYTES)
    }

    /// Page bytes a second that each channel landed since an earlier moment of the same migration.
    pub fn bytes_per_second_since(&self, earlier: &Self) -> Vec<f64> {
        let seconds = self.elapsed.saturating_sub(earlier.elapsed).as_secs_f64();
        let before = earlier.channels.iter().map(|channel| channel.landed_bytes);
        let before = before.chain(std::iter::repeat(0));
        let rate = |(channel, before): (&ChannelSnapshot, u64)| {
            let bytes = channel.landed_bytes.saturating_sub(before);
            if seconds > 0.0 { bytes as f64 / seconds } else { 0.0 }
        };
        self.channels.iter().zip(before).map(rate).collect()
    }
}

/// Where snapshots come from: what the driver writes down, and what channels count.
pub(crate) struct Board {
    began: Instant,
    written: Mutex<Written>,
    gauges: OnceLock<Arc<Vec<CachePadded<ChannelGauge>>>>,
}

/// What the driver writes down, some times a round.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Written {
    pub(crate) dirty_pages_per_second: f64,
    pub(crate) bytes_per_second: f64,
    pub(crate) expected_downtime: Option<Duration>,
    pub(crate) forecast: Option<Forecast>,
    pub(crate) throttle_percent: u8,
    pub(crate) called_off: u32,
    phase: Phase,
    round: u32,
    round_pages: u64,
    /// Pages looked at when the round began.
    looked_at: u64,
    took: Option<Duration>,
}

impl Board {
    pub(crate) fn new() -> Self {
        Self { began: Instant::now(), written: Mutex::default(), gauges: OnceLock::new() }
    }

    pub(crate) fn write(&self, change: impl FnOnce(&mut Written)) {
        change(&mut self.written.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Returns the phase before.
    pub(crate) fn set_phase(&self, phase: Phase) -> Phase {
        let mut before = phase;
        self.write(|written| {
            before = std::mem::replace(&mut written.phase, phase);
            written.took = (phase == Phase::Ended).then(|| self.began.elapsed());
        });
        before
    }

    pub(crate) fn begin_round(&self, round: u32, pages: u64) {
        let looked_at = self.gauges().map(|gauge| gauge.pages().total()).sum();
        self.write(|written| {
            (written.round, written.round_pages, written.looked_at) = (round, pages, looked_at);
        });
    }

    /// Once; a migration has its channels for life.
    pub(crate) fn set_gauges(&self, gauges: Arc<Vec<CachePadded<ChannelGauge>>>) {
        let _ = self.gauges.set(gauges);
    }

    fn gauges(&self) -> impl Iterator<Item = &ChannelGauge> {
        self.gauges.get().into_iter().flat_map(|gauges| gauges.iter()).map(|gauge| &**gauge)
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        // The time is read with the lock held, as the end of the migration is: it does not go back.
        let (written, elapsed) = {
            let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
            (*written, written.took.unwrap_or_else(|| self.began.elapsed()))
        };
        let mut pages = PageCounts::default();
        let channels = self.gauges().map(|gauge| {
            let snapshot = ChannelSnapshot {
                pages: gauge.pages(),
                landed_bytes: gauge.landed_bytes.load(Relaxed),
                wire_bytes: gauge.counters().wire_bytes,
                lost: gauge.lost.load(Relaxed),
            };
            pages.add(&snapshot.pages);
            snapshot
        });
        let channels: Vec<_> = channels.collect();
        let looked_at = pages.total().saturating_sub(written.looked_at);
        Snapshot {
            phase: written.phase,
            elapsed,
            round: written.round,
            round_pages: written.round_pages,
            left_pages: written.round_pages.saturating_sub(looked_at),
            pages,
            landed_bytes: channels.iter().map(|channel| channel.landed_bytes).sum(),
            wire_bytes: channels.iter().map(|channel| channel.wire_bytes).sum(),
            dirty_pages_per_second: written.dirty_pages_per_second,
            bytes_per_second: written.bytes_per_second,
            expected_downtime: written.expected_downtime,
            forecast: written.forecast,
            throttle_percent: written.throttle_percent,
            called_off: written.called_off,
            channels,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_counts_from_the_beginning_of_the_round() {
        let board = Board::new();
        board.begin_round(1, 100);
        assert_eq!((board.snapshot().left_pages, board.snapshot().channels.len()), (100, 0));
        let gauges = Arc::new(ChannelGauge::for_channels(2));
        board.set_gauges(Arc::clone(&gauges));
        gauges[0].data_pages.store(60, Relaxed);
        gauges[1].zero_pages.store(30, Relaxed);
        assert_eq!((board.snapshot().left_pages, board.snapshot().left_bytes()), (10, 10 * 4096));
        board.begin_round(2, 20);
        assert_eq!((board.snapshot().left_pages, board.snapshot().round), (20, 2));
        // A lost channel's pages are looked at again.
        gauges[1].data_pages.store(500, Relaxed);
        assert_eq!(board.snapshot().left_pages, 0);
    }

    #[test]
    fn rates_are_of_the_time_between() {
        let snapshot = |ms, landed: &[u64]| {
            let channel = |landed_bytes: &u64| ChannelSnapshot {
                landed_bytes: *landed_bytes,
                ..ChannelSnapshot::default()
            };
            Snapshot {
                elapsed: Duration::from_millis(ms),
                channels: landed.iter().map(channel).collect(),
                ..Snapshot::default()
            }
        };
        let (before, then) = (snapshot(1000, &[100, 200]), snapshot(1500, &[100, 1200]));
        assert_eq!(then.bytes_per_second_since(&before), [0.0, 2000.0]);
        assert_eq!(then.bytes_per_second_since(&snapshot(0, &[])), [100.0 / 1.5, 800.0]);
        assert_eq!(then.bytes_per_second_since(&then), [0.0, 0.0]);
    }
}
