//! Building work requests without a device, for who counts what that costs.

use pageferry::memory::{Layout, PAGE_BYTES};
use pageferry::transport::{Run, TransportError, WorkRequestCounts};

use crate::memory::transfers;
use crate::options::RdmaOptions;
use crate::pipe::{Transfer, write_requests};
use crate::table::{ENTRIES_AT_ONCE, Entry, RemoteTable, encode};
use crate::verbs::Chain;

/// Builds the work requests of batches as a sender does, up to where it would ring the doorbell.
pub struct Building {
    here: RemoteTable,
    there: RemoteTable,
    writes: Vec<Transfer>,
    chain: Chain,
    slice_bytes: u64,
    signal_every: u64,
    posted: u64,
}

impl std::fmt::Debug for Building {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Building").field("posted", &self.posted).finish_non_exhaustive()
    }
}

impl Building {
    /// For memory of that layout, registered in chunks on both sides.
    pub fn new(layout: &Layout, options: &RdmaOptions) -> Result<Self, TransportError> {
        Ok(Self {
            here: table(layout, options.chunk_bytes)?,
            there: table(layout, options.chunk_bytes)?,
            writes: Vec::new(),
            chain: Chain::default(),
            slice_bytes: options.slice_bytes.into(),
            signal_every: options.signal_every.max(1).into(),
            posted: 0,
        })
    }

    /// Builds those of a batch of data runs; counts them, as if they had been posted.
    pub fn build(&mut self, runs: &[Run]) -> Result<WorkRequestCounts, TransportError> {
        self.writes.clear();
        for Run { range, .. } in runs {
            let here = |region, page| self.here.known(region, page);
            let there = |region, page| self.there.known(region, page);
            transfers(*range, here, there, self.slice_bytes, &mut self.writes)?;
        }
        self.chain.load(write_requests(&self.writes, self.posted, self.signal_every));
        self.posted += self.writes.len() as u64;
        let (posted, signalled) = self.chain.counts();
        Ok(WorkRequestCounts { posted, signalled, doorbells: 1, polls: 0 })
    }
}

/// Where memory would be.
fn table(layout: &Layout, chunk_bytes: u64) -> Result<RemoteTable, TransportError> {
    let mut entries = Vec::new();
    for (region, memory) in (0_u16..).zip(layout.regions()) {
        let (chunk, mut first_page) = ((chunk_bytes / PAGE_BYTES).max(1), 0);
        while first_page < memory.pages() {
            let pages = chunk.min(memory.pages() - first_page);
            let address = memory.guest_addr + first_page * PAGE_BYTES;
            entries.push(Entry { region, first_page, pages, address, key: 1 });
            first_page += pages;
        }
    }
    let mut table = RemoteTable::new(layout);
    entries.chunks(ENTRIES_AT_ONCE).try_for_each(|some| table.take_in(&encode(some)))?;
    Ok(table)
}

#[cfg(test)]
mod tests {
    use pageferry::memory::{PageRange, RegionLayout};
    use pageferry::transport::RunKind;

    use super::*;

    #[test]
    fn a_run_is_a_write_a_slice_and_a_chunk() {
        let region = |guest_addr| RegionLayout {
            guest_addr,
            len_bytes: 4 << 20,
            backing_page_bytes: PAGE_BYTES,
        };
        let layout = Layout::new(vec![region(0), region(8 << 20)]).unwrap();
        let options = RdmaOptions {
            chunk_bytes: 1 << 20,
            slice_bytes: 64 << 10,
            signal_every: 4,
            ..RdmaOptions::default()
        };
        let mut building = Building::new(&layout, &options).unwrap();
        let run = |region, first_page, pages| Run {
            range: PageRange { region, first_page, pages },
            kind: RunKind::Data,
        };
        // 3; 16 pages a slice: 2; over the border between two chunks: 2. Of them the fourth and the last
        // are signalled.
        let runs = [run(0, 0, 1), run(0, 3, 2), run(1, 100, 5), run(1, 200, 17), run(0, 255, 2)];
        let counts = building.build(&runs).unwrap();
        assert_eq!(counts, WorkRequestCounts { posted: 7, signalled: 2, doorbells: 1, polls: 0 });
        let counts = building.build(&runs[..3]).unwrap();
        assert_eq!(counts, WorkRequestCounts { posted: 3, signalled: 1, doorbells: 1, polls: 0 });
        assert!(building.build(&[run(0, 1023, 2)]).is_err());
    }
}
