//! What needs a CPU at the destination, on a connection for pages: mentions of pages that are
//! zero now, and the end.
//!
//! ```text
//! 0  1      3
//! +--+------+---------
//! |1 |count | runs         each: region (2), first page (8), pages (4), little-endian
//! +--+------+---------
//! |2 |  the channel ended in order
//! +--+
//! ```

use std::collections::{BTreeMap, BTreeSet};

use pageferry::memory::PageRange;
use pageferry::transport::{MAX_BATCH_ZERO_PAGES, TransportError};

use crate::pipe::SLOT_BYTES;

const ZEROS: u8 = 1;
pub(crate) const END: u8 = 2;
const RUN_BYTES: usize = 14;
const HEAD_BYTES: usize = 3;

/// Runs in one message at most.
pub(crate) const RUNS_AT_ONCE: usize = (SLOT_BYTES - HEAD_BYTES) / RUN_BYTES;

/// A message of at most [`RUNS_AT_ONCE`] runs.
pub(crate) fn encode(runs: &[PageRange]) -> Vec<u8> {
    let mut message = vec![ZEROS];
    message.extend(u16::try_from(runs.len()).unwrap_or(0).to_le_bytes());
    for run in runs {
        message.extend(run.region.to_le_bytes());
        message.extend(run.first_page.to_le_bytes());
        message.extend(run.pages.to_le_bytes());
    }
    message
}

/// What a message says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    Zeros(Vec<PageRange>),
    End,
}

/// Any bytes. There are at most as many pages as a batch may have, so that they cost the destination no
/// more than it bears with; whether they lie inside guest memory is the caller's to check.
pub(crate) fn decode(message: &[u8]) -> Result<Said, TransportError> {
    const BAD: TransportError = TransportError::Violation("a mention of zero pages out of form");
    match message {
        [END] => Ok(Said::End),
        [ZEROS, low, high, rest @ ..] => {
            let count = usize::from(u16::from_le_bytes([*low, *high]));
            let (runs, trailing) = rest.as_chunks::<RUN_BYTES>();
            if runs.len() != count || count == 0 || !trailing.is_empty() {
                return Err(BAD);
            }
            let runs = runs.iter().map(|[r0, r1, rest @ ..]| {
                let mut first_page = [0; 8];
                first_page.copy_from_slice(&rest[..8]);
                let mut pages = [0; 4];
                pages.copy_from_slice(&rest[8..]);
                PageRange {
                    region: u16::from_le_bytes([*r0, *r1]),
                    first_page: u64::from_le_bytes(first_page),
                    pages: u32::from_le_bytes(pages),
                }
            });
            let runs: Vec<_> = runs.collect();
            if runs.iter().map(|run| u64::from(run.pages)).sum::<u64>() > MAX_BATCH_ZERO_PAGES {
                return Err(TransportError::Violation("more zero pages than a batch may have"));
            }
            Ok(Said::Zeros(runs))
        }
        _ => Err(BAD),
    }
}

/// Pages that the destination may still be making zero: a write to one of them has to wait. Each counts
/// with the message that mentioned it last.
#[derive(Debug, Default)]
pub(crate) struct Zeroing {
    /// By region and first page, none of which overlap: the page after the last, and the message.
    ranges: BTreeMap<(u16, u64), (u64, u64)>,
    /// The same by message.
    messages: BTreeSet<(u64, u16, u64)>,
}

impl Zeroing {
    /// A message of this number mentions them; its number is larger than all before.
    pub(crate) fn mention(&mut self, ranges: &[PageRange], number: u64) {
        for range in ranges {
            let (first, end) = (range.first_page, end(range));
            while let Some((before, rest, message)) = self.last_overlapping(range) {
                self.remove(range.region, before, message);
                // What the new one leaves of it.
                self.insert(range.region, before, first, message);
                self.insert(range.region, end, rest, message);
            }
            self.insert(range.region, first, end, number);
        }
    }

    /// The last message that mentions a page of these, if one does.
    pub(crate) fn mentioned_by(&self, range: &PageRange) -> Option<u64> {
        self.overlapping(range).map(|(_, _, message)| message).max()
    }

    /// All messages up to this one were dealt with.
    pub(crate) fn forget(&mut self, number: u64) {
        while let Some(&(message, region, first)) = self.messages.first()
            && message <= number
        {
            self.remove(region, first, message);
        }
    }

    fn insert(&mut self, region: u16, first: u64, end: u64, message: u64) {
        if first < end {
            self.ranges.insert((region, first), (end, message));
            self.messages.insert((message, region, first));
        }
    }

    fn remove(&mut self, region: u16, first: u64, message: u64) {
        self.ranges.remove(&(region, first));
        self.messages.remove(&(message, region, first));
    }

