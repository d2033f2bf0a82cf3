//! Where a migration stands, what is seen of what remains, and what follows: the decision as tables.
//!
//! # Where it stands
//!
//! What was tried so far, and whether there is time left:
//!
//! ```text
//!               called off               time
//!   Untried ────────────────▶ BackingOff ─────▶ Retrying
//!      │                        │  ▲               │  │
//!      │                        │  └─ called off ──┘  │
//!      │ deadline, last round   │                     │ deadline, last round
//!      ▼            called off  ▼                     ▼
//!   LastTry ───────────────────────▶ Over ◀───────────┘
//! ```
//!
//! A host that moves the deadline brings it back.
//!
//! # What is seen, and the next step
//!
//! It is asked twice. After a round pages are still under way, and what may fit is approached: all is let land
//! and harvested once more. Then it is asked on the exact count.
//!
//! | seen | asked | Untried | BackingOff | Retrying | LastTry | Over |
//! |---|---|---|---|---|---|---|
//! | Unknown | after a round | Iterate | Iterate | Iterate | GiveUp | GiveUp |
//! | Unknown | on the count | Iterate | Iterate | Iterate | Iterate | Iterate |
//! | Fits | after a round | Approach | Iterate | Approach | Approach | GiveUp |
//! | Fits | on the count | SwitchOver | SwitchOver | SwitchOver | SwitchOver | SwitchOver |
//! | Close | either | Embolden | Iterate | Embolden | GiveUp | GiveUp |
//! | Far | either | Iterate | Iterate | Hope | GiveUp | GiveUp |
//! | Unseen | either | Iterate | Iterate | Hope | GiveUp | GiveUp |
//! | Glimpsed | either | Iterate | Iterate | Hope | GiveUp | GiveUp |
//! | Stuck | either | Iterate | Iterate | Hope | GiveUp | GiveUp |
//!
//! Where the step would not be to approach, nobody asks whether it fits, and it is seen as what it is beside that:
//! Close as a rule. Whoever was approached is switched over if it fits, whatever the time is by now. Of a guest of
//! nothing but zeros nothing is known until it writes; if that is between a round and the count, it gets another
//! round, which tells.
//!
//! # Whether it will converge
//!
//! What is seen tells of that too, round by round:
//!
//! | seen | Open | HopelessOnce | Hopeless |
//! |---|---|---|---|
//! | Unknown | Open | HopelessOnce | Hopeless |
//! | Fits | Open | HopelessOnce | Hopeless |
//! | Close | Open | Open | Open |
//! | Far | Open | Open | Open |
//! | Unseen | Open | Open | Open |
//! | Glimpsed | Open | Open | Open |
//! | Stuck | HopelessOnce | Hopeless | Hopeless |
//!
//! and the policy has the last word wherever there is to be another round:
//!
//! | prospect | KeepTrying | Throttle | PostCopy | GiveUp |
//! |---|---|---|---|---|
//! | Open | Iterate | Iterate | Iterate | Iterate |
//! | HopelessOnce | Iterate | SlowDown | Iterate | Iterate |
//! | Hopeless | Iterate | SlowDown | PostCopy | GiveUp |
//!
//! `docs/convergence.md` has for each cell what it is for, by simulations with another step there.

use super::policy::Policy;

/// What was tried so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    /// No switchover was called off.
    Untried,
    /// One was, and the next must wait.
    BackingOff,
    /// One was, and another may be tried.
    Retrying,
    /// No switchover was called off, and the time is over: what fits still leaves.
    LastTry,
    /// One was, and the time is over. What was called off is not tried for ever.
    Over,
}

impl Stage {
    pub(super) fn of(called_off: bool, backs_off: bool, time_is_over: bool) -> Self {
        match (called_off, time_is_over) {
            (false, false) => Self::Untried,
            (false, true) => Self::LastTry,
            (true, false) if backs_off => Self::BackingOff,
            (true, false) => Self::Retrying,
            (true, true) => Self::Over,
        }
    }
}

/// When it is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Asked {
    /// Pages are still under way.
    AfterRound,
    /// Everything has landed and was harvested.
    OnCount,
}

