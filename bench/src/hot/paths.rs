//! Loops of the engine alone.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use pageferry::dirty::{DirtyBitmap, DirtySources, runs};
use pageferry::ledger::Ledger;
use pageferry::memory::{GuestMemory, Layout, PAGE_BYTES, PageRange, RegionLayout};
use pageferry::partition::Partition;
use pageferry::testing::hot::send_round;
use pageferry::transport::stream::{
    HEADER_BYTES, Header, LEAD_BYTES, decode_header, decode_table, encode_batch,
};
use pageferry::transport::{
    Capabilities, ChannelCounters, Interrupt, PageSender, Run, RunKind, Ticket, TransportError,
    Watermarks,
};
use pageferry_cli::outcome::Failure;
use pageferry_rust_vmm::guest_memory;
use pageferry_vmm::ram::{Backing, Ram};
use vm_memory::{Bytes, GuestAddress};

use super::Counts;
use crate::links::{NOWHERE, Nobody};
use crate::random::Random;

/// Guest memory for each unit of work.
const UNIT_PAGES: u64 = 2048;
/// Small, so that there are many.
const BATCH_BYTES: u64 = 64 << 10;

/// Finding what is dirty in 64 GiB, one page in 4096; a unit of work is going through it once.
pub(super) fn scan(work: u32) -> Result<impl FnMut() -> Result<Counts, Failure>, Failure> {
    let len_bytes = 64 << 30;
    let layout = Layout::new(vec![RegionLayout {
        guest_addr: 0,
        len_bytes,
        backing_page_bytes: PAGE_BYTES,
    }])?;
    let mut ledger = Ledger::new(&layout);
    ledger.dirty.clear();
    let mut random = Random::new(1);
    for _ in 0..layout.pages() / 4096 {
        ledger.dirty.set(0, random.below(layout.pages()));
    }
    let (loan, mut shares) = ledger.lend(&Partition::new(&layout, 1));
    let mut share = shares.pop().ok_or("a partition of one channel has a share")?;
    Ok(move || {
        black_box(&loan);
        for _ in 0..work {
            share.rewind();
            while let Some((stripe, bits)) = share.next_dirty() {
                runs(&bits).for_each(|run| {
                    black_box(stripe.first_page() + run.start..stripe.first_page() + run.end);
                });
            }
        }
        Ok(Counts::default())
    })
}

/// A sender over scattered pages that hold something: runs of one to eight pages.
pub(super) fn coalesce(work: u32) -> Result<impl FnMut() -> Result<Counts, Failure>, Failure> {
    let pages = u64::from(work) * UNIT_PAGES;
    let (ram, memory) = memory(pages)?;
    let mut dirty = DirtyBitmap::new(memory.layout());
    let mut random = Random::new(2);
    let mut page = 0;
    while page < pages {
        for page in page..(page + 1 + random.below(8)).min(pages) {
            dirty.set(0, page);
            ram.memory().write_obj(random.next() | 1, GuestAddress(page * PAGE_BYTES))?;
        }
        page += 8 + random.below(4);
    }
    Ok(round(ram, memory, dirty))
}

/// A sender over zero pages, which are all there.
pub(super) fn zero(work: u32) -> Result<impl FnMut() -> Result<Counts, Failure>, Failure> {
    let pages = u64::from(work) * UNIT_PAGES;
    let (ram, memory) = memory(pages)?;
    for page in 0..pages {
        ram.memory().write_obj(0_u64, GuestAddress(page * PAGE_BYTES))?;
    }
    let dirty = DirtyBitmap::all(memory.layout());
    Ok(round(ram, memory, dirty))
}

fn memory(pages: u64) -> Result<(Ram, Arc<GuestMemory>), Failure> {
    let ram = Ram::allocate(&[(0, pages * PAGE_BYTES)], Backing::Memfd)?;
    let memory = Arc::new(guest_memory(Arc::clone(ram.memory()))?);
    Ok((ram, memory))
}

