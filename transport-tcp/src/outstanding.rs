//! Which zero-copy sends the kernel has not completed yet. Pure: no socket, no clock.
//!
//! The kernel numbers the zero-copy sends of a socket from 0, with 32 bits that wrap around; a
//! call that failed has no number, one that sent a part has one like any other. It reports
//! completed sends as ranges of numbers, several sends as one where it can, and not always in
//! order.

use std::collections::VecDeque;
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use pageferry::transport::{Ticket, ZeroCopyCounts};

/// A range of completed sends, as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Completion {
    pub(crate) first: u32,
    /// Included.
    pub(crate) last: u32,
    /// The kernel copied the bytes of these sends after all.
    pub(crate) copied: bool,
}

impl Completion {
    fn contains(&self, number: u32) -> bool {
        number.wrapping_sub(self.first) <= self.last.wrapping_sub(self.first)
    }
}

#[derive(Debug)]
struct ZeroCopySend {
    ticket: Ticket,
    bytes: u64,
    complete: bool,
}

/// The sends from the oldest that is not complete on.
#[derive(Debug, Default)]
pub(crate) struct Outstanding {
    /// The number of `sends[0]`, or of the next send if there is none.
    first: u32,
    sends: VecDeque<ZeroCopySend>,
}

impl Outstanding {
    /// One more send of a batch, which took so many bytes.
    pub(crate) fn push(&mut self, ticket: Ticket, bytes: u64) {
        self.sends.push_back(ZeroCopySend { ticket, bytes, complete: false });
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sends.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.sends.len()
    }

    /// The batch of the oldest send that is not complete.
    pub(crate) fn oldest(&self) -> Option<Ticket> {
        self.sends.front().map(|send| send.ticket)
    }

    /// Takes in a report; what became complete by it. A number that is not outstanding, or is
    /// complete already, counts for nothing.
    pub(crate) fn complete(&mut self, completion: Completion) -> ZeroCopyCounts {
        let mut counts = ZeroCopyCounts::default();
        let mut number = self.first;
        for send in &mut self.sends {
            if !send.complete && completion.contains(number) {
                send.complete = true;
                counts.sent += 1;
                counts.sent_bytes += send.bytes;
                if completion.copied {
                    counts.copied_by_kernel += 1;
                    counts.copied_bytes += send.bytes;
                }
            }
            number = number.wrapping_add(1);
        }
        while self.sends.front().is_some_and(|send| send.complete) {
            self.sends.pop_front();
            self.first = self.first.wrapping_add(1);
        }
        counts
    }
}

/// Guest memory that the kernel may still read, for whoever closes the connection.
#[derive(Debug)]
pub(crate) struct Unreleased {
    pub(crate) outstanding: Outstanding,
    /// Not used; kept mapped, and from other use by its owner, until the kernel is done.
    pub(crate) _memory: Arc<GuestMemory>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(first: u32, last: u32, copied: bool) -> Completion {
        Completion { first, last, copied }
    }

    /// Sends of 1, 2, 3 … bytes, numbered from `first`; the n-th belongs to batch n.
    fn outstanding(first: u32, sends: u64) -> Outstanding {
        let mut outstanding = Outstanding { first, sends: VecDeque::new() };
        (1..=sends).for_each(|ticket| outstanding.push(ticket, ticket));
        outstanding
    }

    fn counts(sent: u64, copied_by_kernel: u64, sent_bytes: u64, copied: u64) -> ZeroCopyCounts {
        ZeroCopyCounts { sent, copied_by_kernel, sent_bytes, copied_bytes: copied }
    }

    #[test]
    fn ranges_complete_sends_in_any_order() {
        let mut sends = outstanding(0, 6);
        assert_eq!(sends.complete(range(1, 2, false)), counts(2, 0, 5, 0));
        // Not the oldest: nothing is released.
        assert_eq!((sends.oldest(), sends.len()), (Some(1), 6));
        assert_eq!(sends.complete(range(5, 5, true)), counts(1, 1, 6, 6));
        assert_eq!(sends.oldest(), Some(1));
        assert_eq!(sends.complete(range(0, 0, true)), counts(1, 1, 1, 1));
        assert_eq!((sends.oldest(), sends.len()), (Some(4), 3));
        // A range over some that are complete: they are not counted again.
        assert_eq!(sends.complete(range(0, 5, false)), counts(2, 0, 9, 0));
        assert!(sends.is_empty());
    }

    #[test]
    fn numbers_wrap_around() {
        let mut sends = outstanding(u32::MAX - 1, 5);
        assert_eq!(sends.complete(range(u32::MAX, 1, false)), counts(3, 0, 9, 0));
        assert_eq!(sends.oldest(), Some(1));
        assert_eq!(sends.complete(range(u32::MAX - 1, u32::MAX - 1, true)), counts(1, 1, 1, 1));
        assert_eq!(sends.oldest(), Some(5));
        assert_eq!(sends.complete(range(2, 2, false)), counts(1, 0, 5, 0));
        assert!(sends.is_empty());
        sends.push(6, 6);
        assert_eq!(sends.complete(range(3, 3, false)), counts(1, 0, 6, 0));
    }

    #[test]
    fn a_batch_sent_in_pieces_is_released_with_its_last_piece() {
        let mut sends = Outstanding::default();
        for (ticket, bytes) in [(1, 10), (1, 20), (1, 30), (2, 5)] {
            sends.push(ticket, bytes);
        }
        sends.complete(range(0, 1, false));
        assert_eq!(sends.oldest(), Some(1));
        sends.complete(range(2, 2, false));
        assert_eq!(sends.oldest(), Some(2));
    }

    #[test]
    fn what_is_not_outstanding_counts_for_nothing() {
        let mut sends = outstanding(10, 2);
        for unknown in [range(8, 9, false), range(12, 20, true), range(12, 9, false)] {
            assert_eq!(sends.complete(unknown), ZeroCopyCounts::default());
        }
        assert_eq!(sends.len(), 2);
    }

    proptest! {
        /// However the kernel cuts and orders its reports, every send is counted once, and the
        /// oldest is the first that was in none.
        #[test]
        fn every_send_is_counted_once(
            first: u32,
            cuts in prop::collection::vec(1..5_u32, 1..20),
            order in prop::collection::vec(any::<u32>(), 20),
        ) {
            let total: u32 = cuts.iter().sum();
            let mut sends = outstanding(first, total.into());
            let mut start = 0;
            let mut ranges: Vec<_> = cuts.iter().zip(order).map(|(&cut, key)| {
                let begin = start;
                start += cut;
                (key, begin, start)
            }).collect();
            ranges.sort_unstable();
            let mut seen = vec![false; total as usize];
            let mut counted = ZeroCopyCounts::default();
            for (key, begin, end) in ranges {
                let number = |index: u32| first.wrapping_add(index);
                counted.add(&sends.complete(range(number(begin), number(end - 1), key % 2 == 0)));
                seen[begin as usize..end as usize].fill(true);
                let oldest = (1..).zip(&seen).find(|(_, seen)| !**seen).map(|(ticket, _)| ticket);
                prop_assert_eq!(sends.oldest(), oldest);
            }
            let total = u64::from(total);
            prop_assert_eq!((counted.sent, counted.sent_bytes), (total, total * (total + 1) / 2));
            prop_assert!(sends.is_empty());
        }
    }
}
