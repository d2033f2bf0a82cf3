//! One side's account of what was said: what is said next must have a move in the [table](mod@super::table),
//! and keep to its rules.
//!
//! Each side keeps a [`Conversation`] and shows it every message, those it hears and those it says,
//! in the order in which it does. What the table has no move for, or what breaks the rule of its
//! kind, is a [`Refusal`].

use std::collections::VecDeque;

use thiserror::Error;

use super::kind::{Kind, Side};
use super::table::{Stage, follows};
use super::{MAX_DEVICE_STATE_BYTES, Message, PageSample, Prepared};
use crate::pages::digest::Digest;
use crate::pages::memory::{Layout, PageRange, RegionLayout};
use crate::pages::sums::chunk_count;

/// Why a message has no place in a conversation.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[error("{kind} at the stage {stage}: {why}")]
pub struct Refusal {
    /// What it was.
    pub kind: Kind,
    /// Whose it was.
    pub by: Side,
    /// Where the conversation stood.
    pub stage: Stage,
    /// What is wrong with it.
    pub why: Why,
}

/// What is wrong with a message.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Why {
    /// The table has no move for it.
    #[error("not expected there")]
    Stage,
    /// The side had said its last word.
    #[error("said after its last word")]
    Ended,
    /// A number that is not the next one, or not the current one.
    #[error("number {number} where {due} is due")]
    Number {
        /// What it says.
        number: u32,
        /// What would do.
        due: u32,
    },
    /// An answer to what was not asked, or not next.
    #[error("answers what was not asked next")]
    Unasked,
    /// A ping while another is unanswered.
    #[error("another is unanswered")]
    Unanswered,
    /// A switchover before any round.
    #[error("no round was made")]
    NoRound,
    /// More pages than the guest has.
    #[error("{pages} pages of a guest of {all}")]
    Pages {
        /// What it says.
        pages: u64,
        /// What there is.
        all: u64,
    },
    /// No such channel.
    #[error("channel {channel} of {channels}")]
    Channel {
        /// What it says.
        channel: u16,
        /// How many there are.
        channels: u16,
    },
    /// The side has named the channel before.
    #[error("channel {0} was named before")]
    ChannelTwice(u16),
    /// The last channel cannot be done without.
    #[error("channel {0} is the last one")]
    LastChannel(u16),
    /// Ranges that are not ascending and disjoint, or leave guest memory.
    #[error("ranges that are empty, out of order, over one another or outside guest memory")]
    Ranges,
    /// Verification was not agreed on.
    #[error("verification was not agreed on")]
    NotAgreed,
    /// Verification was agreed on, and memory was not compared.
    #[error("memory was not compared, as was agreed")]
    NotCompared,
    /// Device state of no bytes, or of too many.
    #[error("device state of {0} bytes")]
    StateBytes(u64),
    /// The greeting was heard otherwise than it was said.
    #[error("the greeting was heard otherwise than it was said")]
    Greeting,
    /// A migration begins on a link after its first.
    #[error("the migration has begun on another link")]
    NotFirst,
    /// A source comes back, and its migration did not begin here.
    #[error("no migration is known here that it could come back to")]
    Unknown,
    /// A source has committed, and gives up.
    #[error("it has committed")]
    Committed,
    /// Checksums of pages that were not agreed on, or of another number of chunks.
    #[error("{0} checksums of pages")]
    Sums(usize),
    /// Damaged pages where none were looked for, or something was loaded all the same.
    #[error("pages that cannot be known to be damaged, or were loaded over")]
    Damaged,
    /// An answer to the return of another epoch.
    #[error("epoch {epoch} where {asked} was asked for")]
    Epoch {
        /// What it says.
        epoch: u32,
        /// What the source said.
        asked: u32,
    },
}

/// What the destination owes an answer to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Question {
    Ping(u32),
    Verify(u32),
    Prepare(u32),
}

