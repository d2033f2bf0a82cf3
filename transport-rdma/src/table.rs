//! Where one side's guest memory is, told to the other by messages on a pipe of its own.
//!
//! ```text
//! 0  1      3
//! +--+------+---------
//! |1 |count | entries
//! +--+------+---------
//!
//! 0        2             10       18         26    30
//! +--------+-------------+--------+----------+-----+
//! | region | first page  | pages  | address  | key |   an entry
//! +--------+-------------+--------+----------+-----+
//! ```
//!
//! little-endian, in order, without gaps, until all of memory was named. Messages may come while
//! pages flow: each names what was registered meanwhile.

use pageferry::memory::{Layout, PAGE_BYTES};
use pageferry::transport::TransportError;

use crate::pipe::SLOT_BYTES;

const TABLE: u8 = 1;
const ENTRY_BYTES: usize = 30;
const HEAD_BYTES: usize = 3;

/// Entries in one message at most.
pub(crate) const ENTRIES_AT_ONCE: usize = (SLOT_BYTES - HEAD_BYTES) / ENTRY_BYTES;

/// Consecutive pages of a region that are registered together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) region: u16,
    pub(crate) first_page: u64,
    pub(crate) pages: u64,
    /// Where they are on their side.
    pub(crate) address: u64,
    /// What the other side's NIC is let in by.
    pub(crate) key: u32,
}

/// A message of at most [`ENTRIES_AT_ONCE`] entries.
pub(crate) fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut message = vec![TABLE];
    message.extend(u16::try_from(entries.len()).unwrap_or(0).to_le_bytes());
    for entry in entries {
        message.extend(entry.region.to_le_bytes());
        message.extend(entry.first_page.to_le_bytes());
        message.extend(entry.pages.to_le_bytes());
        message.extend(entry.address.to_le_bytes());
        message.extend(entry.key.to_le_bytes());
    }
    message
}

/// Where consecutive pages are that were registered together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) address: u64,
    pub(crate) key: u32,
    pub(crate) pages: u64,
}

/// The index of the entry with a page, in a table by region and first page without gaps.
pub(crate) fn find<T>(
    table: &[T],
    key: impl Fn(&T) -> (u16, u64),
    region: u16,
    page: u64,
) -> Option<usize> {
    table.partition_point(|entry| key(entry) <= (region, page)).checked_sub(1)
}

/// Where the other side's guest memory is.
#[derive(Debug, Clone)]
pub(crate) struct RemoteTable {
    layout: Layout,
    entries: Vec<Entry>,
    /// The page that is to be named next.
    due: (u16, u64),
}

impl RemoteTable {
    /// Nothing is known yet of memory of this layout.
    pub(crate) fn new(layout: &Layout) -> Self {
        Self { layout: layout.clone(), entries: Vec::new(), due: (0, 0) }
    }

    /// Whether all of memory was named.
    pub(crate) fn is_complete(&self) -> bool {
        usize::from(self.due.0) == self.layout.regions().len()
    }

    /// Takes a message in.
    pub(crate) fn take_in(&mut self, message: &[u8]) -> Result<(), TransportError> {
        const BAD: TransportError =
            TransportError::Violation("a table of memory regions that does not fit guest memory");
        let [TABLE, low, high, rest @ ..] = message else { return Err(BAD) };
        let count = usize::from(u16::from_le_bytes([*low, *high]));
        let (entries, trailing) = rest.as_chunks::<ENTRY_BYTES>();
        if entries.len() != count || count == 0 || !trailing.is_empty() {
            return Err(BAD);
        }
        for bytes in entries {
            let entry = Entry::decode(bytes);
            let region = self.layout.regions().get(usize::from(entry.region)).ok_or(BAD)?;
            let left = region.pages().checked_sub(entry.first_page).ok_or(BAD)?;
            let end = entry.pages.checked_mul(PAGE_BYTES);
            let end = end.and_then(|bytes| entry.address.checked_add(bytes));
            if (entry.region, entry.first_page) != self.due
                || entry.pages == 0
                || entry.pages > left
                || end.is_none()
            {
                return Err(BAD);
            }
            self.due = if entry.pages == left {
                (entry.region + 1, 0)
            } else {
                (entry.region, entry.first_page + entry.pages)
            };
            self.entries.push(entry);
        }
        Ok(())
    }

    /// Takes over what another one of the same memory knows beyond this one.
    pub(crate) fn catch_up(&mut self, other: &Self) {
        if let Some(news) = other.entries.get(self.entries.len()..) {
            self.entries.extend(news);
            self.due = other.due;
        }
    }

