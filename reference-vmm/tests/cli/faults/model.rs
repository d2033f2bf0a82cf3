//! What may happen to a migration, and what has to become of it then.

use std::collections::BTreeMap;
use std::fmt;

use pageferry::protocol::Message;

/// Where the two sides themselves have to be told of faults.
pub(super) const RDMA: &str = "rdma";

/// Where something goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    ToDestination,
    ToSource,
}

impl Way {
    /// Which end of a connection that is.
    pub(super) fn towards(self) -> usize {
        match self {
            Self::ToSource => 0,
            Self::ToDestination => 1,
        }
    }
}

/// A message of a migration, in the order in which they come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Step {
    Hello,
    Welcome,
    Agreed,
    SourceRegistered,
    DestinationRegistered,
    Ready,
    FirstRound,
    Ping,
    Pong,
    /// Of a link in place of one that was cut.
    Rejoin,
    Rejoined,
    Switchover,
    LastRound,
    Verify,
    Verified,
    Compared,
    State,
    Prepare,
    Prepared,
    Commit,
    /// Of a link in place of one that was cut at the commit, which is lost.
    RejoinCommitted,
    RejoinedCommitted,
    Resumed,
    Heard,
}

impl Step {
    pub(super) const ALL: [Self; 24] = [
        Self::Hello,
        Self::Welcome,
        Self::Agreed,
        Self::SourceRegistered,
        Self::DestinationRegistered,
        Self::Ready,
        Self::FirstRound,
        Self::Ping,
        Self::Pong,
        Self::Rejoin,
        Self::Rejoined,
        Self::Switchover,
        Self::LastRound,
        Self::Verify,
        Self::Verified,
        Self::Compared,
        Self::State,
        Self::Prepare,
        Self::Prepared,
        Self::Commit,
        Self::RejoinCommitted,
        Self::RejoinedCommitted,
        Self::Resumed,
        Self::Heard,
    ];

    /// At which step the link has to be cut for this one to come.
    pub(super) fn needs_a_cut_at(self) -> Option<Self> {
        match self {
            Self::Rejoin | Self::Rejoined => Some(Self::Ping),
            Self::RejoinCommitted | Self::RejoinedCommitted => Some(Self::Commit),
            _ => None,
        }
    }

    pub(super) fn way(self) -> Way {
        match self {
            Self::Welcome
            | Self::DestinationRegistered
            | Self::Ready
            | Self::Pong
            | Self::Rejoined
            | Self::Verified
            | Self::Prepared
            | Self::RejoinedCommitted
            | Self::Resumed => Way::ToSource,
            _ => Way::ToDestination,
        }
    }

    /// Whether it is this message, which follows that one on its way.
    pub(super) fn is(self, before: Option<&Message>, message: &Message) -> bool {
        match self {
            Self::Hello => matches!(message, Message::Hello(_)),
            Self::Welcome => matches!(message, Message::Welcome(_)),
            Self::Agreed => matches!(message, Message::Agreed { .. }),
            Self::SourceRegistered | Self::DestinationRegistered => {
                matches!(message, Message::Registered)
            }
            Self::Ready => matches!(message, Message::Ready),
            Self::FirstRound => matches!(message, Message::Round { .. }),
            Self::Ping => matches!(message, Message::Ping { .. }),
            Self::Pong => matches!(message, Message::Pong { .. }),
            Self::Rejoin => matches!(message, Message::Rejoin(rejoin) if !rejoin.committed),
            Self::RejoinCommitted => {
                matches!(message, Message::Rejoin(rejoin) if rejoin.committed)
            }
            Self::Rejoined | Self::RejoinedCommitted => matches!(message, Message::Rejoined(_)),
            Self::Switchover => matches!(message, Message::Switchover { .. }),
            Self::LastRound => {
                matches!(before, Some(Message::Switchover { .. }))
                    && matches!(message, Message::Round { .. })
            }
            Self::Verify => matches!(message, Message::Verify { .. }),
            Self::Verified => matches!(message, Message::Verified { .. }),
            Self::Compared => matches!(message, Message::Compared { .. }),
            Self::State => matches!(message, Message::StateChunk(_)),
            Self::Prepare => matches!(message, Message::Prepare(_)),
            Self::Prepared => matches!(message, Message::Prepared(_)),
            Self::Commit => matches!(message, Message::Commit),
            Self::Resumed => matches!(message, Message::Resumed { .. }),
            Self::Heard => matches!(message, Message::Heard),
        }
    }
}

