//! The machine port: what the engine asks of the VMM.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::pages::memory::PageRange;

/// What a machine operation failed with; the engine passes it on as it is.
pub type MachineError = Box<dyn std::error::Error + Send + Sync>;

/// One VM, as its VMM lets the engine drive it.
///
/// The engine calls these from the thread that runs the migration, never two at once, in these
/// orders:
///
/// - at the source: `pause`, `save`, `release_resources`, and then either nothing more, or, when
///   the switchover was called off or the migration failed, `reacquire_resources` (if it was asked to
///   release them, also where that failed) and `resume`, also after a `pause` that failed itself. A
///   switchover that was called off is followed by another one. While the guest runs: `rehearse` and
///   `throttle`;
/// - of a guest that [`is_paused`](Self::is_paused): the same without `rehearse` and without any `resume`, here
///   and there;
/// - at the destination: `load`, `reacquire_resources`, `resume`; or, when it failed, nothing. After
///   a switchover that was called off, `unload`, and `load` again, with newer state. Each `load` that went well is
///   followed by `written_by_load`. When `reacquire_resources` or
///   `resume` fails, `release_resources`: the source gets the guest back.
///
/// Before the first page moves, `state_schema` is asked of the running machine at the source, and
/// what it says is shown to `check_state_schema` at the destination.
///
/// The machine is given to a migration by value and comes back with its result, whatever that
/// is, also when one of these calls panics ([`Error::Panicked`](crate::Error::Panicked)). A call that
/// panicked counts as one that failed, and its duties are the same: what cannot be said of a machine
/// after a panic is said in `docs/embedding.md`.
pub trait Machine {
    /// Stops all vCPUs and all device emulation that writes guest memory, and returns when they
    /// stand. No write to guest memory is under way then, also none by the kernel or a device for a
    /// request that was submitted before, and each has been reported to its dirty source. The
    /// guest's standstill is counted from before this call.
    fn pause(&mut self) -> Result<(), MachineError>;

    /// Whether the guest stands still because somebody wants it to: then it arrives paused, and is still paused
    /// here if it does not. Asked at the source whenever it matters, while the engine itself has the guest not
    /// stopped; what it says last, before [`pause`](Self::pause), counts. It is moved after one round, whatever the
    /// downtime limit is. `false` unless implemented: the
    /// guest is then let run wherever it ends up.
    fn is_paused(&self) -> bool {
        false
    }

    /// Lets the guest run. At the source after a failure, at the destination at the end. When it
    /// returns an error the guest must not have executed an instruction.
    fn resume(&mut self) -> Result<(), MachineError>;