fn round(
    ram: Ram,
    memory: Arc<GuestMemory>,
    dirty: DirtyBitmap,
) -> impl FnMut() -> Result<Counts, Failure> {
    move || {
        black_box(&ram);
        let (nobody, nowhere) = (DirtySources::new(Vec::new()), Box::new(Nowhere(0)));
        let small = Capabilities { max_batch_bytes: BATCH_BYTES, ..NOWHERE };
        black_box(send_round(&memory, &dirty, nobody, nowhere, small, BATCH_BYTES));
        Ok(Counts::default())
    }
}

/// A transport on which everything has landed at once. Counts batches.
#[derive(Debug)]
struct Nowhere(Ticket);

impl PageSender for Nowhere {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        black_box(runs);
        self.0 += 1;
        Ok(self.0)
    }

    fn watermarks(&mut self, _: Option<Duration>) -> Result<Watermarks, TransportError> {
        Ok(Watermarks { released: self.0, landed: self.0 })
    }

    fn counters(&self) -> ChannelCounters {
        ChannelCounters::default()
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        Ok(())
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::new(Nobody)
    }
}

/// The head of a batch of 64 runs, encoded and decoded; a unit of work is a thousand.
pub(super) fn framing(work: u32) -> Result<impl FnMut() -> Result<Counts, Failure>, Failure> {
    let layout = Layout::new(vec![RegionLayout {
        guest_addr: 0,
        len_bytes: 1 << 30,
        backing_page_bytes: PAGE_BYTES,
    }])?;
    let run = |index: u64| Run {
        range: PageRange { region: 0, first_page: index * 8, pages: 4 },
        kind: if index % 8 == 7 { RunKind::Zero } else { RunKind::Data },
    };
    let runs: Vec<Run> = (0..64).map(run).collect();
    let (mut head, mut decoded) = (Vec::new(), Vec::new());
    Ok(move || {
        for ticket in 1..=u64::from(work) * 1000 {
            encode_batch(ticket, black_box(&runs), false, &mut head);
            let lead: &[u8; LEAD_BYTES] = head[..LEAD_BYTES].try_into()?;
            let Header::Batch(header) = decode_header(black_box(lead), ticket)? else {
                return Err("a batch is decoded as something else".into());
            };
            let table = &head[HEADER_BYTES..HEADER_BYTES + header.table_bytes()];
            black_box(decode_table(&header, black_box(table), &layout, &mut decoded)?);
        }
        Ok(Counts::default())
    })
}

/// The work requests of a batch of 64 runs, each of one to eight pages; a unit of work is a thousand.
#[cfg(feature = "rdma")]
pub(super) fn work_requests(work: u32) -> Result<impl FnMut() -> Result<Counts, Failure>, Failure> {
    use pageferry_rdma::{RdmaOptions, hot::Building};

    let layout = Layout::new(vec![RegionLayout {
        guest_addr: 0,
        len_bytes: 64 << 30,
        backing_page_bytes: PAGE_BYTES,
    }])?;
    let mut random = Random::new(3);
    let mut runs = |_| -> Vec<Run> {
        let mut first_page = random.below(layout.pages() / 2);
        let run = |_| {
            let pages = 1 + u32::try_from(random.below(8)).unwrap_or(0);
            let range = PageRange { region: 0, first_page, pages };
            first_page += 16 + random.below(1 << 16);
            Run { range, kind: RunKind::Data }
        };
        (0..64).map(run).collect()
    };
    let batches: Vec<Vec<Run>> = (0..16).map(&mut runs).collect();
    let mut building = Building::new(&layout, &RdmaOptions::default())?;
    batches.iter().try_for_each(|batch| building.build(batch).map(drop))?;
    Ok(move || {
        let mut counts = Counts::default();
        for batch in batches.iter().cycle().take(work as usize * 1000) {
            let built = building.build(black_box(batch))?;
            counts.posted += built.posted;
            counts.signalled += built.signalled;
            counts.doorbells += built.doorbells;
        }
        Ok(counts)
    })
}
