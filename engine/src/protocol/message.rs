//! The messages and their bytes.

use std::fmt;

use super::codec::{Reader, Writer};
use super::{DecodeError, speaks_ours};
use crate::digest::Digest;
use crate::memory::{Layout, MAX_REGIONS, PageRange, RegionLayout};

/// Most bytes of the description a host may send along with the greeting.
pub const MAX_DESCRIPTION_BYTES: usize = 64 << 10;
/// Most bytes of a machine's description of its device state.
pub const MAX_STATE_SCHEMA_BYTES: usize = 256 << 10;
/// Most bytes of device state in one message.
pub const MAX_STATE_CHUNK_BYTES: usize = 512 << 10;
/// Most ranges in one [`Message::DataRanges`].
pub const MAX_DATA_RANGES: usize = 16 << 10;
/// Most bytes of device state in all.
pub const MAX_DEVICE_STATE_BYTES: u64 = 256 << 20;
/// Most bytes of an error's text; what is longer is cut.
pub const MAX_TEXT_BYTES: usize = 1024;

const MAGIC: [u8; 8] = *b"PGFERRY\n";

const HELLO: u16 = 1;
const WELCOME: u16 = 2;
const READY: u16 = 3;
const ROUND: u16 = 4;
const STATE_CHUNK: u16 = 5;
const PREPARE: u16 = 6;
const PREPARED: u16 = 7;
const COMMIT: u16 = 8;
const RESUMED: u16 = 9;
const GAVE_BACK: u16 = 10;
const FAILED: u16 = 11;
const CHANNEL_CLOSED: u16 = 12;
const DATA_RANGES: u16 = 13;
const PING: u16 = 20;
const PONG: u16 = 21;
const CALLED_OFF: u16 = 22;
const VERIFY: u16 = 23;
const VERIFIED: u16 = 24;

const FLAG_VERIFY: u8 = 1;

/// Everything the two sides say. "S→D" is source to destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// S→D, first: who I am and what I want to send.
    Hello(Hello),
    /// D→S: the answer, if the destination agrees.
    Welcome(Welcome),
    /// D→S: memory is registered and the data channels are open.
    Ready,
    /// S→D, after [`Message::Ready`] if the destination asked for it: where there may be data.
    /// All other pages are zero so far.
    DataRanges(Vec<PageRange>),
    /// S→D: a round over the dirty pages begins. For the destination's own display.
    Round {
        /// Number of the round, from 1.
        round: u32,
        /// Pages dirty at its beginning.
        dirty_pages: u64,
    },
    /// D→S: a data channel is lost, and nothing that was sent on it lands any more.
    ChannelClosed {
        /// Which one.
        channel: u16,
    },
    /// S→D: the next bytes of the device state.
    StateChunk(Vec<u8>),
    /// S→D, at any time: answer at once. To learn what an answer takes.
    Ping {
        /// Comes back in the answer.
        number: u32,
    },
    /// D→S: the answer to a ping.
    Pong {
        /// As in the ping.
        number: u32,
    },
    /// S→D: all pages have landed; what is the digest of your memory? The source takes its own
    /// meanwhile.
    Verify {
        /// Number of the switchover, from 1.
        attempt: u32,
    },
    /// D→S: the answer. The source compares.
    Verified {
        /// Number of the switchover.
        attempt: u32,
        /// Of all guest memory.
        digest: Digest,
    },
    /// S→D: all pages have landed and all device state was sent; load it.
    Prepare(Prepare),
    /// D→S: loaded; on your commit the guest runs here.
    Prepared(Prepared),
    /// S→D, before the commit: this switchover would take too long. The guest goes on at the source,
    /// more pages come, and whatever was loaded will be loaded anew.
    CalledOff {
        /// Which switchover.
        attempt: u32,
    },
    /// S→D: the guest is yours. The source's point of no return.
    Commit,
    /// D→S: the guest runs here.
    Resumed {
        /// Nanoseconds from the commit's arrival to the running guest.
        resume_ns: u64,
    },
    /// D→S: after a commit, I have not run the guest and never will; it is yours again.
    GaveBack {
        /// Why.
        text: String,
    },
    /// Both ways, last: this side gives up.
    Failed {
        /// Classification.
        reason: FailureReason,
        /// For people.
        text: String,
    },
}

