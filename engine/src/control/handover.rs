//! Who runs the guest: two pure state machines with an explicit point of no return.
//!
//! ```text
//!   source                                     destination
//!   Running ── pause ──▶ Stopped               Receiving
//!                          │  ── prepare ──▶      │ load
//!                          │  ◀── prepared ──   Prepared
//!   Running ◀─ resume ─────┤  ── called off ──▶ Receiving     (and once more from the start)
//!   ═══ point of no return │  ── commit ───▶      │
//!                        Committed              Owner ── resume ──▶ Running
//!                          │  ◀── resumed ──      │
//!                        HandedOver               │
//!                          │  ◀── gave back ─   GaveBack (resume failed)
//! ```
//!
//! A switchover may be called off before the point of no return: the guest goes on at the source,
//! and another one follows. Switchovers are numbered, since what the destination says of one may
//! arrive when it was called off, or even in the middle of the next.
//!
//! Before the point of no return any failure leaves the guest to the source. After it the
//! destination owns it. If the link is lost in between, so that one side cannot know, nobody
//! resumes by himself: both are *uncertain* and keep their copy. The tests of this module
//! explore every interleaving of both machines with a link that may break at any point.

/// Where the source stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SourceState {
    /// The guest runs here; pages are being copied.
    Running,
    /// The guest is paused here and still ours.
    Stopped,
    /// The commit is out or about to go out: not ours to run any more.
    Committed,
    /// The destination runs the guest.
    HandedOver,
    /// The migration failed, the guest is ours and should run here.
    Kept,
    /// The commit's fate is unknown.
    Uncertain,
}

/// What happens to the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SourceInput {
    /// The guest is about to be paused for a switchover.
    Paused,
    /// The switchover is called off, and the guest was let run again.
    CalledOff,
    /// The destination has loaded everything for that switchover.
    Prepared {
        /// Its number.
        attempt: u32,
    },
    /// The destination runs the guest.
    Resumed,
    /// The destination gave the guest back.
    GaveBack,
    /// Anything that ends the migration: lost link, peer failed, local failure, cancel, timeout.
    Failed,
}

/// What the source must do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SourceAction {
    /// Go on.
    Nothing,
    /// Send the commit. The state has changed already: even a send that fails counts as sent.
    SendCommit,
    /// Tell the destination that the switchover of that number is called off.
    SendCalledOff(u32),
    /// Tell the peer (if it still listens) and let the guest run here.
    KeepGuest,
    /// Finish: the guest runs at the destination.
    Finish,
    /// Keep the copy paused, and tell the operator.
    ReportUncertain,
    /// The input makes no sense in this state; the peer misbehaves. Treat as `Failed`.
    Refuse,
}

/// The source's half of the handover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SourceHandover {
    state: SourceState,
    attempt: u32,
}

impl Default for SourceHandover {
    fn default() -> Self {
        Self { state: SourceState::Running, attempt: 0 }
    }
}

impl SourceHandover {
    /// The number of the switchover, or of the last one.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Where it stands.
    pub fn state(&self) -> SourceState {
        self.state
    }

    /// Whether the guest is still this side's: a failure now would keep it here.
    pub fn owns_guest(&self) -> bool {
        matches!(self.state, SourceState::Running | SourceState::Stopped | SourceState::Kept)
    }

    /// Takes an input, moves on, and says what to do.
    pub fn handle(&mut self, input: SourceInput) -> SourceAction {
        use SourceAction as A;
        use SourceInput as I;
        use SourceState as S;
        let (state, action) = match (self.state, input) {
            (S::Running, I::Paused) => {
                self.attempt = self.attempt.wrapping_add(1);
                (S::Stopped, A::Nothing)
            }
            (S::Stopped, I::CalledOff) => (S::Running, A::SendCalledOff(self.attempt)),
            (S::Stopped, I::Prepared { attempt }) if attempt == self.attempt => {
                (S::Committed, A::SendCommit)
            }
            // Said of a switchover that was called off since.
            (state @ (S::Running | S::Stopped), I::Prepared { attempt })
                if attempt < self.attempt || (attempt == self.attempt && state == S::Running) =>
            {
                (state, A::Nothing)
            }
            (S::Running | S::Stopped, I::Failed) => (S::Kept, A::KeepGuest),
            (S::Committed, I::Resumed) => (S::HandedOver, A::Finish),
            (S::Committed, I::GaveBack) => (S::Kept, A::KeepGuest),
            (S::Committed, I::Failed) => (S::Uncertain, A::ReportUncertain),
            (state @ (S::HandedOver | S::Kept | S::Uncertain), I::Failed) => (state, A::Nothing),
            (state, _) => (state, A::Refuse),
        };
        self.state = state;
        action
    }
}

