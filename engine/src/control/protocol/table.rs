//! The control protocol as one table: who may say what, and when.
//!
//! The two sides do not see the same order: what one says crosses what the other says. Two facts make
//! one table do for both. The source alone moves on from *copying* to the commit; and the destination
//! answers questions (ping, verify, prepare) in the order they were asked, also those of a switchover
//! that the source has called off meanwhile.

use std::fmt::{self, Write as _};

use super::kind::{Kind, Side};

/// How far a conversation has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stage {
    /// Nothing was said.
    Silence,
    /// The source has greeted.
    Greeted,
    /// The source has come back, on a link after the first.
    Returned,
    /// The destination has answered.
    Welcomed,
    /// Both register guest memory.
    Registering,
    /// The destination still does.
    SourceRegistered,
    /// The source still does.
    DestinationRegistered,
    /// Data channels are being opened.
    Opening,
    /// The source is to say where there is data.
    Mapping,
    /// Rounds over a running guest.
    Copying,
    /// A switchover began: the last pages.
    Switching,
    /// Both take the digest of memory.
    Comparing,
    /// The destination has said its digest.
    Answered,
    /// Memory is equal.
    Compared,
    /// Device state is on its way.
    Saving,
    /// The destination loads it.
    Loading,
    /// All is loaded.
    Prepared,
    /// The guest is the destination's.
    Committed,
    /// The destination has said what became of the guest.
    Told,
    /// All was said.
    Over,
}

impl Stage {
    /// All of them, in the order of a migration without trouble.
    pub const ALL: [Self; 20] = [
        Self::Silence,
        Self::Greeted,
        Self::Returned,
        Self::Welcomed,
        Self::Registering,
        Self::SourceRegistered,
        Self::DestinationRegistered,
        Self::Opening,
        Self::Mapping,
        Self::Copying,
        Self::Switching,
        Self::Comparing,
        Self::Answered,
        Self::Compared,
        Self::Saving,
        Self::Loading,
        Self::Prepared,
        Self::Committed,
        Self::Told,
        Self::Over,
    ];
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Silence => "silence",
            Self::Greeted => "greeted",
            Self::Returned => "returned",
            Self::Welcomed => "welcomed",
            Self::Registering => "registering",
            Self::SourceRegistered => "source registered",
            Self::DestinationRegistered => "destination registered",
            Self::Opening => "opening",
            Self::Mapping => "mapping",
            Self::Copying => "copying",
            Self::Switching => "switching",
            Self::Comparing => "comparing",
            Self::Answered => "answered",
            Self::Compared => "compared",
            Self::Saving => "saving",
            Self::Loading => "loading",
            Self::Prepared => "prepared",
            Self::Committed => "committed",
            Self::Told => "told",
            Self::Over => "over",
        })
    }
}

/// What one side may say: in which stages, and which one follows.
pub(super) struct Row {
    pub(super) kind: Kind,
    pub(super) by: Side,
    pub(super) moves: &'static [(Stage, Stage)],
    /// What must hold beyond that, for people; [`Conversation`](super::Conversation) holds it.
    pub(super) rule: &'static str,
}

macro_rules! row {
    ($kind:ident, $by:ident, [$($from:ident => $to:ident),+], $rule:literal) => {
        Row {
            kind: Kind::$kind,
            by: Side::$by,
            moves: &[$((Stage::$from, Stage::$to)),+],
            rule: $rule,
        }
    };
}