/// One side's account of a conversation. Pure: knows no channel and no clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation {
    stage: Stage,
    /// What the greeting settled, once there is one.
    greeting: Option<Greeting>,
    /// Number of the link, and whether the source had committed when it came back on it.
    epoch: u32,
    committed: bool,
    rounds: u32,
    pings: u32,
    switchovers: u32,
    state_bytes: u64,
    /// Channels that the source wants closed, and those that the destination has closed.
    unwanted: Vec<u16>,
    closed: Vec<u16>,
    /// Unanswered, in the order asked.
    questions: VecDeque<Question>,
    source_ended: bool,
    destination_ended: bool,
}

/// What was said in the greeting, as far as it matters later.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Greeting {
    layout: Layout,
    channels: u16,
    verify: bool,
    page_sums: bool,
    wants_data_ranges: bool,
    /// Of the hello, then of hello and welcome.
    digest: Digest,
}

impl Default for Conversation {
    fn default() -> Self {
        Self {
            stage: Stage::Silence,
            greeting: None,
            epoch: 0,
            committed: false,
            rounds: 0,
            pings: 0,
            switchovers: 0,
            state_bytes: 0,
            unwanted: Vec::new(),
            closed: Vec::new(),
            questions: VecDeque::new(),
            source_ended: false,
            destination_ended: false,
        }
    }
}

impl Conversation {
    /// One on the next link of the same migration, where nothing was said yet.
    #[must_use]
    pub fn on_next_link(&self) -> Self {
        let greeting = self.greeting.clone();
        // They were said, or do without.
        let greeting = greeting.map(|greeting| Greeting { wants_data_ranges: false, ..greeting });
        Self { greeting, ..Self::default() }
    }

    /// Where it stands.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Whether a side has said its last word.
    pub fn has_ended(&self, by: Side) -> bool {
        match by {
            Side::Source => self.source_ended,
            Side::Destination => self.destination_ended,
        }
    }

    /// Takes note of a message, unless it has no place here: then nothing changes.
    pub fn take(&mut self, by: Side, message: &Message) -> Result<(), Refusal> {
        let (kind, stage) = (message.kind(), self.stage);
        let refusal = |why| Refusal { kind, by, stage, why };
        if self.has_ended(by) {
            return Err(refusal(Why::Ended));
        }
        let next = follows(kind, by, stage).ok_or_else(|| refusal(Why::Stage))?;
        if self.committed && (kind, by) == (Kind::Failed, Side::Source) {
            return Err(refusal(Why::Committed));
        }
        self.check(message).map_err(refusal)?;
        self.stage = next;
        self.note(by, message, stage);
        Ok(())
    }

