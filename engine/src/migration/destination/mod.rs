//! The destination's embedding API.

mod closing;
mod drive;
mod loading;
mod populate;

use std::fmt;
use std::sync::Arc;

use crate::config::{Common, MAX_CHANNELS, Timeouts, common_settings};
use crate::error::Error;
use crate::machine::Machine;
use crate::pages::memory::{GuestMemory, Layout};
use crate::progress::{Event, EventSink, MigrationHandle, Shared, UnderWay};
use crate::stats::Statistics;
use crate::threads::Spawn;
use crate::transport::Rendezvous;

/// Takes in a guest that comes from another host.
///
/// [`negotiate`](Self::negotiate) gives an [`Offer`]; its host looks at it, builds the machine
/// and its memory, and [takes the guest in](Offer::receive) or [declines](Offer::decline).
///
/// # Thread safety
///
/// Both block the calling thread and call the [`Machine`] from it. Other threads watch and
/// cancel through a [`MigrationHandle`].
///
/// # Resource cleanup
///
/// When [`Offer::receive`] returns, whatever the result, all threads of the migration have
/// ended, the link is closed, registrations are revoked, and the engine holds no reference to
/// guest memory.
pub struct Destination {
    common: Common,
    most_channels: u16,
    populate_threads: u16,
    events: EventSink,
    shared: Arc<Shared>,
    under_way: UnderWay,
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Destination")
            .field("most_channels", &self.most_channels)
            .field("populate_threads", &self.populate_threads)
            .finish_non_exhaustive()
    }
}

impl Default for Destination {
    fn default() -> Self {
        Self::new()
    }
}

/// A source that greeted, and fits so far.
pub struct Offer {
    drive: drive::Drive,
}

impl fmt::Debug for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Offer").field("layout", self.layout()).finish_non_exhaustive()
    }
}

/// Where the guest is after a failed migration, seen from the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestAtDestination {
    /// Not here: the source keeps it. The machine holds a useless copy at most.
    AtSource,
    /// It is complete and paused here, and the source may have committed. Do not resume before
    /// you know that the source does not run it: see [`Error::UncertainDestination`].
    Uncertain,
    /// It was ours, could not be resumed, and was given back: never resume it here.
    GivenBack,
    /// It is ours, and [`Machine::resume`] panicked, so that it may have run or not, and may run now.
    /// The source does not resume it by itself: it is uncertain, and learns from here what became of
    /// the guest.
    Unresumed,
}

/// The guest runs here.
#[derive(Debug)]
pub struct Arrived<M> {
    /// The machine, running unless it is [`paused`](Self::paused).
    pub machine: M,
    /// Whether the guest was paused at the source ([`Machine::is_paused`]): it is here too. It is yours to
    /// resume, when whoever paused it wants that.
    pub paused: bool,
    /// What it took, seen from here: pages, bytes, channels. Rounds and downtime are measured at
    /// the source.
    pub statistics: Statistics,
    /// Whether this side compared memory here with memory at the source, by digest. It was equal then.
    pub verified: bool,
}

/// The migration failed.
#[derive(Debug)]
pub struct DestinationFailure<M> {
    /// The machine, paused.
    pub machine: M,
    /// Where the guest is.
    pub guest: GuestAtDestination,
    /// Why.
    pub error: Error,
    /// How far it came.
    pub statistics: Statistics,
}

impl<M> fmt::Display for DestinationFailure<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.guest {
            GuestAtDestination::AtSource => "migration failed, the source keeps the guest",
            GuestAtDestination::Uncertain => "migration uncertain, the guest is paused here",
            GuestAtDestination::GivenBack => "migration failed, the guest was given back",
            GuestAtDestination::Unresumed => {
                "the guest is here, and it is not known whether it runs"
            }
        })
    }
}

impl<M: fmt::Debug> std::error::Error for DestinationFailure<M> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl Destination {
    /// With up to [`MAX_CHANNELS`] data channels, and no memory populated ahead.
    pub fn new() -> Self {
        let shared = Shared::new();
        Self {
            common: Common::default(),
            most_channels: MAX_CHANNELS,
            populate_threads: 0,
            events: Box::new(|_| {}),
            under_way: shared.under_way(),
            shared,
        }
    }

    /// Most data channels to accept; each costs a thread.
    #[must_use]
    pub fn most_channels(mut self, channels: u16) -> Self {
        self.most_channels = channels.min(MAX_CHANNELS);
        self
    }

    /// Threads that populate guest memory ahead of the data (`MADV_POPULATE_WRITE`), where the
    /// source says that there is some. Worth it where memory is cold, pages are small and CPUs are
    /// idle; `docs/performance.md` has figures. At most [`MAX_CHANNELS`].
    #[must_use]
    pub fn populate_ahead(mut self, threads: u16) -> Self {
        self.populate_threads = threads.min(MAX_CHANNELS);
        self
    }

    common_settings!();

    /// To watch and to cancel from other threads.
    pub fn handle(&self) -> MigrationHandle {
        MigrationHandle { shared: Arc::clone(&self.shared) }
    }

    /// Waits for a source, for as long as it takes, and hears its greeting. Nothing is allocated for the guest yet.
    ///
    /// The rendezvous is kept: where a link is lost the source comes back by it, as often as that happens. It is
    /// waited for up to [`Timeouts::rejoin`] each time.
    pub fn negotiate(self, rendezvous: Box<dyn Rendezvous>) -> Result<Offer, Error> {
        Ok(Offer { drive: drive::negotiate(self, rendezvous)? })
    }
}

impl Offer {
    /// The guest's memory map. The destination's memory must look the same to the guest; its
    /// backing is its own choice. It is what the source says: compare with what this host can
    /// give before allocating.
    pub fn layout(&self) -> &Layout {
        self.drive.layout()
    }

    /// What the source's host says about the machine ([`crate::Source::description`]). Not
    /// checked by anyone yet.
    pub fn description(&self) -> &[u8] {
        self.drive.description()
    }

    /// Whether the source asks for memory to be compared by digest.
    pub fn verify(&self) -> bool {
        self.drive.agreement().verify
    }

    /// Whether no guest comes: the source asks whether one could ([`Source::try_out`](crate::Source::try_out)).
    /// [`receive`](Self::receive) it all the same, into a machine that is made for it; it ends as one that was
    /// cancelled, and what is in memory then is of no use.
    pub fn is_trial(&self) -> bool {
        self.drive.is_trial()
    }

    /// Number of data channels agreed on.
    pub fn channels(&self) -> u16 {
        self.drive.agreement().channels
    }

    /// Takes the guest in. Blocks until it runs here and the source knows that, or the migration failed. Where the
    /// source does not hear it, because the link is lost, it may ask for up to [`Timeouts::rejoin`]: that long this
    /// goes on after the guest was resumed ([`Event::GuestRunsThere`] tells at once).
    ///
    /// `machine` is paused and stays so until the engine resumes it. All of `memory` must be
    /// zero: pages that are zero at the source are never sent.
    pub fn receive<M: Machine>(
        self,
        machine: M,
        memory: &Arc<GuestMemory>,
    ) -> Result<Arrived<M>, Box<DestinationFailure<M>>> {
        self.drive.receive(machine, memory)
    }

    /// Says no, and tells the source why. The guest goes on there.
    pub fn decline(self, reason: &str) {
        self.drive.decline(reason);
    }
}
