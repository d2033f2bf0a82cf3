//! The memory that is moved, and what is in it.

use std::num::NonZero;
use std::ops::Range;
use std::sync::Arc;
use std::thread;

use pageferry::memory::{GuestMemory, PAGE_BYTES};
use pageferry_cli::outcome::Failure;
use pageferry_rust_vmm::guest_memory;
use pageferry_vmm::ram::{HUGE_PAGE_BYTES, Ram};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::wire::Setup;
use crate::random::Random;

/// Zero pages come in blocks of so many.
const ZERO_BLOCK_PAGES: u64 = 16;

/// Written at once when memory is filled: one block.
const BLOCK_BYTES: usize = 16 * 4096;

/// Maps memory as the setup says, all of it zero and none of it allocated.
pub(super) fn map(setup: &Setup) -> Result<Ram, Failure> {
    Ok(Ram::allocate(&[(0, setup.memory_bytes)], setup.backing)?)
}

/// Describes memory to the engine.
pub(super) fn describe(ram: &Ram) -> Result<Arc<GuestMemory>, Failure> {
    Ok(Arc::new(guest_memory(Arc::clone(ram.memory()))?))
}

/// Which blocks of pages are zero: that share of them, evenly spread.
#[derive(Debug, Clone, Copy)]
pub(super) struct ZeroBlocks {
    share: f64,
}

impl ZeroBlocks {
    pub(super) fn new(share: f64) -> Self {
        Self { share }
    }

    pub(super) fn contain(self, page: u64) -> bool {
        let block = (page / ZERO_BLOCK_PAGES) as f64;
        ((block + 1.0) * self.share).floor() > (block * self.share).floor()
    }
}

/// Writes every page, with random bytes or with zeroes.
pub(super) fn fill(memory: &GuestMemoryMmap<()>, setup: &Setup) -> Result<(), Failure> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    thread::scope(|scope| {
        let filling: Vec<_> = parts(setup.memory_bytes, threads)
            .map(|part| scope.spawn(|| fill_part(memory, part, ZeroBlocks::new(setup.zero_share))))
            .collect();
        filling.into_iter().try_for_each(|thread| {
            thread.join().map_err(|_| Failure::from("failed to fill memory: a thread panicked"))?
        })
    })
}

fn fill_part(
    memory: &GuestMemoryMmap<()>,
    part: Range<u64>,
    zeroes: ZeroBlocks,
) -> Result<(), Failure> {
    let mut random = Random::new(part.start);
    let mut block = vec![0; BLOCK_BYTES];
    let block_bytes = BLOCK_BYTES as u64;
    let mut at = part.start;
    while at < part.end {
        // To the end of the block, since a part may begin inside one.
        let len_bytes = (block_bytes - at % block_bytes).min(part.end - at);
        let bytes = &mut block[..usize::try_from(len_bytes)?];
        if zeroes.contain(at / PAGE_BYTES) {
            bytes.fill(0);
        } else {
            random.fill(bytes);
        }
        memory.write_slice(bytes, GuestAddress(at))?;
        at += len_bytes;
    }
    Ok(())
}

/// Cuts memory into contiguous parts of whole pages; whole huge pages where there are enough.
pub(super) fn parts(memory_bytes: u64, parts: usize) -> impl Iterator<Item = Range<u64>> {
    let parts = parts as u64;
    let unit = if memory_bytes >= parts * HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { PAGE_BYTES };
    let units = memory_bytes.div_ceil(unit);
    let bound = move |part: u64| (units * part / parts * unit).min(memory_bytes);
    (0..parts).map(move |part| bound(part)..bound(part + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_memory_in_whole_pages() {
        for (memory_bytes, count) in [(64 << 20, 3), (4096 * 7, 7), (4096 * 9, 2), (2 << 20, 1)] {
            let all: Vec<_> = parts(memory_bytes, count).collect();
            assert_eq!(all.len(), count);
            assert_eq!((all[0].start, all[count - 1].end), (0, memory_bytes));
            assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert!(all.iter().all(|part| part.start % PAGE_BYTES == 0 && !part.is_empty()));
        }
    }

    #[test]
    fn the_share_of_zero_blocks_is_exact() {
        for (share, expected) in [(0.0, 0), (0.25, 250), (0.5, 500), (1.0, 1000)] {
            let zeroes = ZeroBlocks::new(share);
            let found = (0..1000).filter(|block| zeroes.contain(block * ZERO_BLOCK_PAGES)).count();
            assert_eq!(found, expected, "{share}");
        }
    }
}