/// What is seen of the pages that remain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Sight {
    /// Nothing has landed yet, and nothing can be predicted.
    Unknown,
    /// Below the limit by its uncertainties, with what must follow the commit.
    Fits,
    /// Expected to be below the limit, and not by its uncertainties.
    Close,
    /// Over the limit, and rounds get shorter, or it is too early to tell.
    Far,
    /// Over the limit for good, by what a bandwidth limit lets through. Nobody has seen the link without, and
    /// more may be assumed of it: only a switchover can tell.
    Unseen,
    /// Over the limit for good, by what nothing but switchovers that were called off have shown of the link.
    Glimpsed,
    /// Over the limit for good: rounds get no shorter, or where that ends is over it.
    Stuck,
}

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// Another round, unless the policy wants something else.
    Iterate,
    /// The same, and a little less caution in the next: what is waited for may never come, and the bound holds
    /// anyway.
    Embolden,
    /// The same, and hoping that the last switchover had bad luck: only another one can tell.
    Hope,
    /// All is let land, harvested and counted.
    Approach,
    /// The guest is paused.
    SwitchOver,
    /// The guest stays.
    GiveUp,
}

/// What follows from what is seen where.
pub(super) fn step(seen: Sight, asked: Asked, stage: Stage) -> Step {
    use Step::{Approach, Embolden, GiveUp, Hope, Iterate, SwitchOver};
    let [untried, backing_off, retrying, last_try, over] = match (seen, asked) {
        (Sight::Unknown, Asked::AfterRound) => [Iterate, Iterate, Iterate, GiveUp, GiveUp],
        (Sight::Unknown, Asked::OnCount) => [Iterate; 5],
        (Sight::Fits, Asked::AfterRound) => [Approach, Iterate, Approach, Approach, GiveUp],
        (Sight::Fits, Asked::OnCount) => [SwitchOver; 5],
        (Sight::Close, _) => [Embolden, Iterate, Embolden, GiveUp, GiveUp],
        (Sight::Far, _) => [Iterate, Iterate, Hope, GiveUp, GiveUp],
        (Sight::Unseen, _) => [Iterate, Iterate, Hope, GiveUp, GiveUp],
        (Sight::Glimpsed, _) => [Iterate, Iterate, Hope, GiveUp, GiveUp],
        (Sight::Stuck, _) => [Iterate, Iterate, Hope, GiveUp, GiveUp],
    };
    match stage {
        Stage::Untried => untried,
        Stage::BackingOff => backing_off,
        Stage::Retrying => retrying,
        Stage::LastTry => last_try,
        Stage::Over => over,
    }
}

/// Whether it will converge, by the last rounds. One that says no may be wrong, two in a row are believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Prospect {
    /// It may.
    Open,
    /// The last round said that it will not.
    HopelessOnce,
    /// So did the one before.
    Hopeless,
}

impl Prospect {
    /// After a round of which that is seen.
    pub(super) fn after(self, seen: Sight) -> Self {
        use Prospect::{Hopeless, HopelessOnce, Open};
        let [open, once, hopeless] = match seen {
            Sight::Unknown | Sight::Fits => [Open, HopelessOnce, Hopeless],
            Sight::Close | Sight::Far | Sight::Unseen | Sight::Glimpsed => [Open; 3],
            Sight::Stuck => [HopelessOnce, Hopeless, Hopeless],
        };
        match self {
            Open => open,
            HopelessOnce => once,
            Hopeless => hopeless,
        }
    }
}

/// What becomes of another round by the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Consequence {
    Iterate,
    /// The same with a slower guest, where that is of use.
    SlowDown,
    PostCopy,
    GiveUp,
}

/// What a policy makes of a prospect.
pub(super) fn consequence(prospect: Prospect, policy: Policy) -> Consequence {
    use Consequence::{GiveUp, Iterate, PostCopy, SlowDown};
    let [open, once, hopeless] = match policy {
        Policy::KeepTrying => [Iterate, Iterate, Iterate],
        Policy::Throttle(_) => [Iterate, SlowDown, SlowDown],
        Policy::PostCopy => [Iterate, Iterate, PostCopy],
        Policy::GiveUp => [Iterate, Iterate, GiveUp],
    };
    match prospect {
        Prospect::Open => open,
        Prospect::HopelessOnce => once,
        Prospect::Hopeless => hopeless,
    }
}

#[cfg(test)]
mod tests;