/// The protocol.
#[rustfmt::skip]
pub(super) const TABLE: &[Row] = &[
    row!(Hello, Source, [Silence => Greeted], "on the first link of a migration"),
    row!(Rejoin, Source, [Silence => Returned], "on a later link"),
    row!(Rejoined, Destination, [Returned => Registering],
        "of that epoch; *committed* follows if the source has committed; ranges as in *data ranges*"),
    row!(Welcome, Destination, [Greeted => Welcomed],
        "the digest of the greeting is the source's own"),
    row!(Agreed, Source, [Welcomed => Registering],
        "the digest of the greeting is the destination's own"),
    row!(Registered, Source,
        [Registering => SourceRegistered, DestinationRegistered => Opening], ""),
    row!(Registered, Destination,
        [Registering => DestinationRegistered, SourceRegistered => Opening], ""),
    row!(Ready, Destination, [Opening => Copying],
        "*mapping* follows if the welcome wants data ranges"),
    row!(DataRanges, Source, [Mapping => Copying],
        "inside guest memory, ascending, none over another, none empty"),
    row!(Round, Source, [Copying => Copying, Switching => Switching],
        "1, 2, 3 …, of no more pages than the guest has"),
    row!(Ping, Source, [Copying => Copying, Switching => Switching],
        "1, 2, 3 …; the one before was answered"),
    row!(Pong, Destination,
        [Copying => Copying, Switching => Switching, Comparing => Comparing, Saving => Saving,
         Loading => Loading],
        "what was asked first and is unanswered is this ping"),
    row!(CloseChannel, Source, [Copying => Copying, Switching => Switching],
        "one of the channels, once; never all of them"),
    row!(ChannelClosed, Destination,
        [Mapping => Mapping, Copying => Copying, Switching => Switching, Comparing => Comparing,
         Answered => Answered, Compared => Compared, Saving => Saving, Loading => Loading],
        "one of the channels, once; never the last"),
    row!(Switchover, Source, [Copying => Switching], "1, 2, 3 …; after a round"),
    row!(Verify, Source, [Switching => Comparing],
        "of this switchover; agreed on in the greeting"),
    row!(Verified, Destination,
        [Comparing => Answered, Copying => Copying, Switching => Switching],
        "what was asked first and is unanswered is this; the stage stays if it was called off"),
    row!(Compared, Source, [Answered => Compared], "of this switchover"),
    row!(StateChunk, Source, [Switching => Saving, Compared => Saving, Saving => Saving],
        "not empty; 256 MiB in all; if agreed on, only once memory was compared"),
    row!(Prepare, Source, [Switching => Loading, Compared => Loading, Saving => Loading],
        "of this switchover, and all its device state was sent; if agreed on, only once memory was \
         compared; a checksum for each chunk of pages if those were agreed on, else samples inside guest memory"),
    row!(Prepared, Destination,
        [Loading => Prepared, Copying => Copying, Switching => Switching, Comparing => Comparing,
         Saving => Saving],
        "what was asked first and is unanswered is this; the stage stays if it was called off or pages are damaged; both lists of \
         ranges as in *data ranges*, damaged ones only if checksums were agreed on and nothing was loaded"),
    row!(CalledOff, Source,
        [Switching => Copying, Comparing => Copying, Answered => Copying, Compared => Copying,
         Saving => Copying, Loading => Copying, Prepared => Copying],
        "of this switchover"),
    row!(Releasing, Source, [Prepared => Prepared], ""),
    row!(Commit, Source, [Prepared => Committed], ""),
    row!(Resumed, Destination, [Committed => Told], ""),
    row!(GaveBack, Destination, [Committed => Told], ""),
    row!(Heard, Source, [Told => Over], ""),
    row!(Failed, Source,
        [Silence => Silence, Greeted => Greeted, Returned => Returned, Welcomed => Welcomed, Registering => Registering,
         SourceRegistered => SourceRegistered, DestinationRegistered => DestinationRegistered,
         Opening => Opening, Mapping => Mapping, Copying => Copying, Switching => Switching,
         Comparing => Comparing, Answered => Answered, Compared => Compared, Saving => Saving,
         Loading => Loading, Prepared => Prepared],
        "its last word; not if it came back and has committed"),
    row!(Failed, Destination,
        [Silence => Silence, Greeted => Greeted, Returned => Returned, Welcomed => Welcomed, Registering => Registering,
         SourceRegistered => SourceRegistered, DestinationRegistered => DestinationRegistered,
         Opening => Opening, Mapping => Mapping, Copying => Copying, Switching => Switching,
         Comparing => Comparing, Answered => Answered, Compared => Compared, Saving => Saving,
         Loading => Loading, Prepared => Prepared, Committed => Committed],
        "its last word"),
];

/// The table as `docs/protocol.md` has it.
pub fn table() -> String {
    let mut text = String::from("| message | by | stage | rule |\n|---|---|---|---|\n");
    for Row { kind, by, moves, rule } in TABLE {
        let moves: Vec<_> = moves
            .iter()
            .map(|(from, to)| if from == to { from.to_string() } else { format!("{from} → {to}") })
            .collect();
        let rule = if rule.is_empty() { String::new() } else { format!(" {rule}") };
        // Writing to a string does not fail.
        let _ = writeln!(text, "| {kind} | {by} | {} |{rule} |", moves.join(", "));
    }
    text
}

/// The stage that follows by the table alone, if there is one.
pub(super) fn follows(kind: Kind, by: Side, stage: Stage) -> Option<Stage> {
    let row = TABLE.iter().find(|row| row.kind == kind && row.by == by)?;
    row.moves.iter().find(|(from, _)| *from == stage).map(|(_, to)| *to)
}
