//! Watching and steering a migration from outside: events, a snapshot to poll, cancel.

use std::fmt;
use std::num::{NonZeroU16, NonZeroU64};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::blocking::{Blocked, Blocking, SayLast};
use crate::control::convergence::{Bound, Forecast, Policy, Settings, Verdict};
use crate::control::limit::Limiter;
use crate::control::protocol::{Agreement, Message};
use crate::error::Error;
use crate::host::caught;
use crate::machine::{MachineError, MachineOperation};
use crate::snapshot::{Board, Phase, Snapshot};
use crate::stats::RoundStatistics;
use crate::transport::{Interrupt, Registration, TransportError};

/// What happened, as it happens. Sent from the thread that runs the migration: return quickly.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// The handshake succeeded.
    Agreed(Agreement),
    /// Guest memory is to be registered with the transport, which pins it: what of it is registered is allocated,
    /// though it was never touched, and may not be discarded until the migration ends. Not where the transport
    /// [needs none](crate::transport::Capabilities::needs_registration).
    Registering {
        /// All of it; the transport may do with less.
        bytes: u64,
    },
    /// Guest memory was registered with the transport, as far as that comes before the first page.
    Registered(Registration),
    /// A round began.
    RoundStarted {
        /// Its number, from 1.
        round: u32,
        /// Pages to look at.
        dirty_pages: u64,
    },
    /// A round ended. At the source, with what was decided on it.
    RoundFinished {
        /// Its number, from 1.
        round: u32,
        /// Its figures.
        statistics: RoundStatistics,
        /// What comes next.
        verdict: Verdict,
    },
    /// A data channel was lost; the others go on without it.
    ChannelLost {
        /// Which one.
        channel: u16,
    },
    /// At the source: data channels that were lost are there again, on another link. The destination only sees that the
    /// link was [lost](Self::LinkLost) and [came back](Self::Rejoined).
    ChannelsReopened {
        /// How many.
        channels: u32,
        /// Number of the link; the first one of the migration was 0.
        epoch: u32,
        /// How long it took. The guest ran meanwhile.
        after: Duration,
    },
    /// At the source: a channel lagged, and pages were dealt out anew.
    Rebalanced {
        /// The channels' shares from now on.
        weights: Vec<u32>,
    },
    /// At the source: whether pre-copy can meet the downtime limit at all, once two rounds have told,
    /// and again when the answer has changed.
    Forecast(Forecast),
    /// At the source: the guest was slowed down.
    Throttled {
        /// By how much: 0 is full speed.
        percent: u8,
    },
    /// At the source: the guest was to be slowed down, and the machine
    /// [cannot](crate::Machine::throttle). It is only waited for.
    CannotThrottle,
    /// At the source: the guest was paused.
    GuestPaused,
    /// The link is lost. At the source the guest runs on, unless it is committed; the link is made anew.
    LinkLost {
        /// The error, with its causes.
        why: String,
        /// For how long it may be lost ([`Timeouts::rejoin`](crate::Timeouts::rejoin)).
        at_most: Duration,
    },
    /// The migration goes on, on another link.
    Rejoined {
        /// Number of the link; the first one of the migration was 0.
        epoch: u32,
        /// For how long there was none.
        after: Duration,
    },
    /// A switchover would have taken too long, or pages had arrived damaged: the guest goes on at the source, and so
    /// does the migration.
    CalledOff {
        /// Its number.
        attempt: u32,
        /// What was being done when that was known; known at the source. None where the link was lost.
        stage: Option<SwitchoverStage>,
        /// How long the guest stood still; known at the source.
        stood: Duration,
    },
    /// At the destination: everything has arrived and is loaded.
    Loaded,
    /// The point of no return: from now on the destination owns the guest.
    Committed,
    /// The guest runs at the destination.
    GuestRunsThere,
    /// The guest is at the destination, paused as it [was](crate::Machine::is_paused) at the source.
    GuestPausedThere,
    /// The migration failed and the guest runs on at the source.
    GuestKept,
}

