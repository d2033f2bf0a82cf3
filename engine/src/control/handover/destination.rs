//! The destination's half.

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
    /// The source is back on another link.
    Returned {
        /// How many switchovers it has begun.
        attempt: u32,
        /// Whether it has committed by the last of them. If not, all are called off.
        committed: bool,
    },
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
    /// Forget the device state that was loaded: the guest goes on at the source.
    Unload,
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
            (S::Receiving, I::Returned { attempt, committed: false })
                if attempt >= self.attempt =>
            {
                self.attempt = attempt;
                (S::Receiving, A::Nothing)
            }
            (S::Prepared, I::Returned { attempt, committed: false }) if attempt >= self.attempt => {
                self.attempt = attempt;
                (S::Receiving, A::Unload)
            }
            (S::Prepared, I::Returned { attempt, committed: true }) if attempt == self.attempt => {
                (S::Owner, A::ResumeGuest)
            }
            (S::Running, I::Returned { attempt, committed: true }) if attempt == self.attempt => {
                (S::Running, A::SendResumed)
            }
            (S::GaveBack, I::Returned { attempt, committed: true }) if attempt == self.attempt => {
                (S::GaveBack, A::SendGaveBack)
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