/// The source's greeting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Oldest protocol version it speaks.
    pub oldest_version: u16,
    /// Newest protocol version it speaks.
    pub newest_version: u16,
    /// Page size of dirty tracking and transfer, in bytes.
    pub page_bytes: u32,
    /// Data channels wanted.
    pub channels: u16,
    /// Whether memory is to be compared by digest before the commit.
    pub verify: bool,
    /// The guest's memory map.
    pub layout: Layout,
    /// What the source's VMM tells the destination's: how to build the machine. Opaque here.
    pub description: Vec<u8>,
    /// What the source's machine says of the device state it will save. Opaque here.
    pub state_schema: Vec<u8>,
}

/// The destination's answer to the greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Welcome {
    /// The protocol version both will speak from now on.
    pub version: u16,
    /// Data channels agreed on: as wanted.
    pub channels: u16,
    /// Whether destination memory is all zero, so that zero pages need not be sent.
    pub memory_zeroed: bool,
    /// Whether the source is to say where there may be data ([`Message::DataRanges`]).
    pub wants_data_ranges: bool,
}

/// The source has sent everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prepare {
    /// Number of the switchover, from 1.
    pub attempt: u32,
    /// Length of the device state in bytes, over all chunks.
    pub state_bytes: u64,
}

/// The destination has loaded everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prepared {
    /// Number of the switchover.
    pub attempt: u32,
    /// Nanoseconds the load took.
    pub load_ns: u64,
}

/// Classification of a failure as the other side tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u16)]
pub enum FailureReason {
    /// The receiver of this message broke the protocol.
    PeerMisbehaved = 1,
    /// The two sides do not fit.
    Incompatible = 2,
    /// The link.
    Transport = 3,
    /// Guest memory or its tracking.
    GuestMemory = 4,
    /// The VMM.
    Machine = 5,
    /// The host.
    Host = 6,
    /// Cancelled.
    Cancelled = 7,
    /// Waited too long.
    TimedOut = 8,
    /// The guest is too busy for the downtime limit.
    NotConverging = 9,
    /// The host's VMM said no to the offer.
    Declined = 10,
}

impl FailureReason {
    const ALL: [Self; 10] = [
        Self::PeerMisbehaved,
        Self::Incompatible,
        Self::Transport,
        Self::GuestMemory,
        Self::Machine,
        Self::Host,
        Self::Cancelled,
        Self::TimedOut,
        Self::NotConverging,
        Self::Declined,
    ];
}

impl fmt::Display for FailureReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PeerMisbehaved => "protocol broken by this side",
            Self::Incompatible => "incompatible",
            Self::Transport => "transport",
            Self::GuestMemory => "guest memory",
            Self::Machine => "machine",
            Self::Host => "host",
            Self::Cancelled => "cancelled",
            Self::TimedOut => "timed out",
            Self::NotConverging => "not converging",
            Self::Declined => "declined",
        })
    }
}

