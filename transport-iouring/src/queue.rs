//! What the engine sent and the kernel was not told yet.
//!
//! Batches that follow one another through guest memory become one batch on the wire: the
//! receiver waits for a table before it can receive pages, so larger batches are fewer waits and
//! fewer system calls on both sides. The peer only sees batches of the codec, longer ones; which
//! of the engine's tickets one of them ends with is kept here.

use std::collections::VecDeque;

use pageferry::memory::PageRange;
use pageferry::transport::{MAX_BATCH_RUNS, MAX_BATCH_ZERO_PAGES, PageCounts, Run, Ticket};

/// Most batches of the engine that wait.
const MAX_BATCHES: usize = 64;

/// A batch as it goes over the wire.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct WireBatch {
    pub(crate) runs: Vec<Run>,
    payload_bytes: u64,
    zero_pages: u64,
    /// The last of the engine's batches in it.
    pub(crate) last: Ticket,
    /// Its pages come in order, so none can be in it twice.
    ascends: bool,
}

/// Batches that wait.
#[derive(Debug)]
pub(crate) struct Queue {
    wire: VecDeque<WireBatch>,
    batches: usize,
    payload_bytes: u64,
    most_bytes: u64,
}

/// First page after a range, and where that lies in guest memory.
fn end_of(range: PageRange) -> (u16, u64) {
    (range.region, range.first_page + u64::from(range.pages))
}

fn ascend(before: &Run, after: &Run) -> bool {
    end_of(before.range) <= (after.range.region, after.range.first_page)
}

/// One run of both, if the second goes on where the first ends.
fn joined(before: &Run, after: &Run) -> Option<Run> {
    let adjacent = before.kind == after.kind
        && end_of(before.range) == (after.range.region, after.range.first_page);
    let pages = before.range.pages.checked_add(after.range.pages)?;
    adjacent.then_some(Run { range: PageRange { pages, ..before.range }, ..*before })
}

impl Queue {
    /// A queue that is full with so many page bytes.
    pub(crate) fn new(most_bytes: u64) -> Self {
        Self { wire: VecDeque::new(), batches: 0, payload_bytes: 0, most_bytes }
    }

    pub(crate) fn push(&mut self, ticket: Ticket, runs: &[Run]) {
        let payload_bytes: u64 = runs.iter().map(Run::payload_bytes).sum();
        let zero_pages = PageCounts::of(runs).zero;
        self.batches += 1;
        self.payload_bytes += payload_bytes;
        let ascends = runs.is_sorted_by(ascend);
        if let (Some(wire), Some(first)) = (self.wire.back_mut(), runs.first())
            && let Some(end) = wire.runs.last()
            && wire.ascends
            && ascends
            && ascend(end, first)
            && wire.payload_bytes + payload_bytes <= self.most_bytes
            && wire.zero_pages + zero_pages <= MAX_BATCH_ZERO_PAGES
        {
            let one = joined(end, first);
            let rest = &runs[usize::from(one.is_some())..];
            let end = one.unwrap_or(*end);
            if wire.runs.len() + rest.len() <= MAX_BATCH_RUNS {
                wire.runs.pop();
                wire.runs.push(end);
                wire.runs.extend_from_slice(rest);
                wire.payload_bytes += payload_bytes;
                wire.zero_pages += zero_pages;
                wire.last = ticket;
                return;
            }
        }
        self.wire.push_back(WireBatch {
            runs: runs.to_vec(),
            payload_bytes,
            zero_pages,
            last: ticket,
            ascends,
        });
    }

    pub(crate) fn is_full(&self) -> bool {
        self.payload_bytes >= self.most_bytes || self.batches >= MAX_BATCHES
    }

    /// Takes all.
    pub(crate) fn drain(&mut self) -> VecDeque<WireBatch> {
        (self.batches, self.payload_bytes) = (0, 0);
        std::mem::take(&mut self.wire)
    }
}

#[cfg(test)]
mod tests {
    use pageferry::transport::RunKind;

    use super::*;

    fn data(region: u16, first_page: u64, pages: u32) -> Run {
        Run { range: PageRange { region, first_page, pages }, kind: RunKind::Data }
    }

    fn zero(first_page: u64, pages: u32) -> Run {
        Run { kind: RunKind::Zero, ..data(0, first_page, pages) }
    }

    fn queued(batches: &[&[Run]]) -> Vec<(Vec<Run>, Ticket)> {
        let mut queue = Queue::new(1 << 20);
        for (ticket, batch) in (1..).zip(batches) {
            queue.push(ticket, batch);
        }
        queue.drain().into_iter().map(|wire| (wire.runs, wire.last)).collect()
    }

    #[test]
    fn batches_that_follow_one_another_become_one() {
        let wire = queued(&[&[data(0, 0, 2)], &[data(0, 2, 3), zero(5, 1)], &[data(1, 0, 1)]]);
        assert_eq!(wire, [(vec![data(0, 0, 5), zero(5, 1), data(1, 0, 1)], 3)]);
    }

    #[test]
    fn a_page_is_never_twice_in_one_batch() {
        let wire = queued(&[&[data(0, 0, 4)], &[data(0, 3, 1)], &[data(0, 9, 1)]]);
        assert_eq!(wire, [(vec![data(0, 0, 4)], 1), (vec![data(0, 3, 1), data(0, 9, 1)], 3)]);
        // Out of order on its own: nothing is added to it.
        let wire = queued(&[&[data(0, 7, 1), data(0, 3, 1)], &[data(0, 8, 1)]]);
        assert_eq!(wire.len(), 2);
    }

    #[test]
    fn batches_stay_within_the_limits() {
        let scattered: Vec<Run> = (0..300).map(|at| data(0, 2 * at, 1)).collect();
        let more: Vec<Run> = (300..600).map(|at| data(0, 2 * at, 1)).collect();
        let wire = queued(&[&scattered, &more]);
        assert_eq!(wire.len(), 2, "300 runs and 300 runs are too many");
        let wire = queued(&[&[data(0, 0, 200)], &[data(0, 200, 56)], &[data(0, 256, 1)]]);
        assert_eq!(wire.len(), 2, "a MiB and a page are too much");
        let most = u32::try_from(MAX_BATCH_ZERO_PAGES).unwrap();
        let wire = queued(&[&[zero(0, most)], &[zero(most.into(), 1)], &[zero(most.into(), 2)]]);
        assert_eq!(wire.len(), 3, "no more zero pages than in any batch");
    }
}