    /// From the last on: first page, page after the last, message.
    fn overlapping(&self, range: &PageRange) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        let first = range.first_page;
        self.ranges
            .range((range.region, 0)..(range.region, end(range)))
            .rev()
            .map(|((_, first), (end, message))| (*first, *end, *message))
            // None of them overlap, so those before this one end before it.
            .take_while(move |(_, end, _)| *end > first)
    }

    fn last_overlapping(&self, range: &PageRange) -> Option<(u64, u64, u64)> {
        self.overlapping(range).next()
    }
}

fn end(range: &PageRange) -> u64 {
    range.first_page + u64::from(range.pages)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pageferry::testing::Random;
    use rustix::time::{ClockId, clock_gettime};

    use super::*;

    fn range(region: u16, first_page: u64, pages: u32) -> PageRange {
        PageRange { region, first_page, pages }
    }

    #[test]
    fn what_is_encoded_is_decoded_and_nothing_else() {
        let runs = [range(0, 5, 1), range(7, u64::MAX, 9)];
        let message = encode(&runs);
        assert_eq!(decode(&message).unwrap(), Said::Zeros(runs.to_vec()));
        assert_eq!(decode(&[END]).unwrap(), Said::End);
        let full = encode(&[range(1, 2, 3); RUNS_AT_ONCE]);
        assert!(full.len() <= SLOT_BYTES && decode(&full).is_ok());
        for bad in [&message[..message.len() - 1], &[], &[END, 0], &[ZEROS, 0, 0], &[9]] {
            assert!(decode(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn zero_pages_of_a_message_are_bounded() {
        let most = u32::try_from(MAX_BATCH_ZERO_PAGES).unwrap();
        assert!(decode(&encode(&[range(0, 0, most)])).is_ok());
        for runs in [vec![range(0, 0, most), range(0, 9, 1)], vec![range(0, 0, u32::MAX); 500]] {
            let refused = decode(&encode(&runs));
            assert!(matches!(refused, Err(TransportError::Violation(_))), "{refused:?}");
        }
    }

    /// Page by page.
    #[test]
    fn what_is_being_zeroed_is_known_by_the_last_message_that_says_so() {
        const PAGES: u64 = 64;
        let index = |page: u64| usize::try_from(page).unwrap();
        for seed in 0..300 {
            let mut random = Random::new(seed);
            let mut zeroing = Zeroing::default();
            let mut pages = vec![None; index(2 * PAGES)];
            let mut any = || {
                let first_page = random.below(PAGES);
                let pages = 1 + random.below(12.min(PAGES - first_page));
                let region = u16::try_from(random.below(2)).unwrap();
                (range(region, first_page, u32::try_from(pages).unwrap()), random.below(4))
            };
            for number in 1..60 {
                let (runs, next): (Vec<_>, Vec<_>) = (0..3).map(|_| any()).unzip();
                zeroing.mention(&runs, number);
                let at = |range: &PageRange| {
                    let first = u64::from(range.region) * PAGES + range.first_page;
                    index(first)..index(first + u64::from(range.pages))
                };
                for run in &runs {
                    pages[at(run)].fill(Some(number));
                }
                if next[0] == 0 {
                    let taken = number.saturating_sub(next[1] + next[2]);
                    zeroing.forget(taken);
                    for page in &mut pages {
                        *page = page.filter(|number| *number > taken);
                    }
                }
                let (asked, _) = any();
                let expected = pages[at(&asked)].iter().flatten().max().copied();
                assert_eq!(zeroing.mentioned_by(&asked), expected, "seed {seed}, message {number}");
            }
            zeroing.forget(u64::MAX);
            assert!(zeroing.ranges.is_empty() && zeroing.messages.is_empty());
        }
    }

    fn cpu_time() -> Duration {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Duration::try_from(time).unwrap()
    }

    /// Zero pages and others in turns: eight times as many cost about eight times as much.
    #[test]
    fn interleaved_runs_cost_in_proportion_to_their_number() {
        let cost = |count: u64| {
            let runs: Vec<_> = (0..count).map(|index| range(0, 2 * index, 1)).collect();
            let once = || {
                let began = cpu_time();
                let mut zeroing = Zeroing::default();
                for (number, some) in (1..).zip(runs.chunks(RUNS_AT_ONCE)) {
                    zeroing.mention(some, number);
                }
                for index in 0..count {
                    assert_eq!(zeroing.mentioned_by(&range(0, 2 * index + 1, 1)), None);
                }
                cpu_time().saturating_sub(began)
            };
            // Of several, since other work interferes with caches.
            (0..5).map(|_| once()).min().unwrap_or_default()
        };
        let (few, many) = (cost(2_000), cost(16_000));
        assert!(many < 24 * few, "{few:?} for 2,000 runs, {many:?} for 16,000");
    }
}