/// Where the destination stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DestinationState {
    /// Pages and state are coming in.
    Receiving,
    /// Everything is loaded, and the source was told so.
    Prepared,
    /// The commit came: the guest is ours.
    Owner,
    /// The guest runs here.
    Running,
    /// The guest was ours, could not run, and was given back.
    GaveBack,
    /// The migration failed; the source keeps the guest.
    Discarded,
    /// The commit's fate is unknown.
    Uncertain,
}

/// What happens to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DestinationInput {
    /// Device state was loaded, for that switchover.
    Loaded {
        /// Its number.
        attempt: u32,
    },
    /// The source calls a switchover off.
    CalledOff {
        /// Its number.
        attempt: u32,
    },
    /// The source commits.
    Commit,
    /// The guest runs.
    Resumed,
    /// The guest could not be made to run, and executed no instruction.
    ResumeFailed,
    /// The source says that it failed or was cancelled: it keeps the guest.
    SourceFailed,
    /// Lost link, timeout, or a failure here.
    Failed,
}

/// What the destination must do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DestinationAction {
    /// Go on.
    Nothing,
    /// Tell the source that everything is loaded for the switchover of that number.
    SendPrepared(u32),
    /// Acquire resources and resume the guest.
    ResumeGuest,
    /// Tell the source that the guest runs here.
    SendResumed,
    /// Tell the source that the guest is its own again, and never run it.
    SendGaveBack,
    /// Drop the copy.
    Discard,
    /// Keep the copy paused, and tell the operator.
    ReportUncertain,
    /// The input makes no sense in this state; the peer misbehaves. Treat as `Failed`.
    Refuse,
}

/// The destination's half of the handover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DestinationHandover {
    state: DestinationState,
    attempt: u32,
}

impl Default for DestinationHandover {
    fn default() -> Self {
        Self { state: DestinationState::Receiving, attempt: 0 }
    }
}

impl DestinationHandover {
    /// Where it stands.
    pub fn state(&self) -> DestinationState {
        self.state
    }

    /// Takes an input, moves on, and says what to do.
    pub fn handle(&mut self, input: DestinationInput) -> DestinationAction {
        use DestinationAction as A;
        use DestinationInput as I;
        use DestinationState as S;
        let (state, action) = match (self.state, input) {
            // A switchover that is called off does not come again.
            (S::Receiving, I::Loaded { attempt }) if attempt > self.attempt => {
                self.attempt = attempt;
                (S::Prepared, A::SendPrepared(attempt))
            }
            (S::Receiving, I::CalledOff { attempt }) if attempt > self.attempt => {
                self.attempt = attempt;
                (S::Receiving, A::Nothing)
            }
            (S::Prepared, I::CalledOff { attempt }) if attempt == self.attempt => {
                (S::Receiving, A::Nothing)
            }
            (S::Receiving, I::SourceFailed | I::Failed) => (S::Discarded, A::Discard),
            (S::Prepared, I::Commit) => (S::Owner, A::ResumeGuest),
            // The source's own word that it keeps the guest: it has not committed and never will.
            (S::Prepared, I::SourceFailed) => (S::Discarded, A::Discard),
            (S::Prepared, I::Failed) => (S::Uncertain, A::ReportUncertain),
            (S::Owner, I::Resumed) => (S::Running, A::SendResumed),
            (S::Owner, I::ResumeFailed) => (S::GaveBack, A::SendGaveBack),
            // Committed is committed: a lost link does not take the guest away.
            (state, I::SourceFailed | I::Failed) => (state, A::Nothing),
            (state, _) => (state, A::Refuse),
        };
        self.state = state;
        action
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashSet, VecDeque};

    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    enum Wire {
        Prepare(u32),
        Prepared(u32),
        CalledOff(u32),
        Commit,
        Resumed,
        GaveBack,
        SourceFailed,
        DestinationFailed,
    }

    /// Switchovers that are explored, all but the last of which may be called off.
    const ATTEMPTS: u32 = 3;

