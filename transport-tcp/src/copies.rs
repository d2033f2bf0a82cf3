//! Pages that pass through this process: where TLS is in it, and not in the kernel.

use pageferry::memory::PageRange;
use pageferry::transport::{Run, RunKind};

/// Most pages copied at once: a copy should still be in the caches when it is encrypted, or was decrypted.
const PIECE_PAGES: u32 = 32;

/// The data runs of a batch, in pieces.
pub(crate) fn pieces(runs: &[Run]) -> impl Iterator<Item = PageRange> {
    runs.iter().filter(|run| run.kind == RunKind::Data).flat_map(|run| {
        let PageRange { first_page, pages, .. } = run.range;
        (0..pages).step_by(PIECE_PAGES as usize).map(move |at| PageRange {
            first_page: first_page + u64::from(at),
            pages: (pages - at).min(PIECE_PAGES),
            ..run.range
        })
    })
}
