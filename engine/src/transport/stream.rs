//! The wire codec that all stream transports share (tcp, io_uring, unix), so that they
//! interoperate. Diagrams: `docs/protocol.md`, "data channel".
//!
//! A batch is a header, a table of its runs, and the page bytes of its data runs in table order.
//! The receiver answers with cumulative acknowledgements, when it is asked to. All integers are
//! little-endian.
//!
//! No record is shorter than [`LEAD_BYTES`]: a table has room for at least [`LEAD_RUNS`] runs. So
//! a receiver may ask its socket for the rest of a batch and the lead of the next record with one
//! call that waits for all of it: it gets no page byte of the next batch, and a source that has
//! nothing more to send and wants to know what has landed sends the request
//! ([`encode_ack_request`]), which ends that call. [`AckSchedule`] knows when it has to.
//!
//! What comes before page bytes is a multiple of [`LEAD_BYTES`] long, a power of two. So pages lie
//! in the kernel's buffers as they lie in guest memory, by cache lines, and are copied faster.

//!
//! Whatever is no page byte has a checksum, so that what is changed on the way is found
//! ([`StreamError::Damaged`]), and the channel or the link made anew.

mod acks;
mod frames;

use thiserror::Error;

pub use acks::{ACK_BYTES, AckSchedule, AckWriter, decode_ack, encode_ack};
pub use frames::{FRAME_HEADER_BYTES, FrameHeader};

use super::batch::{MAX_BATCH_RUNS, MAX_BATCH_ZERO_PAGES, Run, RunKind};
use super::{PageCounts, Ticket};
use crate::pages::memory::{Layout, PAGE_BYTES, PageRange};

/// Length of a batch header in bytes, the last 8 of which are checksums: of the table, and of the header before
/// this one.
pub const HEADER_BYTES: usize = 32;
/// Length of one run in the table in bytes.
pub const RUN_BYTES: usize = 16;
/// Runs for which every table has room, at least; what is not used is zero. A batch of a contiguous piece
/// of memory has one run, one of a few stripes has a few: either is known from its lead.
pub const LEAD_RUNS: usize = 6;
/// What every record begins with: a header, and room for [`LEAD_RUNS`] runs. Records that are no
/// batches are no longer than this, with zeroes in place of the runs.
pub const LEAD_BYTES: usize = HEADER_BYTES + LEAD_RUNS * RUN_BYTES;
/// Longest header with its table.
pub const MAX_HEAD_BYTES: usize =
    (HEADER_BYTES + MAX_BATCH_RUNS * RUN_BYTES).next_multiple_of(LEAD_BYTES);
/// Most page bytes a batch may carry on a stream.
pub const MAX_PAYLOAD_BYTES: u64 = 64 << 20;

const MAGIC: [u8; 4] = *b"PFB1";
const TYPE_BATCH: u8 = 1;
const TYPE_END: u8 = 2;
const TYPE_ACK_REQUEST: u8 = 3;
const TYPE_READ: u8 = 4;
const FLAG_ACK: u8 = 1;
const KIND_DATA: u8 = 0;
const KIND_ZERO: u8 = 1;
const TYPE_AT: usize = 4;
const TABLE_SUM_AT: usize = 24;
const HEADER_SUM_AT: usize = 28;

/// What is wrong with bytes that claim to be a batch.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StreamError {
    /// It is not as it was sent: it was changed on the way.
    #[error("{0} was changed on the way: its checksum is wrong")]
    Damaged(&'static str),
    /// Not a header of ours: the two sides are out of step, or the peer is no peer.
    #[error("batch header begins with {0:02x?}")]
    BadMagic([u8; 4]),
    /// Unknown record type.
    #[error("unknown record type {0}")]
    UnknownType(u8),
    /// Unknown flag bits or reserved bytes that are not zero.
    #[error("reserved bits {0:#x} are set")]
    Reserved(u32),
    /// The unused rest of a table is not zero.
    #[error("the unused rest of a batch's table is not zero")]
    Unused,
    /// The table is empty or too long.
    #[error("batch of {0} runs, 1 to {MAX_BATCH_RUNS} are allowed")]
    RunCount(u16),
    /// Batches must be numbered one after another.
    #[error("batch {got} where {expected} was due")]
    Sequence {
        /// The number due.
        expected: Ticket,
        /// The number that came.
        got: Ticket,
    },
    /// Unknown run kind.
    #[error("unknown kind {0} of run")]
    UnknownKind(u8),
    /// A run of no pages or outside the agreed layout.
    #[error("run of pages {first_page}..+{pages} of region {region} is not inside guest memory", first_page = .0.first_page, pages = .0.pages, region = .0.region)]
    OutOfRange(PageRange),
    /// A page is in two runs of a batch. With zero runs, a table of a few kilobytes could otherwise
    /// have the same memory written hundreds of times.
    #[error("page {first_page} of region {region} is in two runs of a batch", first_page = .0.first_page, region = .0.region)]
    Twice(PageRange),
    /// More zero pages than a batch may have.
    #[error("batch of {0} zero pages, at most {MAX_BATCH_ZERO_PAGES} are allowed")]
    ZeroPages(u64),
    /// The header's payload length is not the sum of the data runs, or is too large.
    #[error("payload of {announced} bytes announced, runs add up to {actual}")]
    Payload {
        /// What the header says.
        announced: u64,
        /// What the table says.
        actual: u64,
    },
    /// An acknowledgement of something never sent, or going backwards.
    #[error("acknowledgement of batch {got}, {sent} were sent and {landed} acknowledged before")]
    Ack {
        /// What came.
        got: Ticket,
        /// The last ticket given out.
        sent: Ticket,
        /// The last acknowledgement.
        landed: Ticket,
    },
    /// A control frame of a forbidden length.
    #[error("control frame of {0} bytes")]
    FrameLength(u32),
}

