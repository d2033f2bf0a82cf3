//! The page map of a process: what its page tables say of each page (Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use pageferry::dirty::DirtyBitmap;
use pageferry::memory::PAGE_BYTES;

use crate::addresses::Mapped;
use crate::bits::set_range;

/// Of an entry: the page was written since such bits were cleared, or it came to be.
pub(super) const SOFT_DIRTY: u64 = 1 << 55;
/// The page is in the page table, or was and is in swap now.
pub(super) const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;

const ENTRY_BYTES: usize = size_of::<u64>();
/// Entries that are read with one call.
const ENTRIES: usize = 1 << 14;

#[derive(Debug)]
pub(super) struct Entries {
    pagemap: File,
    read: Vec<u8>,
}

impl Entries {
    /// Of that process.
    pub(super) fn of(pagemap: File) -> Self {
        Self { pagemap, read: vec![0; ENTRIES * ENTRY_BYTES] }
    }

    /// Adds the pages whose entries have one of these bits.
    pub(super) fn with(
        &mut self,
        bits: u64,
        mapped: &Mapped,
        into: &mut DirtyBitmap,
    ) -> io::Result<()> {
        let words = into.region_words_mut(mapped.region);
        let pages = (mapped.addresses.end - mapped.addresses.start) / PAGE_BYTES;
        let mut done = 0;
        while done < pages {
            let count = ENTRIES.min(usize::try_from(pages - done).unwrap_or(ENTRIES));
            let entries = &mut self.read[..count * ENTRY_BYTES];
            let at = (mapped.addresses.start / PAGE_BYTES + done) * ENTRY_BYTES as u64;
            self.pagemap.read_exact_at(entries, at)?;
            for (page, entry) in (mapped.first_page + done..).zip(entries.as_chunks().0) {
                if u64::from_ne_bytes(*entry) & bits != 0 {
                    set_range(words, page, page + 1);
                }
            }
            done += count as u64;
        }
        Ok(())
    }

    /// That of the page at an address.
    pub(super) fn at(&self, address: u64) -> io::Result<u64> {
        let mut entry = [0; ENTRY_BYTES];
        self.pagemap.read_exact_at(&mut entry, address / PAGE_BYTES * ENTRY_BYTES as u64)?;
        Ok(u64::from_ne_bytes(entry))
    }
}
