//! The source's half.

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
