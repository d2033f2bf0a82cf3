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

use pageferry::memory::PageRange;
use pageferry::transport::TransportError;

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

/// Any bytes. Whether runs lie inside guest memory is the caller's to check.
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
            Ok(Said::Zeros(runs.collect()))
        }
        _ => Err(BAD),
    }
}

/// Whether two ranges have a page in common.
pub(crate) fn overlap(one: &PageRange, other: &PageRange) -> bool {
    let end = |range: &PageRange| range.first_page + u64::from(range.pages);
    one.region == other.region && one.first_page < end(other) && other.first_page < end(one)
}

#[cfg(test)]
mod tests {
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
    fn neighbours_do_not_overlap() {
        assert!(overlap(&range(0, 5, 2), &range(0, 6, 9)));
        assert!(!overlap(&range(0, 5, 1), &range(0, 6, 9)));
        assert!(!overlap(&range(0, 5, 2), &range(1, 6, 9)));
    }
}
