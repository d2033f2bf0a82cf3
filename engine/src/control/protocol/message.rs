//! The messages and their bytes.

use std::fmt;

use super::codec::{Reader, Writer};
use super::{DecodeError, Hello, Kind, Rejoin, Rejoined, Welcome};
use crate::pages::digest::Digest;
use crate::pages::memory::PageRange;
use crate::pages::sums::MAX_CHUNKS;

/// Most bytes of device state in one message.
pub const MAX_STATE_CHUNK_BYTES: usize = 512 << 10;
/// Most ranges in one [`Message::DataRanges`], and in one [`Message::Prepared`].
pub const MAX_DATA_RANGES: usize = 16 << 10;
/// Most bytes of device state in all.
pub const MAX_DEVICE_STATE_BYTES: u64 = 256 << 20;
/// Most bytes of an error's text; what is longer is cut.
pub const MAX_TEXT_BYTES: usize = 1024;

/// Everything the two sides say. "S→D" is source to destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// S→D, first: who I am and what I want to send.
    Hello(Hello),
    /// D→S: the answer, if the destination agrees.
    Welcome(Welcome),
    /// S→D: what was heard of the answer is sensible, and this is the digest of the whole greeting.
    Agreed {
        /// Of hello and welcome as the source knows them ([`Welcome::agreed`]).
        greeting: Digest,
    },
    /// S→D, first on a link in place of one that was lost: it is me again, and so far I came.
    Rejoin(Rejoin),
    /// D→S: the answer. What the source has under way on earlier links is lost, and sent again.
    Rejoined(Rejoined),
    /// Both ways: guest memory is registered with the transport. Data channels are opened when both
    /// have said so.
    Registered,
    /// D→S: the data channels are open.
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
    /// S→D: a data channel is lost here, or moves nothing though pings are answered. Let nothing more of it land,
    /// and say so.
    CloseChannel {
        /// Which one.
        channel: u16,
    },
    /// D→S: a data channel is lost, and nothing that was sent on it lands any more.
    ChannelClosed {
        /// Which one.
        channel: u16,
    },
    /// S→D: a switchover begins; the guest is about to be paused.
    Switchover {
        /// Its number: 1, 2, 3 …
        attempt: u32,
    },
    /// S→D: the next bytes of the device state, at least one.
    StateChunk(Vec<u8>),
    /// S→D, while pages are copied, one at a time: answer at once. To learn what an answer takes.
    Ping {
        /// 1, 2, 3 …; comes back in the answer.
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
        /// Number of the switchover.
        attempt: u32,
    },
    /// D→S: the answer. The source compares.
    Verified {
        /// Number of the switchover.
        attempt: u32,
        /// Of all guest memory.
        digest: Digest,
    },
    /// S→D: they are equal; and this is the source's, for the destination to see for itself.
    Compared {
        /// Number of the switchover.
        attempt: u32,
        /// Of all guest memory.
        digest: Digest,
    },
    /// S→D: all pages have landed and all device state was sent; load it.
    Prepare(Prepare),
    /// D→S: loaded; on your commit the guest runs here.
    Prepared(Prepared),
    /// S→D, before the commit, of a switchover that began: it would take too long. The guest goes on
    /// at the source, more pages come, and whatever was loaded will be loaded anew.
    CalledOff {
        /// Which switchover.
        attempt: u32,
    },
    /// S→D, now and then once all is loaded: the source lives, and is releasing what only one host may
    /// hold. The commit is still to come.
    Releasing,
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
    /// S→D, last: it is known here what became of the guest.
    Heard,
    /// Both ways, last: this side gives up.
    Failed {
        /// Classification.
        reason: FailureReason,
        /// For people.
        text: String,
    },
}

/// The source has sent everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepare {
    /// Number of the switchover.
    pub attempt: u32,
    /// Length of the device state in bytes, over all chunks.
    pub state_bytes: u64,
    /// Whether the guest was paused before, and is to stay so: it is not resumed at the commit.
    pub paused: bool,
    /// Checksums of all pages by chunks ([`PageSums`](crate::sums::PageSums)), if they were agreed on.
    pub sums: Vec<u64>,
    /// Checksums of some pages, at most [`MAX_SAMPLES`], where the destination sees no page land.
    pub samples: Vec<PageSample>,
}