    /// Both machines, what is under way between them, and whether the link lives. A broken link
    /// delivers nothing any more; each side notices in its own time.
    #[expect(clippy::struct_excessive_bools, reason = "independent facts of the world")]
    #[derive(Debug, Clone, PartialEq, Eq, Hash)]
    struct World {
        source: SourceHandover,
        destination: DestinationHandover,
        to_destination: VecDeque<Wire>,
        to_source: VecDeque<Wire>,
        link: bool,
        source_runs: bool,
        destination_runs: bool,
        prepare_sent: bool,
        refused: bool,
    }

    impl World {
        fn start() -> Self {
            Self {
                source: SourceHandover::default(),
                destination: DestinationHandover::default(),
                to_destination: VecDeque::new(),
                to_source: VecDeque::new(),
                link: true,
                source_runs: true,
                destination_runs: false,
                prepare_sent: false,
                refused: false,
            }
        }

        /// Whether a side has failed: it no longer listens to what was under way.
        fn over(&self) -> bool {
            matches!(self.source.state(), SourceState::Kept | SourceState::Uncertain)
                || matches!(
                    self.destination.state(),
                    DestinationState::Discarded | DestinationState::Uncertain
                )
        }

        fn send_to_destination(&mut self, message: Wire) {
            if self.link {
                self.to_destination.push_back(message);
            }
        }

        fn send_to_source(&mut self, message: Wire) {
            if self.link {
                self.to_source.push_back(message);
            }
        }

        fn source(&mut self, input: SourceInput) {
            match self.source.handle(input) {
                SourceAction::Nothing | SourceAction::Finish | SourceAction::ReportUncertain => {}
                SourceAction::SendCommit => self.send_to_destination(Wire::Commit),
                SourceAction::SendCalledOff(attempt) => {
                    self.send_to_destination(Wire::CalledOff(attempt));
                }
                SourceAction::KeepGuest => {
                    self.send_to_destination(Wire::SourceFailed);
                    self.source_runs = true;
                }
                SourceAction::Refuse => self.refused |= !self.over(),
            }
        }

        fn destination(&mut self, input: DestinationInput) {
            match self.destination.handle(input) {
                DestinationAction::Nothing | DestinationAction::ReportUncertain => {}
                DestinationAction::SendPrepared(attempt) => {
                    self.send_to_source(Wire::Prepared(attempt));
                }
                DestinationAction::ResumeGuest => {}
                DestinationAction::SendResumed => {
                    self.destination_runs = true;
                    self.send_to_source(Wire::Resumed);
                }
                DestinationAction::SendGaveBack => self.send_to_source(Wire::GaveBack),
                DestinationAction::Discard => self.send_to_source(Wire::DestinationFailed),
                DestinationAction::Refuse => self.refused |= !self.over(),
            }
        }

        /// Every world one step further.
        fn next(&self) -> Vec<Self> {
            let mut worlds = Vec::new();
            let mut step = |change: &dyn Fn(&mut Self)| {
                let mut world = self.clone();
                change(&mut world);
                worlds.push(world);
            };
            match self.source.state() {
                SourceState::Running if self.source.attempt() < ATTEMPTS => step(&|w| {
                    w.source(SourceInput::Paused);
                    w.source_runs = false;
                    w.prepare_sent = false;
                }),
                SourceState::Stopped => {
                    if !self.prepare_sent {
                        step(&|w| {
                            w.send_to_destination(Wire::Prepare(w.source.attempt()));
                            w.prepare_sent = true;
                        });
                    }
                    // At any moment until the commit, and the guest runs before anyone hears of it.
                    step(&|w| {
                        w.source_runs = true;
                        w.source(SourceInput::CalledOff);
                    });
                }
                _ => {}
            }
            // Cancel, timeout or local failure may come at any time, on either side.
            step(&|w| w.source(SourceInput::Failed));
            step(&|w| w.destination(DestinationInput::Failed));
            if self.destination.state() == DestinationState::Owner {
                step(&|w| w.destination(DestinationInput::Resumed));
                step(&|w| w.destination(DestinationInput::ResumeFailed));
            }
            if self.link {
                step(&|w| {
                    w.link = false;
                    w.to_destination.clear();
                    w.to_source.clear();
                });
                if !self.to_destination.is_empty() {
                    step(&|w| {
                        let message = w.to_destination.pop_front().unwrap();
                        w.destination(match message {
                            Wire::Prepare(attempt) => DestinationInput::Loaded { attempt },
                            Wire::CalledOff(attempt) => DestinationInput::CalledOff { attempt },
                            Wire::Commit => DestinationInput::Commit,
                            _ => DestinationInput::SourceFailed,
                        });
                    });
                }
                if !self.to_source.is_empty() {
                    step(&|w| {
                        let message = w.to_source.pop_front().unwrap();
                        w.source(match message {
                            Wire::Prepared(attempt) => SourceInput::Prepared { attempt },
                            Wire::Resumed => SourceInput::Resumed,
                            Wire::GaveBack => SourceInput::GaveBack,
                            _ => SourceInput::Failed,
                        });
                    });
                }
            }
            worlds
        }
    }