    /// The rules of the table.
    fn check(&self, message: &Message) -> Result<(), Why> {
        match message {
            Message::Welcome(welcome) => {
                let digest = self.greeting.as_ref().map(|greeting| welcome.digest(greeting.digest));
                require(digest == Some(welcome.greeting), Why::Greeting)
            }
            Message::Agreed { greeting } => {
                let digest = self.greeting.as_ref().map(|greeting| greeting.digest);
                require(digest == Some(*greeting), Why::Greeting)
            }
            Message::Rejoined(rejoined) => {
                let (epoch, asked) = (rejoined.epoch, self.epoch);
                require(epoch == asked, Why::Epoch { epoch, asked })?;
                require(self.are_in_order(&rejoined.written), Why::Ranges)
            }
            Message::DataRanges(ranges) => require(self.are_in_order(ranges), Why::Ranges),
            Message::Round { round, dirty_pages } => {
                next(*round, self.rounds)?;
                let all = self.pages();
                require(*dirty_pages <= all, Why::Pages { pages: *dirty_pages, all })
            }
            Message::Ping { number } => {
                next(*number, self.pings)?;
                let asked = |question: &Question| matches!(question, Question::Ping(_));
                require(!self.questions.iter().any(asked), Why::Unanswered)
            }
            Message::Pong { number } => self.answers(Question::Ping(*number)),
            // The destination may have closed it, or another one: what it said is on its way.
            Message::CloseChannel { channel } => self.may_close(*channel, &self.unwanted),
            Message::ChannelClosed { channel } => self.may_close(*channel, &self.closed),
            Message::Switchover { attempt } => {
                next(*attempt, self.switchovers)?;
                require(self.rounds > 0, Why::NoRound)
            }
            Message::Verify { attempt } => {
                self.is_current(*attempt)?;
                require(self.verifies(), Why::NotAgreed)
            }
            Message::Verified { attempt, .. } => self.answers(Question::Verify(*attempt)),
            Message::Compared { attempt, .. } | Message::CalledOff { attempt } => {
                self.is_current(*attempt)
            }
            Message::StateChunk(chunk) => {
                self.is_compared()?;
                let state_bytes = self.state_bytes + chunk.len() as u64;
                let fits = !chunk.is_empty() && state_bytes <= MAX_DEVICE_STATE_BYTES;
                require(fits, Why::StateBytes(state_bytes))
            }
            Message::Prepare(prepare) => {
                self.is_compared()?;
                self.is_current(prepare.attempt)?;
                let complete = prepare.state_bytes == self.state_bytes;
                require(complete, Why::StateBytes(prepare.state_bytes))?;
                let sums = prepare.sums.len();
                require(sums == self.chunks(), Why::Sums(sums))?;
                let sampled = |sample: &PageSample| PageRange {
                    region: sample.region,
                    first_page: sample.page,
                    pages: 1,
                };
                let inside = |sample| self.are_in_order(&[sampled(sample)]);
                require(prepare.samples.iter().all(inside), Why::Ranges)?;
                require(sums == 0 || prepare.samples.is_empty(), Why::Sums(sums))
            }
            Message::Prepared(prepared) => {
                self.answers(Question::Prepare(prepared.attempt))?;
                require(self.are_in_order(&prepared.written), Why::Ranges)?;
                require(self.are_in_order(&prepared.damaged), Why::Ranges)?;
                let found = !prepared.damaged.is_empty();
                require(!found || (self.chunks() > 0 && prepared.written.is_empty()), Why::Damaged)
            }
            Message::Hello(_) => require(self.greeting.is_none(), Why::NotFirst),
            Message::Rejoin(_) => require(self.greeting.is_some(), Why::Unknown),
            Message::Registered
            | Message::Ready
            | Message::Releasing
            | Message::Commit
            | Message::Resumed { .. }
            | Message::GaveBack { .. }
            | Message::Heard
            | Message::Failed { .. } => Ok(()),
        }
    }

    /// What follows from a message that was accepted at the stage `before`.
    fn note(&mut self, by: Side, message: &Message, before: Stage) {
        match message {
            Message::Hello(hello) => {
                self.greeting = Some(Greeting {
                    layout: hello.layout.clone(),
                    channels: hello.channels,
                    verify: hello.verify,
                    page_sums: hello.page_sums,
                    wants_data_ranges: false,
                    digest: hello.digest(),
                });
            }
            Message::Welcome(welcome) => {
                if let Some(greeting) = &mut self.greeting {
                    greeting.wants_data_ranges = welcome.wants_data_ranges;
                    greeting.digest = welcome.confirmation(greeting.digest);
                }
            }
            Message::Rejoin(rejoin) => {
                self.epoch = rejoin.epoch;
                self.committed = rejoin.committed;
                self.rounds = rejoin.rounds;
                self.switchovers = rejoin.switchovers;
            }
            Message::Rejoined(_) if self.committed => self.stage = Stage::Committed,
            Message::Ready => {
                if self.greeting.as_ref().is_some_and(|greeting| greeting.wants_data_ranges) {
                    self.stage = Stage::Mapping;
                }
            }
            Message::Round { round, .. } => self.rounds = *round,
            Message::Ping { number } => {
                self.pings = *number;
                self.questions.push_back(Question::Ping(*number));
            }
            Message::Pong { .. } => drop(self.questions.pop_front()),
            Message::CloseChannel { channel } => self.unwanted.push(*channel),
            Message::ChannelClosed { channel } => self.closed.push(*channel),
            Message::Switchover { attempt } => {
                self.switchovers = *attempt;
                self.state_bytes = 0;
            }
            Message::Verify { attempt } => self.questions.push_back(Question::Verify(*attempt)),
            Message::Prepare(prepare) => {
                self.questions.push_back(Question::Prepare(prepare.attempt));
            }
            Message::Verified { attempt, .. } | Message::Prepared(Prepared { attempt, .. }) => {
                self.questions.pop_front();
                let is_loaded = !matches!(message, Message::Prepared(it) if !it.damaged.is_empty());
                // Of one that was called off, in the midst of the next; or nothing was loaded, and it has to be.
                if *attempt != self.switchovers || !is_loaded {
                    self.stage = before;
                }
            }
            Message::StateChunk(chunk) => self.state_bytes += chunk.len() as u64,
            Message::Failed { .. } => match by {
                Side::Source => self.source_ended = true,
                Side::Destination => self.destination_ended = true,
            },
            Message::Agreed { .. }
            | Message::Registered
            | Message::DataRanges(_)
            | Message::Compared { .. }
            | Message::CalledOff { .. }
            | Message::Releasing
            | Message::Commit
            | Message::Rejoined(_)
            | Message::Resumed { .. }
            | Message::GaveBack { .. }
            | Message::Heard => {}
        }
    }