impl Message {
    /// Name for messages about messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Welcome(_) => "welcome",
            Self::Ready => "ready",
            Self::DataRanges(_) => "data ranges",
            Self::Round { .. } => "round",
            Self::ChannelClosed { .. } => "channel closed",
            Self::StateChunk(_) => "state chunk",
            Self::Ping { .. } => "ping",
            Self::Pong { .. } => "pong",
            Self::CalledOff { .. } => "called off",
            Self::Verify { .. } => "verify",
            Self::Verified { .. } => "verified",
            Self::Prepare(_) => "prepare",
            Self::Prepared(_) => "prepared",
            Self::Commit => "commit",
            Self::Resumed { .. } => "resumed",
            Self::GaveBack { .. } => "gave back",
            Self::Failed { .. } => "failed",
        }
    }

    /// The bytes of the message: one control frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        match self {
            Self::Hello(hello) => {
                w.u16(HELLO);
                encode_hello(hello, &mut w);
            }
            Self::Welcome(welcome) => {
                w.u16(WELCOME);
                w.u16(welcome.version);
                w.u16(welcome.channels);
                w.u8(u8::from(welcome.memory_zeroed));
                w.u8(u8::from(welcome.wants_data_ranges));
            }
            Self::Ready => w.u16(READY),
            Self::DataRanges(ranges) => {
                w.u16(DATA_RANGES);
                encode_ranges(ranges, &mut w);
            }
            Self::Round { round, dirty_pages } => {
                w.u16(ROUND);
                w.u32(*round);
                w.u64(*dirty_pages);
            }
            Self::ChannelClosed { channel } => {
                w.u16(CHANNEL_CLOSED);
                w.u16(*channel);
            }
            Self::StateChunk(bytes) => {
                w.u16(STATE_CHUNK);
                w.bytes(bytes, MAX_STATE_CHUNK_BYTES);
            }
            Self::Ping { number } => {
                w.u16(PING);
                w.u32(*number);
            }
            Self::Pong { number } => {
                w.u16(PONG);
                w.u32(*number);
            }
            Self::CalledOff { attempt } => {
                w.u16(CALLED_OFF);
                w.u32(*attempt);
            }
            Self::Verify { attempt } => {
                w.u16(VERIFY);
                w.u32(*attempt);
            }
            Self::Verified { attempt, digest } => {
                w.u16(VERIFIED);
                w.u32(*attempt);
                w.array(&digest.0);
            }
            Self::Prepare(prepare) => {
                w.u16(PREPARE);
                w.u32(prepare.attempt);
                w.u64(prepare.state_bytes);
            }
            Self::Prepared(prepared) => {
                w.u16(PREPARED);
                w.u32(prepared.attempt);
                w.u64(prepared.load_ns);
            }
            Self::Commit => w.u16(COMMIT),
            Self::Resumed { resume_ns } => {
                w.u16(RESUMED);
                w.u64(*resume_ns);
            }
            Self::GaveBack { text } => {
                w.u16(GAVE_BACK);
                encode_text(text, &mut w);
            }
            Self::Failed { reason, text } => {
                w.u16(FAILED);
                w.u16(*reason as u16);
                encode_text(text, &mut w);
            }
        }
        w.0
    }

    /// Reads a message.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(bytes);
        let message = match r.u16("type")? {
            HELLO => Self::Hello(decode_hello(&mut r)?),
            WELCOME => Self::Welcome(Welcome {
                version: r.u16("version")?,
                channels: r.u16("channels")?,
                memory_zeroed: decode_bool(&mut r, "memory_zeroed")?,
                wants_data_ranges: decode_bool(&mut r, "wants_data_ranges")?,
            }),
            READY => Self::Ready,
            DATA_RANGES => Self::DataRanges(decode_ranges(&mut r)?),
            ROUND => Self::Round { round: r.u32("round")?, dirty_pages: r.u64("dirty_pages")? },
            CHANNEL_CLOSED => Self::ChannelClosed { channel: r.u16("channel")? },
            STATE_CHUNK => {
                Self::StateChunk(r.bytes(MAX_STATE_CHUNK_BYTES, "state chunk")?.to_vec())
            }
            PING => Self::Ping { number: r.u32("number")? },
            PONG => Self::Pong { number: r.u32("number")? },
            CALLED_OFF => Self::CalledOff { attempt: r.u32("attempt")? },
            VERIFY => Self::Verify { attempt: r.u32("attempt")? },
            VERIFIED => {
                Self::Verified { attempt: r.u32("attempt")?, digest: Digest(r.array("digest")?) }
            }
            PREPARE => Self::Prepare(Prepare {
                attempt: r.u32("attempt")?,
                state_bytes: r.u64("state_bytes")?,
            }),
            PREPARED => {
                Self::Prepared(Prepared { attempt: r.u32("attempt")?, load_ns: r.u64("load_ns")? })
            }
            COMMIT => Self::Commit,
            RESUMED => Self::Resumed { resume_ns: r.u64("resume_ns")? },
            GAVE_BACK => Self::GaveBack { text: decode_text(&mut r)? },
            FAILED => {
                let reason = r.u16("reason")?;
                let known = FailureReason::ALL.into_iter().find(|known| *known as u16 == reason);
                Self::Failed {
                    reason: known.ok_or(DecodeError::UnknownValue {
                        field: "reason",
                        value: u64::from(reason),
                    })?,
                    text: decode_text(&mut r)?,
                }
            }
            other => return Err(DecodeError::UnknownType(other)),
        };
        r.end()?;
        Ok(message)
    }
}

fn encode_ranges(ranges: &[PageRange], w: &mut Writer) {
    let ranges = &ranges[..ranges.len().min(MAX_DATA_RANGES)];
    w.u32(u32::try_from(ranges.len()).unwrap_or(u32::MAX));
    for range in ranges {
        w.u16(range.region);
        w.u64(range.first_page);
        w.u32(range.pages);
    }
}