/// What happens at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    SourceKilled,
    DestinationKilled,
    /// By SIGSTOP, until the other side has given up.
    SourceStopped,
    DestinationStopped,
    ControlReset,
    DataReset,
    /// Nothing passes this way any more.
    BlackHole(Way),
    BlackHoles,
    /// The control connection ends in order, one way only: that of the message.
    HalfClosed,
    /// A bit of the message.
    Flipped,
    /// All is cut, and comes back a second later.
    BackInTime,
    /// All is cut, and stays so.
    BackTooLate,
}

impl Fault {
    pub(super) const ALL: [Self; 13] = [
        Self::SourceKilled,
        Self::DestinationKilled,
        Self::SourceStopped,
        Self::DestinationStopped,
        Self::ControlReset,
        Self::DataReset,
        Self::BlackHole(Way::ToDestination),
        Self::BlackHole(Way::ToSource),
        Self::BlackHoles,
        Self::HalfClosed,
        Self::Flipped,
        Self::BackInTime,
        Self::BackTooLate,
    ];

    /// Whether the message still arrives; at a side that has stopped, when it goes on.
    pub(super) fn delivers(self, way: Way) -> bool {
        match self {
            Self::SourceKilled
            | Self::SourceStopped
            | Self::DestinationKilled
            | Self::DestinationStopped
            | Self::DataReset => true,
            Self::BlackHole(blocked) => blocked != way,
            _ => false,
        }
    }

    /// Whether the two sides find each other again.
    fn passes(self) -> bool {
        matches!(
            self,
            Self::ControlReset
                | Self::DataReset
                | Self::HalfClosed
                | Self::Flipped
                | Self::BackInTime
        )
    }
}

/// How a side ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Killed,
    /// A destination that nobody has come to so far.
    Waits,
    /// The guest runs at the source.
    AtSource,
    /// It runs at the destination.
    AtDestination,
    Uncertain,
}

/// One case: a step, and what happens at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) step: Step,
    pub(super) fault: Fault,
    pub(super) transport: &'static str,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {:?} over {}", self.fault, self.step, self.transport)
    }
}

