//! The source's embedding API.

mod drive;

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::{Common, MAX_CHANNELS, PageChecks, Timeouts, common_settings};
use crate::control::convergence::{Bound, Forecast, Policy};
use crate::control::protocol::MAX_DESCRIPTION_BYTES;
use crate::error::Error;
use crate::host::caught;
use crate::machine::Machine;
use crate::migration::sender::BATCH_BYTES;
use crate::pages::dirty::DirtySources;
use crate::pages::memory::GuestMemory;
use crate::progress::{Event, EventSink, MigrationHandle, Shared, UnderWay, check_settings};
use crate::stats::Statistics;
use crate::threads::Spawn;
use crate::transport::Connector;

/// Moves a running guest away.
///
/// Made with [`Source::new`], set up with the methods that follow, and used up by
/// [`migrate`](Source::migrate). See `docs/embedding.md` for a whole example.
///
/// # Thread safety
///
/// [`migrate`](Source::migrate) blocks the calling thread and calls the [`Machine`] from it.
/// Other threads watch and cancel through a [`MigrationHandle`].
///
/// # Resource cleanup
///
/// When `migrate` returns, whatever the result, all threads of the migration have ended, the
/// link is closed, registrations are revoked, dirty tracking is stopped, and the engine holds
/// no reference to guest memory.
pub struct Source {
    common: Common,
    channels: u16,
    batch_bytes: u64,
    verify: bool,
    page_checks: PageChecks,
    description: Vec<u8>,
    events: EventSink,
    shared: Arc<Shared>,
    _under_way: UnderWay,
    /// For how long it is tried out only.
    trial: Option<Duration>,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source")
            .field("channels", &self.channels)
            .field("settings", &self.shared.settings())
            .field("verify", &self.verify)
            .finish_non_exhaustive()
    }
}

impl Default for Source {
    fn default() -> Self {
        Self::new()
    }
}

/// Where the guest is after a failed migration, seen from the source.
#[derive(Debug)]
#[non_exhaustive]
pub enum GuestAtSource {
    /// It runs here, as before.
    Running,
    /// It is paused here, as before: [`Machine::is_paused`].
    StillPaused,
    /// It is this side's and paused: the migration failed, and then letting it run failed too.
    /// Resume the machine when the cause is mended.
    Paused(Error),
    /// It is paused here, and may be running at the destination. Do not resume before you know
    /// that the destination does not run it: see [`Error::Uncertain`].
    Uncertain,
}

impl GuestAtSource {
    /// Of a guest that no migration has touched.
    pub fn untouched<M: Machine>(machine: &M) -> Self {
        match caught("the machine", || machine.is_paused()) {
            Ok(true) => Self::StillPaused,
            _ => Self::Running,
        }
    }
}

/// The guest runs at the destination.
#[derive(Debug)]
pub struct Departed<M> {
    /// The machine, paused, its resources released. Never resume it.
    pub machine: M,
    /// Whether the guest is paused there, as it was here.
    pub paused: bool,
    /// What it took.
    pub statistics: Statistics,
}

/// The guest could go.
#[derive(Debug)]
pub struct Tried<M> {
    /// The machine, as it was.
    pub machine: M,
    /// What is to be expected. None where nothing could be measured: of a guest whose memory is all zero.
    pub forecast: Option<Forecast>,
    /// What it took.
    pub statistics: Statistics,
}

/// The migration failed.
#[derive(Debug)]
pub struct SourceFailure<M> {
    /// The machine, in the state that `guest` tells.
    pub machine: M,
    /// Where the guest is.
    pub guest: GuestAtSource,
    /// Why.
    pub error: Error,
    /// How far it came.
    pub statistics: Statistics,
}

impl<M> fmt::Display for SourceFailure<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.guest {
            GuestAtSource::Running => "migration failed, the guest runs on here",
            GuestAtSource::StillPaused => "migration failed, the guest is paused here as it was",
            GuestAtSource::Paused(_) => "migration failed, the guest is paused here",
            GuestAtSource::Uncertain => "migration uncertain, the guest is paused here",
        })
    }
}

impl<M: fmt::Debug> std::error::Error for SourceFailure<M> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl Source {
    /// With 2 data channels, a strict downtime limit of 300 ms, a guest that is slowed down if it
    /// does not converge, no verification.
    pub fn new() -> Self {
        let shared = Shared::new();
        Self {
            common: Common::default(),
            channels: 2,
            batch_bytes: BATCH_BYTES,
            verify: false,
            page_checks: PageChecks::default(),
            description: Vec::new(),
            events: Box::new(|_| {}),
            _under_way: shared.under_way(),
            shared,
            trial: None,
        }
    }

    /// Number of data channels, 1 to [`MAX_CHANNELS`]; each has a thread on both sides.
    #[must_use]
    pub fn channels(mut self, channels: u16) -> Self {
        self.channels = channels;
        self
    }

    /// Most page bytes in a batch, at least a page; 4 MiB unless set. They are fewer until some have
    /// landed, and on a slow link. The transport may have a lower limit
    /// ([`Capabilities::max_batch_bytes`](crate::transport::Capabilities)).
    #[must_use]
    pub fn batch_bytes(mut self, bytes: u64) -> Self {
        self.batch_bytes = bytes;
        self
    }

    /// How long the guest may stand still; 300 ms unless set. The switchover begins when what
    /// remains is expected to fit.
    #[must_use]
    pub fn downtime_limit(self, limit: Duration) -> Self {
        self.shared.change(|settings| settings.downtime_limit = limit);
        self
    }