fn decode_ranges(r: &mut Reader<'_>) -> Result<Vec<PageRange>, DecodeError> {
    let count = r.u32("number of ranges")?;
    if count as usize > MAX_DATA_RANGES {
        let (field, value) = ("number of ranges", u64::from(count));
        return Err(DecodeError::UnknownValue { field, value });
    }
    let range = |_| {
        Ok(PageRange {
            region: r.u16("region")?,
            first_page: r.u64("first page")?,
            pages: r.u32("pages")?,
        })
    };
    (0..count).map(range).collect()
}

fn encode_hello(hello: &Hello, w: &mut Writer) {
    // Magic and version range stay where they are in every version to come.
    w.array(&MAGIC);
    w.u16(hello.oldest_version);
    w.u16(hello.newest_version);
    w.u32(hello.page_bytes);
    w.u16(hello.channels);
    w.u8(if hello.verify { FLAG_VERIFY } else { 0 });
    let regions = hello.layout.regions();
    w.u32(u32::try_from(regions.len()).unwrap_or(u32::MAX));
    for region in regions {
        w.u64(region.guest_addr);
        w.u64(region.len_bytes);
        w.u64(region.backing_page_bytes);
    }
    w.bytes(&hello.description, MAX_DESCRIPTION_BYTES);
    w.bytes(&hello.state_schema, MAX_STATE_SCHEMA_BYTES);
}

fn decode_hello(r: &mut Reader<'_>) -> Result<Hello, DecodeError> {
    let magic = r.array("magic")?;
    if magic != MAGIC {
        return Err(DecodeError::BadMagic(magic));
    }
    let oldest_version = r.u16("oldest_version")?;
    let newest_version = r.u16("newest_version")?;
    if !speaks_ours(oldest_version, newest_version) {
        // What follows is laid out in a way we do not know.
        return Err(DecodeError::Version { oldest: oldest_version, newest: newest_version });
    }
    let page_bytes = r.u32("page_bytes")?;
    let channels = r.u16("channels")?;
    let flags = r.u8("flags")?;
    if flags & !FLAG_VERIFY != 0 {
        return Err(DecodeError::UnknownValue { field: "flags", value: u64::from(flags) });
    }
    let regions = (0..r.count(MAX_REGIONS, "regions")?)
        .map(|_| {
            Ok(RegionLayout {
                guest_addr: r.u64("guest_addr")?,
                len_bytes: r.u64("len_bytes")?,
                backing_page_bytes: r.u64("backing_page_bytes")?,
            })
        })
        .collect::<Result<Vec<_>, DecodeError>>()?;
    let description = r.bytes(MAX_DESCRIPTION_BYTES, "description")?.to_vec();
    let state_schema = r.bytes(MAX_STATE_SCHEMA_BYTES, "state_schema")?.to_vec();
    Ok(Hello {
        oldest_version,
        newest_version,
        page_bytes,
        channels,
        verify: flags & FLAG_VERIFY != 0,
        layout: Layout::new(regions)?,
        description,
        state_schema,
    })
}

fn decode_bool(r: &mut Reader<'_>, field: &'static str) -> Result<bool, DecodeError> {
    match r.u8(field)? {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(DecodeError::UnknownValue { field, value: u64::from(other) }),
    }
}

fn encode_text(text: &str, w: &mut Writer) {
    // Cut at a character, not inside one.
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    w.bytes(&text.as_bytes()[..end], MAX_TEXT_BYTES);
}