impl Case {
    /// All of them.
    pub(super) fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for transport in ["tcp", "iouring"] {
            for step in Step::ALL {
                for fault in Fault::ALL {
                    // There are none before.
                    if fault != Fault::DataReset || step >= Step::FirstRound {
                        all.push(Self { step, fault, transport });
                    }
                }
            }
        }
        all
    }

    /// Whether the two may end so. What is left open is a matter of time: who is held up for longer than the
    /// other waits may find the decisive word among what it missed, or that time is over.
    pub(super) fn may_end(self, source: End, destination: End) -> bool {
        let one_guest = match (source, destination) {
            (End::AtSource, End::AtDestination) => false,
            (End::AtDestination, other) => matches!(other, End::AtDestination | End::Killed),
            _ => true,
        };
        let may_end = |delivered| {
            self.source_ends(delivered).contains(&source)
                && self.destination_ends(delivered).contains(&destination)
        };
        one_guest && (may_end(self.delivered()) || (self.may_be_lost() && may_end(false)))
    }

    /// Whether the message may be lost that is delivered otherwise: what a process has posted dies with its queue pair.
    fn may_be_lost(self) -> bool {
        let by_who_sends = match self.step.way() {
            Way::ToDestination => Fault::SourceKilled,
            Way::ToSource => Fault::DestinationKilled,
        };
        self.transport == RDMA && self.fault == by_who_sends
    }

    pub(super) fn source_ends(self, delivered: bool) -> Vec<End> {
        let (step, fault) = (self.step, self.fault);
        let told = step == Step::Heard || (step == Step::Resumed && delivered);
        match fault {
            Fault::SourceKilled => vec![End::Killed],
            _ if fault.passes() && step >= Step::FirstRound => vec![End::AtDestination],
            // The first link has nothing yet that would be lost with it.
            _ if fault.passes() => vec![End::AtSource],
            _ if told => vec![End::AtDestination],
            Fault::SourceStopped if step >= Step::Commit => {
                vec![End::AtDestination, End::Uncertain]
            }
            // The answer follows it at once.
            _ if step == Step::RejoinedCommitted && delivered => {
                vec![End::AtDestination, End::Uncertain]
            }
            _ if step >= Step::Commit => vec![End::Uncertain],
            // What it says then is the commit.
            _ if step == Step::Prepared && delivered => vec![End::AtSource, End::Uncertain],
            _ => vec![End::AtSource],
        }
    }

    pub(super) fn destination_ends(self, delivered: bool) -> Vec<End> {
        let (step, fault) = (self.step, self.fault);
        let hears_the_commit = match step {
            // One that is lost comes with the link that is made in its place.
            Step::Commit | Step::RejoinCommitted => delivered,
            _ => step > Step::RejoinCommitted,
        };
        let loaded = step >= Step::Prepared || (step == Step::Prepare && delivered);
        match fault {
            Fault::DestinationKilled => vec![End::Killed],
            _ if fault.passes() && step >= Step::FirstRound => vec![End::AtDestination],
            // It was told to end, in whatever state.
            _ if step == Step::Hello => vec![End::Waits],
            // Others may come, as long as nothing of this guest is here.
            _ if step <= Step::Rejoined && !fault.passes() => vec![End::Waits, End::AtSource],
            _ if step < Step::FirstRound => vec![End::Waits, End::AtSource],
            // It waits for that for a while only.
            Fault::DestinationStopped if step == Step::RejoinCommitted => {
                vec![End::AtDestination, End::Uncertain]
            }
            // Also late: it is there when it goes on.
            _ if hears_the_commit => vec![End::AtDestination],
            Fault::DestinationStopped if step >= Step::Prepared => {
                vec![End::AtDestination, End::Uncertain, End::AtSource]
            }
            // What follows without an answer may be out as well; and it may see the end of the link before it has
            // loaded, or what came before that end.
            Fault::DestinationStopped | Fault::SourceKilled | Fault::SourceStopped
                if (Step::Compared..=Step::Prepare).contains(&step) =>
            {
                vec![End::Uncertain, End::AtSource]
            }
            // One way is enough for a source to say that it keeps its guest.
            Fault::BlackHole(Way::ToSource) if loaded => vec![End::Uncertain, End::AtSource],
            _ if loaded => vec![End::Uncertain],
            _ => vec![End::AtSource],
        }
    }

    pub(super) fn delivered(self) -> bool {
        self.fault.delivers(self.step.way())
    }
}

/// What became of the guest by what happened, as in docs/reliability.md.
pub(super) fn table(ends: &[(Case, (End, End))]) -> String {
    let mut rows = BTreeMap::<String, [u32; 5]>::new();
    for (case, ends) in ends {
        let row = rows.entry(format!("{:?}", case.fault)).or_default();
        row[0] += 1;
        row[match ends {
            (End::Uncertain, End::Uncertain) => 4,
            (End::Uncertain, _) | (_, End::Uncertain) => 3,
            (End::AtDestination, _) | (_, End::AtDestination) => 1,
            _ => 2,
        }] += 1;
    }
    let rows = rows.into_iter().map(|(fault, [cases, there, here, one, both])| {
        format!("| {fault} | {cases} | {there} | {here} | {one} | {both} |")
    });
    rows.collect::<Vec<_>>().join("\n")
}
