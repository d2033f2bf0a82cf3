//! The kinds of messages: their numbers on the wire, and their names.

use std::fmt;

/// A side of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// Where the guest comes from.
    Source,
    /// Where it goes.
    Destination,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// Which message it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
#[expect(missing_docs, reason = "each is a variant of `Message`")]
pub enum Kind {
    Hello = 1,
    Welcome = 2,
    Ready = 3,
    Round = 4,
    StateChunk = 5,
    Prepare = 6,
    Prepared = 7,
    Commit = 8,
    Resumed = 9,
    GaveBack = 10,
    Failed = 11,
    ChannelClosed = 12,
    DataRanges = 13,
    Agreed = 14,
    Registered = 15,
    CloseChannel = 16,
    Releasing = 17,
    Ping = 20,
    Pong = 21,
    CalledOff = 22,
    Verify = 23,
    Verified = 24,
    Switchover = 25,
    Compared = 26,
    Rejoin = 27,
    Rejoined = 28,
    Heard = 29,
}

impl Kind {
    /// All of them, by their numbers.
    pub const ALL: [Self; 27] = [
        Self::Hello,
        Self::Welcome,
        Self::Ready,
        Self::Round,
        Self::StateChunk,
        Self::Prepare,
        Self::Prepared,
        Self::Commit,
        Self::Resumed,
        Self::GaveBack,
        Self::Failed,
        Self::ChannelClosed,
        Self::DataRanges,
        Self::Agreed,
        Self::Registered,
        Self::CloseChannel,
        Self::Releasing,
        Self::Ping,
        Self::Pong,
        Self::CalledOff,
        Self::Verify,
        Self::Verified,
        Self::Switchover,
        Self::Compared,
        Self::Rejoin,
        Self::Rejoined,
        Self::Heard,
    ];

    /// The kind of that number.
    pub fn of(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == number)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Hello => "hello",
            Self::Welcome => "welcome",
            Self::Ready => "ready",
            Self::Round => "round",
            Self::StateChunk => "state chunk",
            Self::Prepare => "prepare",
            Self::Prepared => "prepared",
            Self::Commit => "commit",
            Self::Resumed => "resumed",
            Self::GaveBack => "gave back",
            Self::Failed => "failed",
            Self::ChannelClosed => "channel closed",
            Self::DataRanges => "data ranges",
            Self::Agreed => "agreed",
            Self::Registered => "registered",
            Self::CloseChannel => "close channel",
            Self::Releasing => "releasing",
            Self::Ping => "ping",
            Self::Pong => "pong",
            Self::CalledOff => "called off",
            Self::Verify => "verify",
            Self::Verified => "verified",
            Self::Switchover => "switchover",
            Self::Compared => "compared",
            Self::Rejoin => "rejoin",
            Self::Rejoined => "rejoined",
            Self::Heard => "heard",
        })
    }
}