    /// The pages from this one on, as far as they were registered together; `None` if it was not
    /// named yet.
    pub(crate) fn piece(&self, region: u16, page: u64) -> Option<Piece> {
        let by_page = |entry: &Entry| (entry.region, entry.first_page);
        let entry = self.entries.get(find(&self.entries, by_page, region, page)?)?;
        if entry.region != region {
            return None;
        }
        let offset = page - entry.first_page;
        (offset < entry.pages).then(|| Piece {
            address: entry.address + offset * PAGE_BYTES,
            key: entry.key,
            pages: entry.pages - offset,
        })
    }

    /// As [`Self::piece`], of a page that must have been named.
    pub(crate) fn known(&self, region: u16, page: u64) -> Result<Piece, TransportError> {
        let unknown = TransportError::OutOfOrder("guest memory that the other side never named");
        self.piece(region, page).ok_or(unknown)
    }
}

impl Entry {
    fn decode(bytes: &[u8; ENTRY_BYTES]) -> Self {
        let number = |at: usize| {
            let mut eight = [0; 8];
            eight.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(eight)
        };
        Self {
            region: u16::from_le_bytes([bytes[0], bytes[1]]),
            first_page: number(2),
            pages: number(10),
            address: number(18),
            key: u32::from_le_bytes([bytes[26], bytes[27], bytes[28], bytes[29]]),
        }
    }
}

#[cfg(test)]
mod tests {
    use pageferry::memory::RegionLayout;

    use super::*;

    fn layout() -> Layout {
        let region = |guest_addr, pages| RegionLayout {
            guest_addr,
            len_bytes: pages * PAGE_BYTES,
            backing_page_bytes: PAGE_BYTES,
        };
        Layout::new(vec![region(0, 100), region(1 << 30, 7)]).unwrap()
    }

    fn message(entries: &[(u16, u64, u64, u64, u32)]) -> Vec<u8> {
        let entry = |&(region, first_page, pages, address, key)| Entry {
            region,
            first_page,
            pages,
            address,
            key,
        };
        encode(&entries.iter().map(entry).collect::<Vec<_>>())
    }

    #[test]
    fn a_table_is_complete_when_all_pages_were_named() {
        let mut table = RemoteTable::new(&layout());
        table.take_in(&message(&[(0, 0, 60, 0x10_0000, 7)])).unwrap();
        assert!(!table.is_complete());
        table.take_in(&message(&[(0, 60, 40, 0x90_0000, 8), (1, 0, 7, 0, 9)])).unwrap();
        assert!(table.is_complete());
        let piece = table.piece(0, 65).unwrap();
        assert_eq!((piece.address, piece.key, piece.pages), (0x90_5000, 8, 35));
        assert_eq!(table.piece(1, 6).unwrap().pages, 1);
        assert!(table.piece(1, 7).is_none() && table.piece(2, 0).is_none());
    }

    #[test]
    fn a_copy_catches_up() {
        let mut table = RemoteTable::new(&layout());
        let mut copy = table.clone();
        table.take_in(&message(&[(0, 0, 60, 0, 7)])).unwrap();
        copy.catch_up(&table);
        assert!(copy.piece(0, 59).is_some() && copy.piece(0, 60).is_none());
        table.take_in(&message(&[(0, 60, 40, 0, 8)])).unwrap();
        copy.catch_up(&table);
        assert!(copy.piece(0, 99).is_some() && copy.piece(1, 0).is_none(), "named by region");
        table.take_in(&message(&[(1, 0, 7, 0, 9)])).unwrap();
        copy.catch_up(&table);
        copy.catch_up(&table);
        assert!(copy.is_complete() && copy.entries == table.entries);
    }

    #[test]
    fn a_full_message_fits_a_slot() {
        let entry = Entry { region: 0, first_page: 0, pages: 1, address: 0, key: 0 };
        assert!(encode(&[entry; ENTRIES_AT_ONCE]).len() <= SLOT_BYTES);
    }

    #[test]
    fn tables_that_do_not_fit_are_refused() {
        let good = message(&[(0, 0, 60, 0, 7)]);
        let bad = [
            message(&[]),
            message(&[(0, 1, 60, 0, 7)]),
            message(&[(1, 0, 7, 0, 7)]),
            message(&[(0, 0, 0, 0, 7)]),
            message(&[(0, 0, 101, 0, 7)]),
            message(&[(0, 0, 60, u64::MAX - 4096, 7)]),
            message(&[(0, u64::MAX, 60, 0, 7)]),
            message(&[(9, 0, 1, 0, 7)]),
            good[..good.len() - 1].to_vec(),
            [good.as_slice(), &[0]].concat(),
            vec![2, 0, 0],
            Vec::new(),
        ];
        for message in bad {
            let result = RemoteTable::new(&layout()).take_in(&message);
            assert!(matches!(result, Err(TransportError::Violation(_))), "{message:?}");
        }
    }
}