/// A decoded header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    /// A batch follows: first its table, then its payload.
    Batch(BatchHeader),
    /// The channel ends here, in order.
    End,
    /// The sender waits: whatever has landed and is not acknowledged is to be acknowledged now.
    AckRequest,
}

/// The header of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    /// Number of the batch on its channel, from 1.
    pub ticket: Ticket,
    /// Runs in the table.
    pub runs: u16,
    /// Page bytes after the table.
    pub payload_bytes: u64,
    /// Whether the receiver owes an acknowledgement once the batch has landed. It may take the
    /// lead of the next record first.
    pub ack: bool,
    /// Checksum of the table.
    table_sum: u32,
}

impl BatchHeader {
    /// Length of the table in bytes, with what is not used of it.
    pub fn table_bytes(&self) -> usize {
        let used_bytes = HEADER_BYTES + usize::from(self.runs).max(LEAD_RUNS) * RUN_BYTES;
        used_bytes.next_multiple_of(LEAD_BYTES) - HEADER_BYTES
    }
}

/// Writes header and table of a batch into `into`, replacing what is there. `runs` must not be
/// empty nor longer than [`MAX_BATCH_RUNS`].
pub fn encode_batch(ticket: Ticket, runs: &[Run], ack: bool, into: &mut Vec<u8>) {
    debug_assert!((1..=MAX_BATCH_RUNS).contains(&runs.len()));
    let payload_bytes: u64 = runs.iter().map(Run::payload_bytes).sum();
    let count = u16::try_from(runs.len()).unwrap_or(u16::MAX);
    into.clear();
    encode_header(TYPE_BATCH, if ack { FLAG_ACK } else { 0 }, count, payload_bytes, ticket, into);
    for run in runs {
        into.extend_from_slice(&run.range.first_page.to_le_bytes());
        into.extend_from_slice(&run.range.pages.to_le_bytes());
        into.extend_from_slice(&run.range.region.to_le_bytes());
        into.push(match run.kind {
            RunKind::Data => KIND_DATA,
            RunKind::Zero => KIND_ZERO,
        });
        into.push(0);
    }
    // The lead is there in full.
    into.resize(into.len().max(LEAD_BYTES).next_multiple_of(LEAD_BYTES), 0);
    seal(into);
}

/// Writes a request for pages into `into`, replacing what is there: a record of a batch of them that has no payload, sent
/// by who reads them on a lane of its own, where the batch is the answer. [`encode_end`] ends the lane.
pub fn encode_read(ticket: Ticket, runs: &[Run], into: &mut Vec<u8>) {
    encode_batch(ticket, runs, false, into);
    into[TYPE_AT] = TYPE_READ;
    seal(into);
}

/// What comes on a lane from who reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// A request: its [table](decode_table) follows, whose payload is what is asked for.
    Read(BatchHeader),
    /// Nothing more is asked for.
    End,
}

/// As [`decode_header`], on a lane at who serves.
pub fn decode_request(lead: &[u8; LEAD_BYTES], expected: Ticket) -> Result<Request, StreamError> {
    match decode_record(lead, expected, TYPE_READ)? {
        Header::Batch(header) if header.ack => Err(StreamError::Reserved(u32::from(FLAG_ACK))),
        Header::Batch(header) => Ok(Request::Read(header)),
        Header::End => Ok(Request::End),
        Header::AckRequest => Err(StreamError::UnknownType(TYPE_ACK_REQUEST)),
    }
}