    fn verifies(&self) -> bool {
        self.greeting.as_ref().is_some_and(|greeting| greeting.verify)
    }

    /// Checksums that go with each *prepare*.
    fn chunks(&self) -> usize {
        let greeting = self.greeting.as_ref().filter(|greeting| greeting.page_sums);
        greeting.map_or(0, |greeting| chunk_count(&greeting.layout))
    }

    /// Pages of the guest.
    fn pages(&self) -> u64 {
        let regions = self.greeting.iter().flat_map(|greeting| greeting.layout.regions());
        regions.map(RegionLayout::pages).sum()
    }

    fn are_in_order(&self, ranges: &[PageRange]) -> bool {
        let Some(Greeting { layout, .. }) = &self.greeting else { return false };
        // Where the next one may begin.
        let mut from = (0, 0);
        ranges.iter().all(|range| {
            let region = layout.regions().get(usize::from(range.region));
            let end = range.first_page.checked_add(u64::from(range.pages));
            let inside = region.zip(end).is_some_and(|(region, end)| end <= region.pages());
            let ascends = range.pages > 0 && (range.region, range.first_page) >= from;
            from = (range.region, end.unwrap_or(u64::MAX));
            inside && ascends
        })
    }

    /// Whether a side may name this channel after others.
    fn may_close(&self, channel: u16, before: &[u16]) -> Result<(), Why> {
        let channels = self.greeting.as_ref().map_or(0, |greeting| greeting.channels);
        require(channel < channels, Why::Channel { channel, channels })?;
        require(!before.contains(&channel), Why::ChannelTwice(channel))?;
        require(before.len() + 1 < usize::from(channels), Why::LastChannel(channel))
    }

    fn is_current(&self, attempt: u32) -> Result<(), Why> {
        let (number, due) = (attempt, self.switchovers);
        require(number == due, Why::Number { number, due })
    }

    /// Memory was compared, where that was agreed on.
    fn is_compared(&self) -> Result<(), Why> {
        require(!(self.verifies() && self.stage == Stage::Switching), Why::NotCompared)
    }

    fn answers(&self, question: Question) -> Result<(), Why> {
        require(self.questions.front() == Some(&question), Why::Unasked)
    }
}

fn require(holds: bool, why: Why) -> Result<(), Why> {
    if holds { Ok(()) } else { Err(why) }
}

fn next(number: u32, last: u32) -> Result<(), Why> {
    let due = last.saturating_add(1);
    require(number == due && number != last, Why::Number { number, due })
}

#[cfg(all(test, not(loom)))]
mod tests;