impl Event {
    /// The guest is at the destination.
    pub(crate) fn there(paused: bool) -> Self {
        if paused { Self::GuestPausedThere } else { Self::GuestRunsThere }
    }
}

/// What is done while the guest stands still, before the point of no return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SwitchoverStage {
    /// Sending the last pages.
    Pages,
    /// Saving device state, sending and loading it.
    DeviceState,
    /// All is done but the commit.
    Commit,
    /// Pages had arrived otherwise than they were sent ([`PageChecks`](crate::PageChecks)), and are sent again.
    DamagedPages,
}

impl fmt::Display for SwitchoverStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pages => "sending the last pages",
            Self::DeviceState => "moving the device state",
            Self::Commit => "committing",
            Self::DamagedPages => "comparing pages, of which some were damaged",
        })
    }
}

/// Watches and steers one migration. Cheap to clone, usable from any thread, also before the
/// migration began and after it ended.
#[derive(Clone)]
pub struct MigrationHandle {
    pub(crate) shared: Arc<Shared>,
}

impl fmt::Debug for MigrationHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MigrationHandle").field("snapshot", &self.snapshot()).finish()
    }
}

impl MigrationHandle {
    /// Ends the migration as soon as possible, and the guest goes on at the source. Returns at
    /// once. Too late, and without effect, at the source once the commit is out, and at the
    /// destination once it has begun to load the device state: from there on only the source may
    /// decide.
    pub fn cancel(&self) {
        self.shared.cancel();
    }

    /// Limits page bytes per second over all channels, from the next batch on; `None` lifts the
    /// limit. Not applied while the guest stands still. May be called before the migration.
    pub fn limit_bandwidth(&self, bytes_per_second: Option<NonZeroU64>) {
        self.shared.limiter.set(bytes_per_second);
    }

    /// How long the guest may stand still, from the next decision on. Of use at the source alone,
    /// as all that follows.
    pub fn set_downtime_limit(&self, limit: Duration) {
        self.shared.change(|settings| settings.downtime_limit = limit);
    }

    /// Whether the limit is kept once the guest is paused, from the next switchover on.
    pub fn set_bound(&self, bound: Bound) {
        self.shared.change(|settings| settings.bound = bound);
    }

    /// What to do if the guest does not converge, from the next decision on. A guest that was
    /// slowed down stays so unless the new policy is not to: then it gets its speed back.
    pub fn set_policy(&self, policy: Policy) -> Result<(), Error> {
        let mut settings = self.settings();
        settings.policy = policy;
        check_settings(&settings)?;
        self.shared.change(|settings| settings.policy = policy);
        Ok(())
    }

    /// How long to go on once all memory was sent once ([`Settings::deadline`]).
    pub fn set_deadline(&self, deadline: Option<Duration>) {
        self.shared.change(|settings| settings.deadline = deadline);
    }

    /// Page bytes a second to expect while the guest stands still
    /// ([`Settings::switchover_bandwidth`]), from the next decision on.
    pub fn set_switchover_bandwidth(&self, bytes_per_second: Option<NonZeroU64>) {
        self.shared.change(|settings| settings.switchover_bandwidth = bytes_per_second);
    }

    /// What is set.
    pub fn settings(&self) -> Settings {
        self.shared.settings()
    }

    /// Uses that many of the data channels that were opened, at most all, from now on: pages are
    /// dealt out anew, also in the middle of a round.
    pub fn use_channels(&self, channels: NonZeroU16) {
        self.shared.channels.store(channels.get(), Ordering::Relaxed);
    }

    /// How far it is.
    pub fn snapshot(&self) -> Snapshot {
        self.shared.board.snapshot()
    }
}