/// Most pages of which a [`Prepare`] has the checksum.
pub const MAX_SAMPLES: usize = 256;

/// The checksum of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageSample {
    /// Its region.
    pub region: u16,
    /// Its number in there.
    pub page: u64,
    /// CRC-32 (IEEE 802.3).
    pub sum: u32,
}

/// The destination has loaded everything, or something is wrong with its pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// Number of the switchover.
    pub attempt: u32,
    /// Nanoseconds the load took.
    pub load_ns: u64,
    /// Pages that the load may have written: if the switchover is called off they are to be sent again. At most
    /// [`MAX_DATA_RANGES`].
    pub written: Vec<PageRange>,
    /// Pages that are otherwise here than the source's checksums say, or lie near such: nothing was loaded, and the
    /// switchover has to be called off. At most [`MAX_DATA_RANGES`].
    pub damaged: Vec<PageRange>,
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
    /// Which message it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::Welcome(_) => Kind::Welcome,
            Self::Agreed { .. } => Kind::Agreed,
            Self::Rejoin(_) => Kind::Rejoin,
            Self::Rejoined(_) => Kind::Rejoined,
            Self::Registered => Kind::Registered,
            Self::Ready => Kind::Ready,
            Self::DataRanges(_) => Kind::DataRanges,
            Self::Round { .. } => Kind::Round,
            Self::CloseChannel { .. } => Kind::CloseChannel,
            Self::ChannelClosed { .. } => Kind::ChannelClosed,
            Self::Switchover { .. } => Kind::Switchover,
            Self::StateChunk(_) => Kind::StateChunk,
            Self::Ping { .. } => Kind::Ping,
            Self::Pong { .. } => Kind::Pong,
            Self::CalledOff { .. } => Kind::CalledOff,
            Self::Verify { .. } => Kind::Verify,
            Self::Verified { .. } => Kind::Verified,
            Self::Compared { .. } => Kind::Compared,
            Self::Prepare(_) => Kind::Prepare,
            Self::Prepared(_) => Kind::Prepared,
            Self::Releasing => Kind::Releasing,
            Self::Commit => Kind::Commit,
            Self::Resumed { .. } => Kind::Resumed,
            Self::GaveBack { .. } => Kind::GaveBack,
            Self::Heard => Kind::Heard,
            Self::Failed { .. } => Kind::Failed,
        }
    }

    /// The bytes of the message: one control frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        w.u16(self.kind() as u16);
        match self {
            Self::Hello(hello) => hello.encode(&mut w),
            Self::Welcome(welcome) => welcome.encode(&mut w),
            Self::Agreed { greeting } => w.array(&greeting.0),
            Self::Rejoin(rejoin) => rejoin.encode(&mut w),
            Self::Rejoined(rejoined) => {
                w.u32(rejoined.epoch);
                encode_ranges(&rejoined.written, &mut w);
            }
            Self::Registered | Self::Ready | Self::Releasing | Self::Commit | Self::Heard => {}
            Self::DataRanges(ranges) => encode_ranges(ranges, &mut w),
            Self::Round { round, dirty_pages } => {
                w.u32(*round);
                w.u64(*dirty_pages);
            }
            Self::CloseChannel { channel } | Self::ChannelClosed { channel } => w.u16(*channel),
            Self::StateChunk(bytes) => w.bytes(bytes, MAX_STATE_CHUNK_BYTES),
            Self::Ping { number } | Self::Pong { number } => w.u32(*number),
            Self::Switchover { attempt }
            | Self::CalledOff { attempt }
            | Self::Verify { attempt } => w.u32(*attempt),
            Self::Verified { attempt, digest } | Self::Compared { attempt, digest } => {
                w.u32(*attempt);
                w.array(&digest.0);
            }
            Self::Prepare(prepare) => {
                w.u32(prepare.attempt);
                w.u64(prepare.state_bytes);
                w.u8(u8::from(prepare.paused));
                w.u32(u32::try_from(prepare.sums.len()).unwrap_or(u32::MAX));
                prepare.sums.iter().for_each(|sum| w.u64(*sum));
                let samples = &prepare.samples[..prepare.samples.len().min(MAX_SAMPLES)];
                w.u32(u32::try_from(samples.len()).unwrap_or(u32::MAX));
                for sample in samples {
                    w.u16(sample.region);
                    w.u64(sample.page);
                    w.u32(sample.sum);
                }
            }
            Self::Prepared(prepared) => {
                w.u32(prepared.attempt);
                w.u64(prepared.load_ns);
                encode_ranges(&prepared.written, &mut w);
                encode_ranges(&prepared.damaged, &mut w);
            }
            Self::Resumed { resume_ns } => w.u64(*resume_ns),
            Self::GaveBack { text } => encode_text(text, &mut w),
            Self::Failed { reason, text } => {
                w.u16(*reason as u16);
                encode_text(text, &mut w);
            }
        }
        w.0
    }

    /// Reads a message.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(bytes);
        let number = r.u16("type")?;
        let message = match Kind::of(number).ok_or(DecodeError::UnknownType(number))? {
            Kind::Hello => Self::Hello(Hello::decode(&mut r)?),
            Kind::Welcome => Self::Welcome(Welcome::decode(&mut r)?),
            Kind::Agreed => Self::Agreed { greeting: Digest(r.array("greeting")?) },
            Kind::Rejoin => Self::Rejoin(Rejoin::decode(&mut r)?),
            Kind::Rejoined => {
                Self::Rejoined(Rejoined { epoch: r.u32("epoch")?, written: decode_ranges(&mut r)? })
            }
            Kind::Registered => Self::Registered,
            Kind::Ready => Self::Ready,
            Kind::DataRanges => Self::DataRanges(decode_ranges(&mut r)?),
            Kind::Round => {
                Self::Round { round: r.u32("round")?, dirty_pages: r.u64("dirty_pages")? }
            }
            Kind::CloseChannel => Self::CloseChannel { channel: r.u16("channel")? },
            Kind::ChannelClosed => Self::ChannelClosed { channel: r.u16("channel")? },
            Kind::StateChunk => {
                Self::StateChunk(r.bytes(MAX_STATE_CHUNK_BYTES, "state chunk")?.to_vec())
            }
            Kind::Ping => Self::Ping { number: r.u32("number")? },
            Kind::Pong => Self::Pong { number: r.u32("number")? },
            Kind::CalledOff => Self::CalledOff { attempt: r.u32("attempt")? },
            Kind::Verify => Self::Verify { attempt: r.u32("attempt")? },
            Kind::Verified => {
                Self::Verified { attempt: r.u32("attempt")?, digest: Digest(r.array("digest")?) }
            }
            Kind::Compared => {
                Self::Compared { attempt: r.u32("attempt")?, digest: Digest(r.array("digest")?) }
            }
            Kind::Switchover => Self::Switchover { attempt: r.u32("attempt")? },
            Kind::Prepare => Self::Prepare(Prepare {
                attempt: r.u32("attempt")?,
                state_bytes: r.u64("state_bytes")?,
                paused: r.bool("paused")?,
                sums: decode_sums(&mut r)?,
                samples: decode_samples(&mut r)?,
            }),
            Kind::Prepared => Self::Prepared(Prepared {
                attempt: r.u32("attempt")?,
                load_ns: r.u64("load_ns")?,
                written: decode_ranges(&mut r)?,
                damaged: decode_ranges(&mut r)?,
            }),
            Kind::Releasing => Self::Releasing,
            Kind::Commit => Self::Commit,
            Kind::Resumed => Self::Resumed { resume_ns: r.u64("resume_ns")? },
            Kind::Heard => Self::Heard,
            Kind::GaveBack => Self::GaveBack { text: decode_text(&mut r)? },
            Kind::Failed => {
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

fn decode_sums(r: &mut Reader<'_>) -> Result<Vec<u64>, DecodeError> {
    let most = usize::try_from(MAX_CHUNKS).unwrap_or(usize::MAX);
    (0..r.count(most, "sums")?).map(|_| r.u64("sum")).collect()
}

fn decode_samples(r: &mut Reader<'_>) -> Result<Vec<PageSample>, DecodeError> {
    let count = r.count(MAX_SAMPLES, "samples")?;
    let sample =
        |_| Ok(PageSample { region: r.u16("region")?, page: r.u64("page")?, sum: r.u32("sum")? });
    (0..count).map(sample).collect()
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
mod tests;
