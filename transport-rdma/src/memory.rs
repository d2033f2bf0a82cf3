//! Guest memory as memory regions, here, and as the other side knows it.
//!
//! The destination tells the source where its memory is by messages on a pipe of its own:
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
//! little-endian, in order, without gaps, until all of memory was named.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use pageferry::memory::{GuestMemory, Layout, PAGE_BYTES, PageRange};
use pageferry::transport::{Registration, TransportError};

use crate::pipe::SLOT_BYTES;
use crate::verbs::{Access, MemoryRegion, ProtectionDomain};

/// Threads that register. The kernel pins pages one by one, so two halve the time; more compete
/// with the guest.
const THREADS: usize = 2;

/// One memory region of guest memory.
#[derive(Debug)]
struct Chunk {
    region: u16,
    first_page: u64,
    pages: u64,
    mr: MemoryRegion,
}

/// All of guest memory, registered.
#[derive(Debug)]
pub(crate) struct Registered {
    pub(crate) memory: Arc<GuestMemory>,
    /// By region and first page, without gaps.
    chunks: Vec<Chunk>,
    pub(crate) cost: Registration,
}

/// Where consecutive pages are that lie in one chunk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) address: u64,
    pub(crate) key: u32,
    pub(crate) pages: u64,
}

/// Finds the chunk with a page in a table without gaps.
fn find<T>(table: &[T], key: impl Fn(&T) -> (u16, u64), region: u16, page: u64) -> Option<&T> {
    let after = table.partition_point(|entry| key(entry) <= (region, page));
    table.get(after.checked_sub(1)?)
}

impl Registered {
    pub(crate) fn new(
        pd: &Arc<ProtectionDomain>,
        memory: &Arc<GuestMemory>,
        chunk_bytes: u64,
        access: Access,
    ) -> Result<Self, TransportError> {
        let began = Instant::now();
        let mut wanted = Vec::new();
        for (region, raw) in (0_u16..).zip(memory.regions()) {
            let pages = raw.layout.pages();
            let at_once = chunk_bytes / PAGE_BYTES;
            let mut first_page = 0;
            while first_page < pages {
                let now = at_once.min(pages - first_page);
                let address = raw.host_addr.expose_provenance() as u64 + first_page * PAGE_BYTES;
                wanted.push((region, first_page, now, address));
                first_page += now;
            }
        }
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            while let Some(&(region, first_page, pages, address)) =
                wanted.get(next.fetch_add(1, Ordering::Relaxed))
            {
                let bytes = pages * PAGE_BYTES;
                let mr = MemoryRegion::of_guest(pd, memory, address, bytes, access)?;
                done.push(Chunk { region, first_page, pages, mr });
            }
            Ok(done)
        };
        let results: Vec<io::Result<Vec<Chunk>>> = thread::scope(|scope| {
            let threads: Vec<_> =
                (1..THREADS.min(wanted.len())).map(|_| scope.spawn(work)).collect();
            let mine = work();
            let theirs = threads.into_iter().map(|thread| {
                thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
            });
            std::iter::once(mine).chain(theirs).collect()
        });
        let total_bytes = memory.layout().len_bytes();
        let mut chunks = Vec::new();
        for result in results {
            chunks.extend(result.map_err(|cause| refused(cause, total_bytes))?);
        }
        chunks.sort_by_key(|chunk| (chunk.region, chunk.first_page));
        let cost = Registration { registered_bytes: total_bytes, took: began.elapsed() };
        Ok(Self { memory: Arc::clone(memory), chunks, cost })
    }

    /// The first pages of a range, as far as they lie in one chunk.
    pub(crate) fn piece(&self, region: u16, page: u64) -> Option<Piece> {
        let chunk = find(&self.chunks, |chunk| (chunk.region, chunk.first_page), region, page)?;
        let offset = page - chunk.first_page;
        (chunk.region == region && offset < chunk.pages).then(|| Piece {
            address: chunk.mr.address() + offset * PAGE_BYTES,
            key: chunk.mr.local_key(),
            pages: chunk.pages - offset,
        })
    }

    /// The messages that tell the other side where it is.
    pub(crate) fn tell(&self) -> Vec<Vec<u8>> {
        self.chunks
            .chunks(ENTRIES_AT_ONCE)
            .map(|chunks| {
                let mut message = vec![TABLE];
                message.extend(u16::try_from(chunks.len()).unwrap_or(0).to_le_bytes());
                for chunk in chunks {
                    message.extend(chunk.region.to_le_bytes());
                    message.extend(chunk.first_page.to_le_bytes());
                    message.extend(chunk.pages.to_le_bytes());
                    message.extend(chunk.mr.address().to_le_bytes());
                    message.extend(chunk.mr.remote_key().to_le_bytes());
                }
                message
            })
            .collect()
    }
}

const TABLE: u8 = 1;
const ENTRY_BYTES: usize = 30;
const HEAD_BYTES: usize = 3;
const ENTRIES_AT_ONCE: usize = (SLOT_BYTES - HEAD_BYTES) / ENTRY_BYTES;

fn refused(cause: io::Error, bytes: u64) -> TransportError {
    let mib = bytes >> 20;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    let advice = match (cause.raw_os_error(), limit) {
        (Some(libc::ENOMEM | libc::EAGAIN | libc::EPERM), Some(limit)) => format!(
            "{mib} MiB have to be locked, and RLIMIT_MEMLOCK is {} KiB; raise it (ulimit -l, \
             LimitMEMLOCK of systemd), or give the process CAP_IPC_LOCK",
            limit >> 10
        ),
        _ => format!("the RDMA device does not take {mib} MiB"),
    };
    TransportError::Register { advice, cause }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    region: u16,
    first_page: u64,
    pages: u64,
    address: u64,
    key: u32,
}

/// Where the other side's guest memory is.
#[derive(Debug)]
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

    /// The first pages of a range, as far as they lie in one chunk.
    pub(crate) fn piece(&self, region: u16, page: u64) -> Option<Piece> {
        let entry = find(&self.entries, |entry| (entry.region, entry.first_page), region, page)?;
        let offset = page - entry.first_page;
        (entry.region == region && offset < entry.pages).then(|| Piece {
            address: entry.address + offset * PAGE_BYTES,
            key: entry.key,
            pages: entry.pages - offset,
        })
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

/// Where pages are, on both sides: pieces that lie in one chunk here and there.
pub(crate) fn pieces(
    range: PageRange,
    here: &Registered,
    there: &RemoteTable,
    most_bytes: u64,
) -> Result<Vec<(Piece, Piece)>, TransportError> {
    let mut found = Vec::new();
    let mut page = range.first_page;
    let end = range.first_page + u64::from(range.pages);
    while page < end {
        let unknown = || TransportError::OutOfOrder("guest memory that was never registered");
        let mut local = here.piece(range.region, page).ok_or_else(unknown)?;
        let remote = there.piece(range.region, page).ok_or_else(unknown)?;
        local.pages = local.pages.min(remote.pages).min(end - page).min(most_bytes / PAGE_BYTES);
        found.push((local, remote));
        page += local.pages;
    }
    Ok(found)
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
        let mut bytes = vec![TABLE];
        bytes.extend(u16::try_from(entries.len()).unwrap().to_le_bytes());
        for (region, first_page, pages, address, key) in entries {
            bytes.extend(region.to_le_bytes());
            bytes.extend(first_page.to_le_bytes());
            bytes.extend(pages.to_le_bytes());
            bytes.extend(address.to_le_bytes());
            bytes.extend(key.to_le_bytes());
        }
        bytes
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
