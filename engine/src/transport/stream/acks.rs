//! When acknowledgements are asked for, and what is to be sent of them.

use super::{StreamError, sum, take};
use crate::transport::Ticket;
use crate::transport::batch::Run;

/// Length of an acknowledgement in bytes: the ticket up to which everything has landed (u64), and its
/// checksum (u32).
pub const ACK_BYTES: usize = 12;

/// Guest memory sent after which an acknowledgement is asked for, as data or as zeroes. A
/// fraction of what an engine lets be under way, so that a sender never stands still for want of
/// an acknowledgement that nobody asked for.
const ACK_EVERY_BYTES: u64 = 8 << 20;
/// The same for batches of a few pages each.
const ACK_EVERY_BATCHES: u32 = 64;

/// When a source asks for acknowledgements: with a flag every now and then, and with a request
/// when it waits and no answer would come otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AckSchedule {
    /// Since the last batch with the flag.
    unasked_bytes: u64,
    unasked_batches: u32,
    /// The last batch with the flag.
    flagged: Ticket,
    /// Up to here acknowledgements come without any further record.
    promised: Ticket,
    /// Where batches are answers: whoever asked knows what has landed.
    never: bool,
}

impl AckSchedule {
    /// On a lane for reads.
    pub fn never() -> Self {
        Self { never: true, ..Self::default() }
    }

    /// Whether the batch that is sent next is to have the flag.
    pub fn flag_next(&mut self, ticket: Ticket, runs: &[Run]) -> bool {
        if self.never {
            return false;
        }
        // What was flagged before is answered at the latest when this batch's lead arrives.
        self.promised = self.promised.max(self.flagged);
        let covered_bytes =
            runs.iter().fold(0_u64, |bytes, run| bytes.saturating_add(run.range.len_bytes()));
        self.unasked_bytes = self.unasked_bytes.saturating_add(covered_bytes);
        self.unasked_batches += 1;
        let flag =
            self.unasked_bytes >= ACK_EVERY_BYTES || self.unasked_batches >= ACK_EVERY_BATCHES;
        if flag {
            (self.unasked_bytes, self.unasked_batches) = (0, 0);
            self.flagged = ticket;
        }
        flag
    }

    /// Whether an acknowledgement is under way that `landed` does not include, or will be
    /// without any further record.
    pub fn expects_more(&self, landed: Ticket) -> bool {
        self.promised > landed
    }

    /// A request follows the batch `sent`.
    pub fn requested(&mut self, sent: Ticket) {
        (self.unasked_bytes, self.unasked_batches) = (0, 0);
        self.promised = sent;
    }
}

/// What a receiver has to say of what has landed. Acknowledgements are cumulative: the newest replaces all that
/// did not fit, so that a receiver never waits for who does not read them, and two sides that both only write
/// cannot get stuck.
///
/// That one cannot be sent is no error: a source that finished and went away at once does not want them, and one
/// that was lost shows in what it sends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AckWriter {
    /// Of which `unsent` bytes at the end are not out yet.
    bytes: [u8; ACK_BYTES],
    unsent: usize,
    /// The ticket in `bytes`, and the one before.
    acknowledged: Ticket,
    before: Ticket,
    stuck: bool,
    dead: bool,
}

impl AckWriter {
    /// Whether there is something to send, with all landed up to this ticket.
    pub fn is_due(&self, landed: Ticket) -> bool {
        !self.dead && (self.unsent > 0 || self.acknowledged < landed)
    }

    /// Whether a new one can begin: none is half sent, and somebody takes them.
    pub fn is_between(&self) -> bool {
        !self.dead && self.unsent == 0
    }

    /// Whether the last one did not fit: to be tried again before sleeping.
    pub fn is_stuck(&self) -> bool {
        self.stuck
    }

    /// What to send: the rest of the one that is half out, or what has landed.
    #[inline]
    pub fn next(&mut self, landed: Ticket) -> &[u8] {
        if self.unsent == 0 {
            self.bytes = encode_ack(landed);
            self.unsent = ACK_BYTES;
            (self.before, self.acknowledged) = (self.acknowledged, landed);
        }
        &self.bytes[ACK_BYTES - self.unsent..]
    }

    /// So many bytes of that are out.
    #[inline]
    pub fn sent(&mut self, bytes: usize) {
        self.stuck = false;
        self.unsent -= bytes.min(self.unsent);
    }

    /// There was no room for it.
    pub fn no_room(&mut self) {
        self.stuck = true;
    }

    /// The other side takes no more.
    pub fn nobody(&mut self) {
        (self.stuck, self.dead) = (false, true);
    }

    /// The one that was to begin did not, and must not seem to have.
    pub fn withdraw(&mut self) {
        (self.unsent, self.acknowledged) = (0, self.before);
    }
}

/// As it is sent.
pub fn encode_ack(landed: Ticket) -> [u8; ACK_BYTES] {
    let (mut bytes, ticket) = ([0; ACK_BYTES], landed.to_le_bytes());
    bytes[..ticket.len()].copy_from_slice(&ticket);
    bytes[ticket.len()..].copy_from_slice(&sum(&ticket).to_le_bytes());
    bytes
}

/// Checks an acknowledgement: it may not go back nor name what was never sent.
pub fn decode_ack(
    bytes: [u8; ACK_BYTES],
    sent: Ticket,
    landed: Ticket,
) -> Result<Ticket, StreamError> {
    let (ticket, rest) = take::<8>(&bytes);
    let (ticket_sum, _) = take::<4>(rest);
    if u32::from_le_bytes(ticket_sum) != sum(&ticket) {
        return Err(StreamError::Damaged("an acknowledgement"));
    }
    let got = u64::from_le_bytes(ticket);
    if got > sent || got < landed {
        return Err(StreamError::Ack { got, sent, landed });
    }
    Ok(got)
}