fn decode_text(r: &mut Reader<'_>) -> Result<String, DecodeError> {
    let bytes = r.bytes(MAX_TEXT_BYTES, "text")?;
    let text = std::str::from_utf8(bytes).map_err(|_| DecodeError::NotText { field: "text" })?;
    // It will be shown on a terminal: a peer may not send escape sequences there.
    Ok(text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::PAGE_BYTES;

    fn a_layout() -> impl Strategy<Value = Layout> {
        prop::collection::vec((0_u64..1000, 1_u64..1000), 1..20).prop_map(|regions| {
            let mut guest_addr = 0;
            let regions = regions.into_iter().map(|(gap, pages)| {
                guest_addr += gap * PAGE_BYTES;
                let len_bytes = pages * PAGE_BYTES;
                let region = RegionLayout { guest_addr, len_bytes, backing_page_bytes: PAGE_BYTES };
                guest_addr += len_bytes;
                region
            });
            Layout::new(regions.collect()).unwrap()
        })
    }

    fn a_message() -> impl Strategy<Value = Message> {
        let bytes = |max| prop::collection::vec(any::<u8>(), 0..max);
        prop_oneof![
            (1_u16.., any::<(u16, u32, bool)>(), a_layout(), bytes(100), bytes(100)).prop_map(
                |(newest_version, (channels, page_bytes, verify), layout, d, state_schema)| {
                    Message::Hello(Hello {
                        oldest_version: 1,
                        newest_version,
                        page_bytes,
                        channels,
                        verify,
                        layout,
                        description: d,
                        state_schema,
                    })
                }
            ),
            any::<(u16, u16, bool, bool)>().prop_map(
                |(version, channels, memory_zeroed, wants_data_ranges)| {
                    Message::Welcome(Welcome {
                        version,
                        channels,
                        memory_zeroed,
                        wants_data_ranges,
                    })
                }
            ),
            Just(Message::Ready),
            prop::collection::vec(any::<(u16, u64, u32)>(), 0..30).prop_map(|ranges| {
                let range = |(region, first_page, pages)| PageRange { region, first_page, pages };
                Message::DataRanges(ranges.into_iter().map(range).collect())
            }),
            any::<(u32, u64)>()
                .prop_map(|(round, dirty_pages)| Message::Round { round, dirty_pages }),
            any::<u16>().prop_map(|channel| Message::ChannelClosed { channel }),
            bytes(3000).prop_map(Message::StateChunk),
            any::<u32>().prop_map(|number| Message::Ping { number }),
            any::<u32>().prop_map(|number| Message::Pong { number }),
            any::<u32>().prop_map(|attempt| Message::CalledOff { attempt }),
            any::<u32>().prop_map(|attempt| Message::Verify { attempt }),
            any::<(u32, [u8; 16])>().prop_map(|(attempt, digest)| {
                Message::Verified { attempt, digest: Digest(digest) }
            }),
            any::<(u32, u64)>().prop_map(|(attempt, state_bytes)| {
                Message::Prepare(Prepare { attempt, state_bytes })
            }),
            any::<(u32, u64)>().prop_map(|(attempt, load_ns)| {
                Message::Prepared(Prepared { attempt, load_ns })
            }),
            Just(Message::Commit),
            any::<u64>().prop_map(|resume_ns| Message::Resumed { resume_ns }),
            "[a-zäöü ]{0,50}".prop_map(|text| Message::GaveBack { text }),
            (prop::sample::select(FailureReason::ALL.to_vec()), "[a-zäöü ]{0,50}")
                .prop_map(|(reason, text)| Message::Failed { reason, text }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(message in a_message()) {
            prop_assert_eq!(Message::decode(&message.encode()).unwrap(), message);
        }

        #[test]
        fn any_bytes_are_a_message_or_an_error(
            kind in 0_u16..26,
            rest in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut bytes = kind.to_le_bytes().to_vec();
            bytes.extend(rest);
            // What is accepted is exactly what would be encoded, text aside.
            if let Ok(message) = Message::decode(&bytes)
                && !matches!(message, Message::Failed { .. } | Message::GaveBack { .. })
            {
                prop_assert_eq!(message.encode(), bytes);
            }
        }

        #[test]
        fn every_cut_and_every_flip_is_survived(
            message in a_message(),
            at: prop::sample::Index,
            flip in 1_u8..,
        ) {
            let mut bytes = message.encode();
            let at = at.index(bytes.len());
            prop_assert!(Message::decode(&bytes[..at]).is_err());
            bytes[at] ^= flip;
            let _ = Message::decode(&bytes);
            bytes[at] ^= flip;
            bytes.push(0);
            prop_assert!(Message::decode(&bytes).is_err());
        }
    }

    #[test]
    fn long_text_is_cut_at_a_character() {
        let text = "ä".repeat(MAX_TEXT_BYTES);
        let message = Message::Failed { reason: FailureReason::Host, text };
        let Message::Failed { text, .. } = Message::decode(&message.encode()).unwrap() else {
            panic!("another message");
        };
        assert_eq!(text, "ä".repeat(MAX_TEXT_BYTES / 2));
    }

    #[test]
    fn terminal_escapes_are_taken_out_of_text() {
        let message = Message::GaveBack { text: "\x1b[2Jgone".into() };
        assert_eq!(
            Message::decode(&message.encode()),
            Ok(Message::GaveBack { text: " [2Jgone".into() })
        );
    }
}