/// Refuses settings that make no sense, or that this engine cannot follow yet.
pub(crate) fn check_settings(settings: &Settings) -> Result<(), Error> {
    if settings.policy == Policy::PostCopy {
        return Err(Error::Unsupported("post-copy"));
    }
    settings.complaint().map_or(Ok(()), |complaint| Err(Error::Configuration(complaint)))
}

/// Takes events.
pub(crate) type EventSink = Box<dyn FnMut(&Event) + Send>;

/// What the driver and the handles share.
pub(crate) struct Shared {
    started: Instant,
    pub(crate) board: Board,
    limiter: Limiter,
    /// Whether the guest stands still, and nothing is limited.
    stands_still: AtomicBool,
    settings: Mutex<Settings>,
    /// Data channels to use, at most.
    channels: AtomicU16,
    cancelled: AtomicBool,
    /// Why the guest ended, if it did; taken by whoever ends the migration for it.
    alarm: Mutex<Option<Error>>,
    alarmed: AtomicBool,
    /// Whether the peer has failed or left.
    peer_ended: AtomicBool,
    wake: (Sender<()>, Receiver<()>),
    blocking: Blocking,
}

impl Shared {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            started: Instant::now(),
            board: Board::new(),
            limiter: Limiter::default(),
            stands_still: AtomicBool::new(false),
            settings: Mutex::new(Settings::default()),
            channels: AtomicU16::new(u16::MAX),
            cancelled: AtomicBool::new(false),
            alarm: Mutex::new(None),
            alarmed: AtomicBool::new(false),
            peer_ended: AtomicBool::new(false),
            wake: bounded(1),
            blocking: Blocking::default(),
        })
    }

    fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        // Full means that a wake-up is pending already.
        let _ = self.wake.0.try_send(());
        self.blocking.end(Error::Cancelled.last_word().as_ref());
    }

    /// The guest has ended by itself. The first alarm counts.
    pub(crate) fn raise(&self, cause: MachineError) {
        let mut alarm = self.alarm.lock().unwrap_or_else(PoisonError::into_inner);
        if self.alarmed.load(Ordering::SeqCst) {
            return;
        }
        let ended = Error::Machine { operation: MachineOperation::Run, cause };
        let word = ended.last_word();
        *alarm = Some(ended);
        self.alarmed.store(true, Ordering::SeqCst);
        drop(alarm);
        let _ = self.wake.0.try_send(());
        self.blocking.end(word.as_ref());
    }

    /// Why it is to end before it is through: somebody cancelled, or the guest ended.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.alarmed.load(Ordering::SeqCst)
            && let Some(ended) = self.alarm.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            return Err(ended);
        }
        if self.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// The peer has failed or left: no call goes on waiting for it. The word is for the peer, before its
    /// link is interrupted.
    pub(crate) fn end_peer(&self, word: Option<&Message>) {
        self.peer_ended.store(true, Ordering::SeqCst);
        self.blocking.end_wait(word);
    }

    /// Another link: who is at the other end of it has said nothing yet.
    pub(crate) fn begin_link(&self) {
        self.peer_ended.store(false, Ordering::SeqCst);
    }

    pub(crate) fn has_peer_ended(&self) -> bool {
        self.peer_ended.load(Ordering::SeqCst)
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    pub(crate) fn settings(&self) -> Settings {
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.settings.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Data channels to use, at most.
    pub(crate) fn channels(&self) -> u16 {
        self.channels.load(Ordering::Relaxed)
    }

    pub(crate) fn set_stands_still(&self, stands_still: bool) {
        self.stands_still.store(stands_still, Ordering::Relaxed);
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// The bandwidth limit, if one applies: none does to what the guest stands still for.
    fn limit(&self) -> Option<&Limiter> {
        (!self.stands_still.load(Ordering::Relaxed)).then_some(&self.limiter)
    }

    /// The bandwidth limit that holds just now, in page bytes a second.
    pub(crate) fn bandwidth_limit(&self) -> Option<NonZeroU64> {
        self.limit().and_then(Limiter::get)
    }

    /// Takes the link for page bytes, if it is their turn. If not, for how long that is so as things
    /// are: ask again soon, since the host may change its mind.
    pub(crate) fn take_bandwidth(&self, bytes: u64) -> Result<(), Duration> {
        self.limit().map_or(Ok(()), |limit| limit.take(self.now_ns(), bytes))
    }

    /// Most page bytes to send at a time.
    pub(crate) fn bandwidth_at_a_time(&self) -> u64 {
        self.limit().map_or(u64::MAX, Limiter::at_a_time)
    }

    /// Becomes ready when cancelled.
    pub(crate) fn wake(&self) -> &Receiver<()> {
        &self.wake.1
    }

    /// Runs a call that only an interrupt can end, so that cancelling ends it, and the peer's end
    /// does: that is [`TransportError::Interrupted`]. Who ends it has said the last word, if there is one
    /// to say, and so it does not succeed any more.
    pub(crate) fn while_blocked<T>(
        &self,
        interrupt: &Arc<dyn Interrupt>,
        say: Box<SayLast>,
        call: impl FnOnce() -> Result<T, TransportError>,
    ) -> Result<T, Error> {
        let result = self.blocking.during(Blocked::Waiting(Arc::clone(interrupt), say), || {
            self.check()?;
            // Over before it began: leave the link alone, the peer should be told why it ends.
            if self.has_peer_ended() {
                return Err(Error::Transport(TransportError::Interrupted));
            }
            Ok(caught("the transport", call)??)
        });
        if matches!(result, Ok(_) | Err(Error::Transport(TransportError::Interrupted))) {
            self.check()?;
            if self.has_peer_ended() {
                return Err(Error::Transport(TransportError::Interrupted));
            }
        }
        result
    }

    /// Makes a link, so that cancelling ends that, also if somebody has cancelled before. Where a link is there all the
    /// same the other side is told on it.
    pub(crate) fn while_dialling<T>(
        &self,
        interrupt: &Arc<dyn Interrupt>,
        call: impl FnOnce() -> Result<T, TransportError>,
    ) -> Result<T, Error> {
        let blocked = Blocked::Dialling(Arc::clone(interrupt));
        let result = self.blocking.during(blocked, || {
            if self.is_cancelled() || self.alarmed.load(Ordering::SeqCst) {
                interrupt.interrupt();
            }
            Ok(caught("the transport", call)??)
        });
        if matches!(result, Err(Error::Transport(TransportError::Interrupted))) {
            self.check()?;
        }
        result
    }

    /// Runs a send, so that cancelling ends it if it does not end by itself, and the peer's end does.
    pub(crate) fn while_sending(
        &self,
        interrupt: &Arc<dyn Interrupt>,
        send: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let result = self.blocking.during(Blocked::Sending(Arc::clone(interrupt)), || {
            // Whoever cancels from here on finds it blocked.
            self.check().and_then(|()| send())
        });
        if matches!(result, Err(Error::Transport(TransportError::Interrupted))) {
            self.check()?;
            if self.has_peer_ended() {
                return Err(Error::Transport(TransportError::Closed));
            }
        }
        result
    }

    /// The migration has not ended, also where it never begins, until what this returns is dropped.
    pub(crate) fn under_way(self: &Arc<Self>) -> UnderWay {
        UnderWay(Arc::clone(self))
    }

    /// Returns the phase before.
    pub(crate) fn set_phase(&self, phase: Phase) -> Phase {
        self.board.set_phase(phase)
    }

    /// Lets some time pass, unless somebody ends the migration.
    pub(crate) fn rest(&self, time: Duration) -> Result<(), Error> {
        // Raised long ago, perhaps.
        let until = Instant::now() + time;
        loop {
            self.check()?;
            if self.wake().recv_deadline(until).is_err() {
                return self.check();
            }
        }
    }
}

/// A migration that has not ended.
pub(crate) struct UnderWay(Arc<Shared>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.set_phase(Phase::Ended);
    }
}