    #[test]
    fn never_two_guests_and_never_none_without_saying_so() {
        let mut seen = HashSet::from([World::start()]);
        let mut todo = vec![World::start()];
        let mut ends = HashSet::new();
        while let Some(world) = todo.pop() {
            assert!(!(world.source_runs && world.destination_runs), "two guests: {world:?}");
            // Between two honest sides no message is out of place.
            assert!(!world.refused, "a message was refused: {world:?}");
            let next = world.next();
            let stuck = next.iter().all(|next| *next == world);
            if stuck {
                let runs = world.source_runs || world.destination_runs;
                let told = world.source.state() == SourceState::Uncertain
                    || world.destination.state() == DestinationState::Uncertain;
                assert!(runs || told, "guest lost silently: {world:?}");
                ends.insert((world.source.state(), world.destination.state()));
            }
            todo.extend(next.into_iter().filter(|next| seen.insert(next.clone())));
        }
        // The exploration reached what it is about, also after switchovers that were called off.
        for attempt in 1..=ATTEMPTS {
            assert!(seen.iter().any(|world| world.destination_runs
                && world.source.attempt() == attempt
                && world.source.state() == SourceState::HandedOver));
        }
        assert!(ends.contains(&(SourceState::HandedOver, DestinationState::Running)));
        assert!(ends.contains(&(SourceState::Kept, DestinationState::Discarded)));
        assert!(ends.contains(&(SourceState::Kept, DestinationState::GaveBack)));
        assert!(ends.contains(&(SourceState::Uncertain, DestinationState::Running)));
        assert!(ends.contains(&(SourceState::Kept, DestinationState::Uncertain)));
        assert!(seen.len() > 50, "{} worlds", seen.len());
    }

    #[test]
    fn nonsense_is_refused_without_moving() {
        let mut source = SourceHandover::default();
        let prepared = |attempt| SourceInput::Prepared { attempt };
        assert_eq!(source.handle(prepared(1)), SourceAction::Refuse);
        assert_eq!(source.handle(SourceInput::Resumed), SourceAction::Refuse);
        assert_eq!(source.state(), SourceState::Running);
        source.handle(SourceInput::Paused);
        assert_eq!(source.handle(prepared(2)), SourceAction::Refuse);
        assert_eq!(source.handle(SourceInput::CalledOff), SourceAction::SendCalledOff(1));
        // Too late, and no reason to do anything.
        assert_eq!(source.handle(prepared(1)), SourceAction::Nothing);
        source.handle(SourceInput::Paused);
        assert_eq!(source.handle(prepared(1)), SourceAction::Nothing);
        assert_eq!(source.handle(prepared(2)), SourceAction::SendCommit);
        assert_eq!(source.handle(SourceInput::CalledOff), SourceAction::Refuse);
        let mut destination = DestinationHandover::default();
        assert_eq!(destination.handle(DestinationInput::Commit), DestinationAction::Refuse);
        let called_off = |attempt| DestinationInput::CalledOff { attempt };
        assert_eq!(destination.state(), DestinationState::Receiving);
        let loaded = |attempt| DestinationInput::Loaded { attempt };
        assert_eq!(destination.handle(loaded(1)), DestinationAction::SendPrepared(1));
        assert_eq!(destination.handle(called_off(2)), DestinationAction::Refuse);
        assert_eq!(destination.handle(called_off(1)), DestinationAction::Nothing);
        assert_eq!(destination.handle(DestinationInput::Commit), DestinationAction::Refuse);
        assert_eq!(destination.handle(loaded(1)), DestinationAction::Refuse);
        assert_eq!(destination.handle(loaded(2)), DestinationAction::SendPrepared(2));
    }
}
