//! One migration of a script over links with faults, and whether the newest bytes arrived.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pageferry::convergence::Bound;
use pageferry::dirty::DirtySources;
use pageferry::testing::faulty::{Faults, FaultySource};
use pageferry::testing::{TestMemory, memory_transport};
use pageferry::transport::{DestinationLink, OneLink};
use pageferry::{Destination, Error, GuestAtSource, PageChecks, Source, Timeouts};

use crate::guest::{
    Arriving, Guest, LIMIT, PAGES, REGION_PAGES, Scripted, Stall, Tracker, Write, write,
};
use crate::links::{late, stepping};

/// What makes batches short, so that a stripe is sent in several.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LinkLimits {
    pub(crate) batch_pages: u64,
    /// Page bytes a second.
    pub(crate) limit: Option<NonZeroU64>,
}

pub(crate) const SHORT_BATCHES: LinkLimits = LinkLimits { batch_pages: 16, limit: None };

/// A guest's script, and what happens to its link meanwhile.
#[derive(Debug, Clone)]
pub(crate) struct Migration {
    pub(crate) script: Vec<Vec<Write>>,
    pub(crate) stalls: Vec<Stall>,
    pub(crate) channels: u16,
    /// A channel that is lost, once so many pages have gone out on it.
    pub(crate) lose_channel: Option<(u16, u64)>,
    /// Nobody is told: it falls silent, and is closed after half the time in which anything must land.
    pub(crate) silently: Option<Duration>,
    pub(crate) reorder_depth: usize,
    pub(crate) late_channel: Option<u16>,
    pub(crate) link: LinkLimits,
    pub(crate) seed: u64,
}

/// Returns the first of [`PAGES`] that does not hold its newest bytes at the destination, and whether
/// memory is the same otherwise; or why the guest was kept.
pub(crate) fn play(migration: Migration) -> Result<(Option<(u16, u64)>, bool), Error> {
    let Migration { script, stalls, channels, reorder_depth, late_channel, link, seed, .. } =
        migration;
    let lose_channel = migration.lose_channel.map(|(channel, pages)| (channel, pages * 4096));
    let faults = Faults { reorder_depth, ..Faults::default() };
    let (faults, timeouts) = match migration.silently {
        Some(stall) => (
            Faults { silent_channel: lose_channel, ..faults },
            Timeouts { stall, ..Timeouts::default() },
        ),
        None => (Faults { lose_channel, ..faults }, Timeouts::default()),
    };
    let (stalled, wanted) = (!stalls.is_empty(), stalls.len());
    let guest = Guest::new(script, stalls);
    // Something to send between the pages of the script.
    (0..1100).step_by(3).for_each(|page| guest.memory.fill_page(0, page, seed));
    PAGES.iter().enumerate().for_each(|(index, _)| write(&guest.memory, index, 0));
    let there = TestMemory::new(&REGION_PAGES);
    let (here_link, there_link) = memory_transport::pair();
    let here_link = FaultySource::new(Box::new(here_link), faults, seed);
    let stepping = stepping(Box::new(here_link), &guest, link.batch_pages);
    let there_link: Box<dyn DestinationLink> = match late_channel {
        Some(channel) => Box::new(late(Box::new(there_link), channel)),
        None => Box::new(there_link),
    };
    thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let offer = Destination::new().negotiate(OneLink::destination(there_link)).unwrap();
            offer.receive(Arriving::new(&there), there.memory()).map(drop)
        });
        let dirty = DirtySources::new(vec![Box::new(Tracker(Arc::clone(&guest)))]);
        let source = if stalled {
            Source::new().downtime_limit(LIMIT)
        } else {
            // Rounds for as long as the script goes on.
            Source::new().downtime_limit(Duration::from_millis(1)).bound(Bound::BestEffort)
        };
        source.handle().limit_bandwidth(link.limit);
        let source = source.channels(channels).timeouts(timeouts).max_rounds(10_000);
        // Whatever becomes of a page, both sides have the same checksum of it in the end.
        let outcome = source.page_checks(PageChecks::On).migrate(
            Scripted(Arc::clone(&guest)),
            guest.memory.memory(),
            dirty,
            OneLink::source(Box::new(stepping)),
        );
        let arrived = receiving.join().unwrap();
        let departed = match outcome {
            Ok(departed) => departed,
            Err(failure) => {
                assert!(matches!(failure.guest, GuestAtSource::Running), "{failure:?}");
                assert!(arrived.is_err(), "two guests");
                return Err(failure.error);
            }
        };
        arrived.unwrap();
        // Stalls are noticed; one switchover may have those of several channels.
        let stalls = wanted - guest.state.lock().unwrap().stalls.len();
        let attempts = departed.statistics.switchover_attempts;
        assert!(stalls == 0 || attempts > 1, "{attempts} switchovers with {stalls} stalls");
        assert_eq!(departed.statistics.damaged_pages, 0, "nothing was damaged");
        assert_eq!(departed.statistics.called_off > Duration::ZERO, attempts > 1);
        Ok(())
    })?;
    let newest = guest.state.lock().unwrap().newest;
    let stale = PAGES.into_iter().zip(newest).find(|((region, page), version)| {
        there.read(*region, *page) != version.to_le_bytes().repeat(512)
    });
    Ok((stale.map(|(page, _)| page), guest.memory.first_difference(&there).is_none()))
}

/// The destination has the newest bytes.
pub(crate) fn assert_newest(migration: Migration) {
    match play(migration) {
        Ok(found) => assert_eq!(found, (None, true)),
        Err(error) => panic!("the guest was kept: {error:?}"),
    }
}
