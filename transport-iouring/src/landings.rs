//! What has landed: the wire's acknowledgements, in the engine's tickets. A batch of the wire may be several of
//! the engine's ([`crate::queue`]).

use std::collections::VecDeque;

use pageferry::transport::stream::{self, ACK_BYTES, AckSchedule, StreamError};
use pageferry::transport::{Run, Ticket, Watermarks};

/// Acknowledgements read with one request.
const ACKS_AT_ONCE: usize = 64;

#[derive(Debug)]
pub(crate) struct Landings {
    /// The number on the wire of each batch that is out and not landed, with the engine's last
    /// ticket in it.
    wire: VecDeque<(Ticket, Ticket)>,
    sent: Ticket,
    acknowledged: Ticket,
    schedule: AckSchedule,
    acks: [u8; ACKS_AT_ONCE * ACK_BYTES],
    acks_filled: usize,
    marks: Watermarks,
}

impl Default for Landings {
    fn default() -> Self {
        Self {
            wire: VecDeque::new(),
            sent: 0,
            acknowledged: 0,
            schedule: AckSchedule::default(),
            acks: [0; ACKS_AT_ONCE * ACK_BYTES],
            acks_filled: 0,
            marks: Watermarks::default(),
        }
    }
}

impl Landings {
    /// The number of the next batch on the wire, which ends with the engine's `last` ticket; and whether it asks
    /// for an acknowledgement.
    pub(crate) fn number(&mut self, last: Ticket, runs: &[Run]) -> (Ticket, bool) {
        self.sent += 1;
        self.wire.push_back((self.sent, last));
        (self.sent, self.schedule.flag_next(self.sent, runs))
    }

    /// Whether batches are out that were not acknowledged.
    pub(crate) fn are_due(&self) -> bool {
        self.acknowledged < self.sent
    }

    /// Whether an acknowledgement comes without any further record.
    pub(crate) fn are_expected(&self) -> bool {
        self.schedule.expects_more(self.acknowledged)
    }

    /// A record follows that asks for one.
    pub(crate) fn request(&mut self) {
        self.schedule.requested(self.sent);
    }

    /// Where acknowledgements are to be received; never empty.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        &mut self.acks[self.acks_filled..]
    }

    /// So many bytes of acknowledgements came.
    pub(crate) fn take(&mut self, received: usize) -> Result<(), StreamError> {
        let filled = self.acks_filled + received;
        let (acks, partial) = self.acks[..filled].as_chunks::<ACK_BYTES>();
        self.acks_filled = partial.len();
        for ack in acks {
            self.acknowledged = stream::decode_ack(*ack, self.sent, self.acknowledged)?;
        }
        self.acks.copy_within(filled - self.acks_filled..filled, 0);
        Ok(())
    }

    pub(crate) fn marks(&self) -> Watermarks {
        self.marks
    }

    /// Of the batches that the kernel still reads this is the oldest.
    pub(crate) fn advance(&mut self, oldest_unreleased: Option<Ticket>) {
        let released = oldest_unreleased.map_or(self.sent, |oldest| oldest.saturating_sub(1));
        let landed = self.acknowledged.min(released);
        let last = |upto: Ticket| {
            let covered = self.wire.iter().take_while(|(wire, _)| *wire <= upto);
            covered.last().map(|(_, ticket)| *ticket)
        };
        let (released, landed_ticket) = (last(released), last(landed));
        self.marks.released = self.marks.released.max(released.unwrap_or(0));
        self.marks.landed = self.marks.landed.max(landed_ticket.unwrap_or(0));
        while self.wire.front().is_some_and(|(wire, _)| *wire <= landed) {
            self.wire.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acknowledge(landings: &mut Landings, bytes: &[u8]) -> Result<(), StreamError> {
        landings.room()[..bytes.len()].copy_from_slice(bytes);
        landings.take(bytes.len())
    }

    /// Three batches on the wire, of the engine's 1 to 4, 5, and 6 to 9.
    fn three() -> Landings {
        let mut landings = Landings::default();
        for (number, last) in (1..).zip([4, 5, 9]) {
            assert_eq!(landings.number(last, &[]).0, number);
        }
        landings
    }

    #[test]
    fn a_batch_of_the_wire_lands_with_the_last_of_the_engines_in_it() {
        let mut landings = three();
        landings.advance(None);
        assert_eq!(landings.marks(), Watermarks { released: 9, landed: 0 });
        for (ack, landed) in [(1, 4), (2, 5), (3, 9)] {
            assert!(landings.are_due());
            acknowledge(&mut landings, &stream::encode_ack(ack)).unwrap();
            landings.advance(None);
            assert_eq!(landings.marks().landed, landed);
        }
        assert!(!landings.are_due());
    }

    /// Acknowledged is not landed as long as the kernel reads its memory.
    #[test]
    fn nothing_lands_before_it_is_released() {
        let mut landings = three();
        acknowledge(&mut landings, &stream::encode_ack(3)).unwrap();
        landings.advance(Some(2));
        assert_eq!(landings.marks(), Watermarks { released: 4, landed: 4 });
        landings.advance(None);
        assert_eq!(landings.marks(), Watermarks { released: 9, landed: 9 });
    }

    #[test]
    fn acknowledgements_come_in_pieces_and_are_checked() {
        let mut landings = three();
        let both = [stream::encode_ack(1), stream::encode_ack(2)].concat();
        for piece in both.chunks(3) {
            acknowledge(&mut landings, piece).unwrap();
        }
        landings.advance(None);
        assert_eq!(landings.marks().landed, 5);
        acknowledge(&mut landings, &stream::encode_ack(4)).unwrap_err();
    }
}