/// As [`decode_table`], of a request: nothing but data is asked for, and no more than `most_bytes` of it.
pub fn decode_asked(
    header: &BatchHeader,
    table: &[u8],
    layout: &Layout,
    most_bytes: u64,
    runs: &mut Vec<Run>,
) -> Result<(), StreamError> {
    let counts = decode_table(header, table, layout, runs)?;
    if counts.zero > 0 {
        return Err(StreamError::ZeroPages(counts.zero));
    }
    if header.payload_bytes > most_bytes {
        return Err(StreamError::Payload { announced: header.payload_bytes, actual: most_bytes });
    }
    Ok(())
}

/// CRC-32 of IEEE 802.3. It finds what was changed by mistake on the way, where TCP's own sum of 16 bits does not. Who
/// changes bytes on purpose changes the sum as well.
fn sum(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// Puts the checksums into a record that is whole but for its payload, of a lead at least. What is encoded here has them
/// already.
///
/// # Panics
///
/// If the record is shorter than a header.
pub fn seal(record: &mut [u8]) {
    let table_sum = sum(&record[HEADER_BYTES..]);
    record[TABLE_SUM_AT..HEADER_SUM_AT].copy_from_slice(&table_sum.to_le_bytes());
    let header_sum = sum(&record[..HEADER_SUM_AT]);
    record[HEADER_SUM_AT..HEADER_BYTES].copy_from_slice(&header_sum.to_le_bytes());
}

/// Writes the record that ends a channel into `into`, replacing what is there.
pub fn encode_end(into: &mut Vec<u8>) {
    encode_bare(TYPE_END, into);
}

/// Writes the record that asks for an acknowledgement at once into `into`, replacing what is
/// there.
pub fn encode_ack_request(into: &mut Vec<u8>) {
    encode_bare(TYPE_ACK_REQUEST, into);
}

/// A record of nothing but its type, as long as a lead.
fn encode_bare(record: u8, into: &mut Vec<u8>) {
    into.clear();
    encode_header(record, 0, 0, 0, 0, into);
    into.resize(LEAD_BYTES, 0);
    seal(into);
}

fn encode_header(
    record: u8,
    flags: u8,
    runs: u16,
    payload_bytes: u64,
    ticket: Ticket,
    into: &mut Vec<u8>,
) {
    into.extend_from_slice(&MAGIC);
    into.push(record);
    into.push(flags);
    into.extend_from_slice(&runs.to_le_bytes());
    into.extend_from_slice(&payload_bytes.to_le_bytes());
    into.extend_from_slice(&ticket.to_le_bytes());
    into.extend_from_slice(&[0; 8]);
}

/// Reads the header of a record from its lead. `expected` is the ticket due. The runs of a batch are
/// left to [`decode_table`].
pub fn decode_header(lead: &[u8; LEAD_BYTES], expected: Ticket) -> Result<Header, StreamError> {
    decode_record(lead, expected, TYPE_BATCH)
}

/// With `batch` for the type of records that have runs.
fn decode_record(
    lead: &[u8; LEAD_BYTES],
    expected: Ticket,
    batch: u8,
) -> Result<Header, StreamError> {
    let (magic, rest) = take::<4>(lead);
    let (kind, rest) = take::<1>(rest);
    let (flags, rest) = take::<1>(rest);
    let (runs, rest) = take::<2>(rest);
    let (payload_bytes, rest) = take::<8>(rest);
    let (ticket, rest) = take::<8>(rest);
    let (table_sum, rest) = take::<4>(rest);
    let (header_sum, runs_room) = take::<4>(rest);
    if u32::from_le_bytes(header_sum) != sum(&lead[..HEADER_SUM_AT]) {
        return Err(StreamError::Damaged("the header of a batch"));
    }
    if magic != MAGIC {
        return Err(StreamError::BadMagic(magic));
    }
    let table_sum = u32::from_le_bytes(table_sum);
    let (kind, flags) = (kind[0], flags[0]);
    let runs = u16::from_le_bytes(runs);
    let payload_bytes = u64::from_le_bytes(payload_bytes);
    let ticket = u64::from_le_bytes(ticket);
    match kind {
        TYPE_END | TYPE_ACK_REQUEST => {
            if table_sum != sum(runs_room) {
                return Err(StreamError::Damaged("a record of no batch"));
            }
            let fields_are_zero = flags == 0 && runs == 0 && payload_bytes == 0 && ticket == 0;
            if !fields_are_zero || runs_room.iter().any(|&byte| byte != 0) {
                return Err(StreamError::Reserved(u32::from(flags)));
            }
            Ok(if kind == TYPE_END { Header::End } else { Header::AckRequest })
        }
        kind if kind == batch => {
            if flags & !FLAG_ACK != 0 {
                return Err(StreamError::Reserved(u32::from(flags)));
            }
            if runs == 0 || usize::from(runs) > MAX_BATCH_RUNS {
                return Err(StreamError::RunCount(runs));
            }
            if ticket != expected {
                return Err(StreamError::Sequence { expected, got: ticket });
            }
            if payload_bytes > MAX_PAYLOAD_BYTES {
                return Err(StreamError::Payload {
                    announced: payload_bytes,
                    actual: MAX_PAYLOAD_BYTES,
                });
            }
            Ok(Header::Batch(BatchHeader {
                ticket,
                runs,
                payload_bytes,
                ack: flags != 0,
                table_sum,
            }))
        }
        other => Err(StreamError::UnknownType(other)),
    }
}

/// Reads the table of a batch into `runs`, replacing what is there. Every run is checked against
/// the layout, and all of them together: no page is in two, and what the receiver has to write for
/// them is bounded ([`MAX_PAYLOAD_BYTES`], [`MAX_BATCH_ZERO_PAGES`]). `table` must be
/// [`BatchHeader::table_bytes`] long.
pub fn decode_table(
    header: &BatchHeader,
    table: &[u8],
    layout: &Layout,
    runs: &mut Vec<Run>,
) -> Result<PageCounts, StreamError> {
    runs.clear();
    if header.table_sum != sum(table) {
        return Err(StreamError::Damaged("the table of a batch"));
    }
    let mut actual = 0;
    let used_bytes = table.len().min(usize::from(header.runs) * RUN_BYTES);
    let (table, unused) = table.split_at(used_bytes);
    if unused.iter().any(|&byte| byte != 0) {
        return Err(StreamError::Unused);
    }
    for entry in table.chunks_exact(RUN_BYTES) {
        let (first_page, rest) = take::<8>(entry);
        let (pages, rest) = take::<4>(rest);
        let (region, rest) = take::<2>(rest);
        let (kind, rest) = take::<1>(rest);
        let (reserved, _) = take::<1>(rest);
        let range = PageRange {
            region: u16::from_le_bytes(region),
            first_page: u64::from_le_bytes(first_page),
            pages: u32::from_le_bytes(pages),
        };
        let kind = match kind[0] {
            KIND_DATA => RunKind::Data,
            KIND_ZERO => RunKind::Zero,
            other => return Err(StreamError::UnknownKind(other)),
        };
        if reserved[0] != 0 {
            return Err(StreamError::Reserved(u32::from(reserved[0])));
        }
        let inside = layout.regions().get(usize::from(range.region)).is_some_and(|region| {
            range.pages > 0
                && range
                    .first_page
                    .checked_add(u64::from(range.pages))
                    .is_some_and(|end| end <= region.len_bytes / PAGE_BYTES)
        });
        if !inside {
            return Err(StreamError::OutOfRange(range));
        }
        let run = Run { range, kind };
        actual += run.payload_bytes();
        runs.push(run);
    }
    if runs.len() != usize::from(header.runs) || actual != header.payload_bytes {
        return Err(StreamError::Payload { announced: header.payload_bytes, actual });
    }
    let counts = PageCounts::of(runs);
    if counts.zero > MAX_BATCH_ZERO_PAGES {
        return Err(StreamError::ZeroPages(counts.zero));
    }
    check_disjoint(runs)?;
    Ok(counts)
}

/// Refuses a batch with a page in two runs. Engines send their runs in ascending order, which is
/// seen in one pass; any other order is allowed, and costs a sort.
fn check_disjoint(runs: &[Run]) -> Result<(), StreamError> {
    let begin = |run: &Run| (run.range.region, run.range.first_page);
    let end = |run: &Run| (run.range.region, run.range.first_page + u64::from(run.range.pages));
    if runs.is_sorted_by(|before, after| end(before) <= begin(after)) {
        return Ok(());
    }
    let mut sorted: Vec<&Run> = runs.iter().collect();
    sorted.sort_unstable_by_key(|run| begin(run));
    match sorted.windows(2).find(|pair| end(pair[0]) > begin(pair[1])) {
        Some(pair) => Err(StreamError::Twice(pair[1].range)),
        None => Ok(()),
    }
}

/// The first `N` bytes, and the rest. Callers pass slices of a length they checked.
fn take<const N: usize>(bytes: &[u8]) -> ([u8; N], &[u8]) {
    let (head, rest) = bytes.split_at(N);
    let mut array = [0; N];
    array.copy_from_slice(head);
    (array, rest)
}

#[cfg(all(test, not(loom)))]
mod tests;