    /// Appends the state of vCPUs and devices to `state`, and leaves what is in it. The guest is paused.
    /// May still dirty guest memory: the engine harvests once more afterwards.
    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), MachineError>;

    /// Describes what `save` would append, for
    /// [`check_state_schema`](Self::check_state_schema) at the other side. Opaque to the engine, at
    /// most [`MAX_STATE_SCHEMA_BYTES`](crate::protocol::MAX_STATE_SCHEMA_BYTES). Nothing unless
    /// implemented.
    fn state_schema(&self) -> Result<Vec<u8>, MachineError> {
        Ok(Vec::new())
    }

    /// Whether `load` would take what a source with that `state_schema` saves. An error ends the
    /// migration before anything has moved, as
    /// [`Incompatibility::DeviceState`](crate::protocol::Incompatibility::DeviceState). The bytes
    /// are what the source says: hostile input. Takes everything unless implemented.
    fn check_state_schema(&self, source: &[u8]) -> Result<(), MachineError> {
        let _ = source;
        Ok(())
    }

    /// Takes over the state that `save` made on the other side. The guest is paused and its
    /// memory complete. A failed `load` leaves the guest to the source.
    ///
    /// May be called again, when a switchover was called off: the guest has run on at the source
    /// meanwhile, and what is loaded last is all that counts.
    fn load(&mut self, state: &[u8]) -> Result<(), MachineError>;

    /// Pages of guest memory that the last [`load`](Self::load) has written, or may have: inside guest memory, in any
    /// order. If the switchover is called off the source sends them again; without that, what was written would stay
    /// in the memory of a guest that has gone on meanwhile. The guest stands still while this is asked. None unless
    /// implemented.
    fn written_by_load(&mut self) -> Result<Vec<PageRange>, MachineError> {
        Ok(Vec::new())
    }

    /// The switchover was called off after a [`load`](Self::load), and the guest runs on at the source: what was
    /// loaded is of no use, and another `load` comes later. Pages land meanwhile. For a machine that takes state
    /// only once, and has to be made anew for the next: here there is time for it. Does nothing unless implemented.
    fn unload(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Gives up what only one host may hold (disk locks, network identity) so that the other
    /// side can take it. Called right before the point of no return, and at a destination that gives
    /// the guest back: it releases whatever is held, which after a `reacquire_resources` that failed
    /// may be some of it or nothing.
    ///
    /// Must not write guest memory: at the source all of it has been sent. What device emulation has
    /// under way is written back by `pause` or `save`.
    fn release_resources(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Takes what `release_resources` gave up: at the destination once the guest is its own, at
    /// the source when the migration failed after a release, or in the middle of one: then some of it
    /// may be held still.
    fn reacquire_resources(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Takes what tells the engine that the guest has ended by itself: by a shutdown, or because a
    /// virtual CPU failed. Called once at the source, before anything else; whoever notices the end
    /// [raises](GuestAlarm::raise) it, from any thread. Without it a guest that ended is moved as one
    /// that is quiet. Does nothing unless implemented.
    fn set_alarm(&mut self, alarm: GuestAlarm) {
        let _ = alarm;
    }

    /// Says how large the device state is and how long saving it takes, without a switchover: what
    /// the downtime to expect is made of. Called with the guest running, at the beginning and now
    /// and then. Where the guest must be stopped for it, that should be for a moment only; the guest
    /// runs when it returns, with an error too, and is not resumed by the engine then. `None`: it will
    /// be known after the first switchover.
    fn rehearse(&mut self) -> Result<Option<Rehearsal>, MachineError> {
        Ok(None)
    }

    /// Slows the guest's vCPUs down by `percent` (0: full speed, 99: almost still) so that its
    /// dirty rate sinks; by its dirty rate rather than by its time where the machine can tell which
    /// vCPU dirties how much. Called with the guest running; with 0 when the guest stays at the source,
    /// before a `resume`.
    ///
    /// Whether it was done: a machine that says `false` to anything but 0 is not asked again, and what is
    /// predicted does not count on it. `false` unless implemented.
    fn throttle(&mut self, percent: u8) -> bool {
        let _ = percent;
        false
    }
}

/// What a machine said about its device state and its own speed, without stopping for good.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rehearsal {
    /// Bytes of device state.
    pub state_bytes: u64,
    /// How long saving it took.
    pub save: Duration,
    /// How long stopping the guest took, where it was stopped for that.
    pub pause: Option<Duration>,
    /// How long letting it run again took, likewise.
    pub resume: Option<Duration>,
}

/// Tells a migration that its guest has ended ([`Machine::set_alarm`]). Cheap to clone, usable
/// from any thread; of no effect once the source has committed or the migration is over.
#[derive(Clone)]
pub struct GuestAlarm(Arc<dyn Fn(MachineError) + Send + Sync>);

impl fmt::Debug for GuestAlarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestAlarm").finish_non_exhaustive()
    }
}

impl GuestAlarm {
    /// Calls that when it is raised.
    pub(crate) fn new(raised: impl Fn(MachineError) + Send + Sync + 'static) -> Self {
        Self(Arc::new(raised))
    }

    /// The guest runs no more, and why. Returns at once; the migration ends with
    /// [`Error::Machine`](crate::Error::Machine), wherever it is. The first alarm counts.
    pub fn raise(&self, cause: MachineError) {
        (self.0)(cause);
    }
}

/// A call of [`Machine`], for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MachineOperation {
    /// Describing memory and trackers to the engine; the host's own doing before a migration.
    Describe,
    /// [`Machine::pause`].
    Pause,
    /// [`Machine::is_paused`].
    IsPaused,
    /// [`Machine::resume`].
    Resume,
    /// Running the guest, between two calls: it has ended by itself ([`GuestAlarm`]).
    Run,
    /// [`Machine::set_alarm`].
    SetAlarm,
    /// [`Machine::save`].
    Save,
    /// [`Machine::rehearse`].
    Rehearse,
    /// [`Machine::load`].
    Load,
    /// [`Machine::unload`].
    Unload,
    /// [`Machine::release_resources`].
    ReleaseResources,
    /// [`Machine::reacquire_resources`].
    ReacquireResources,
    /// [`Machine::check_state_schema`].
    CheckStateSchema,
    /// [`Machine::throttle`].
    Throttle,
}

impl fmt::Display for MachineOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Describe => "describe the guest to the engine",
            Self::Pause => "pause the guest",
            Self::IsPaused => "say whether the guest is paused",
            Self::Resume => "resume the guest",
            Self::Run => "run the guest",
            Self::SetAlarm => "take an alarm",
            Self::Save => "save device state",
            Self::Rehearse => "rehearse saving device state",
            Self::Load => "load device state",
            Self::Unload => "drop device state of a switchover that was called off",
            Self::ReleaseResources => "release host resources",
            Self::ReacquireResources => "acquire host resources",
            Self::CheckStateSchema => "look at the device state to come",
            Self::Throttle => "slow the guest down",
        })
    }
}