    /// Whether the limit is kept once the guest is paused; [`Bound::Strict`] unless set.
    #[must_use]
    pub fn bound(self, bound: Bound) -> Self {
        self.shared.change(|settings| settings.bound = bound);
        self
    }

    /// What to do if the guest does not converge; it is slowed down unless set.
    #[must_use]
    pub fn policy(self, policy: Policy) -> Self {
        self.shared.change(|settings| settings.policy = policy);
        self
    }

    /// How long to go on once all memory was sent once, before [`Error::NotConverging`]. As long
    /// again as that took, and five minutes at least, unless set.
    #[must_use]
    pub fn deadline(self, deadline: Duration) -> Self {
        self.shared.change(|settings| settings.deadline = Some(deadline));
        self
    }

    /// Rounds to try, whatever the policy, before [`Error::NotConverging`]. As many as there is
    /// time for, unless set.
    #[must_use]
    pub fn max_rounds(self, rounds: u32) -> Self {
        self.shared.change(|settings| settings.max_rounds = rounds);
        self
    }

    /// Page bytes a second to expect while the guest stands still, where a bandwidth limit says
    /// nothing about that ([`Settings::switchover_bandwidth`](crate::convergence::Settings)).
    #[must_use]
    pub fn switchover_bandwidth(self, bytes_per_second: NonZeroU64) -> Self {
        self.shared.change(|settings| settings.switchover_bandwidth = Some(bytes_per_second));
        self
    }

    /// Whether to compare all memory by digest before the commit. Reads all memory on both
    /// sides with the guest paused: for tests.
    #[must_use]
    pub fn verify(mut self, verify: bool) -> Self {
        self.verify = verify;
        self
    }

    /// Whether to make sure that the pages which landed are those that were sent.
    #[must_use]
    pub fn page_checks(mut self, checks: PageChecks) -> Self {
        self.page_checks = checks;
        self
    }

    /// What the destination's host must know to build the machine; opaque to the engine, at most
    /// [`MAX_DESCRIPTION_BYTES`].
    #[must_use]
    pub fn description(mut self, description: Vec<u8>) -> Self {
        self.description = description;
        self
    }

    common_settings!();

    /// To watch, to steer and to cancel from other threads.
    pub fn handle(&self) -> MigrationHandle {
        MigrationHandle { shared: Arc::clone(&self.shared) }
    }

    /// Moves the guest. Blocks until the guest runs at the destination or the migration failed.
    ///
    /// `machine` is running, or [says](Machine::is_paused) that it is not. `memory` is all of its memory, and
    /// `dirty` reports every write to it. Before the point of no return any failure leaves the guest here as it
    /// was.
    ///
    /// A link that is lost is made anew by the connector, as often as that happens and for up to
    /// [`Timeouts::rejoin`] each time. Until then the guest runs on; after the commit it stands still, and
    /// the destination is asked what became of it.
    pub fn migrate<M: Machine>(
        self,
        machine: M,
        memory: &Arc<GuestMemory>,
        dirty: DirtySources,
        connector: Box<dyn Connector>,
    ) -> Result<Departed<M>, Box<SourceFailure<M>>> {
        let started = Instant::now();
        match self.check() {
            Ok(()) => drive::migrate(self, machine, memory, dirty, connector, started),
            Err(error) => Err(Box::new(SourceFailure {
                guest: GuestAtSource::untouched(&machine),
                machine,
                error,
                statistics: Statistics::default(),
            })),
        }
    }

    /// Asks whether the guest could go, and learns what that would be like. It runs on here all the time, and is
    /// not paused but for [`Machine::rehearse`]. All is made ready as for a migration, so that whatever does not
    /// fit is an error of this; then parts of memory are sent for `at_most`, which the destination throws away.
    ///
    /// Blocks. At the destination such an [`Offer`](crate::Offer) says that it
    /// [is a trial](crate::Offer::is_trial), and ends as one that was cancelled.
    pub fn try_out<M: Machine>(
        mut self,
        machine: M,
        memory: &Arc<GuestMemory>,
        dirty: DirtySources,
        connector: Box<dyn Connector>,
        at_most: Duration,
    ) -> Result<Tried<M>, Box<SourceFailure<M>>> {
        self.trial = Some(at_most);
        let failure = match self.migrate(machine, memory, dirty, connector) {
            Err(failure) => failure,
            Ok(Departed { machine, statistics, .. }) => {
                let (guest, error) =
                    (GuestAtSource::Uncertain, Error::Internal("a trial moved its guest"));
                return Err(Box::new(SourceFailure { machine, guest, error, statistics }));
            }
        };
        match *failure {
            SourceFailure { machine, error: Error::Trial(forecast), statistics, .. } => {
                Ok(Tried { machine, forecast, statistics })
            }
            failed => Err(Box::new(failed)),
        }
    }

    fn check(&self) -> Result<(), Error> {
        check_settings(&self.shared.settings())?;
        let complaint = if self.channels == 0 || self.channels > MAX_CHANNELS {
            format!("{} channels, 1 to {MAX_CHANNELS} are possible", self.channels)
        } else if self.description.len() > MAX_DESCRIPTION_BYTES {
            format!(
                "description of {} bytes, at most {MAX_DESCRIPTION_BYTES} are possible",
                self.description.len()
            )
        } else {
            return Ok(());
        };
        Err(Error::Configuration(complaint))
    }
}
