//! Destination memory made ready ahead of the data.
//!
//! A page that nobody has touched is allocated and zeroed when its bytes come, by the thread that
//! receives them. Threads that populate ahead (`MADV_POPULATE_WRITE`, madvise(2), Linux 5.14) take
//! that off the receivers, on CPUs that have nothing else to do. Only where the source has said
//! that there is data: what is zero stays untouched.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::migration::receiver::ReceiverReport;
use crate::migration::session::Session;
use crate::pages::memory::{GuestMemory, PageRange};
use crate::stats::Populated;
use crate::threads::ThreadRole;

/// Pages populated by one system call: two huge pages. Little enough to stop soon.
const PIECE_PAGES: u32 = 1024;

/// What the threads that populate share.
#[derive(Debug)]
pub(super) struct Populating {
    stop: AtomicBool,
    bytes: AtomicU64,
    /// Nanoseconds until the last thread was through, from the beginning.
    took_ns: AtomicU64,
    began: Instant,
}

impl Populating {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            stop: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
            took_ns: AtomicU64::new(0),
            began: Instant::now(),
        })
    }

    /// Starts the threads that populate memory.
    pub(super) fn start(
        self: &Arc<Self>,
        session: &mut Session<ReceiverReport>,
        threads: u16,
        memory: &Arc<GuestMemory>,
        ranges: Vec<PageRange>,
    ) -> Result<(), Error> {
        let pieces = Arc::new(Mutex::new(pieces(ranges)));
        for thread in 0..threads {
            let (memory, pieces) = (Arc::clone(memory), Arc::clone(&pieces));
            let populating = Arc::clone(self);
            session.spawn(ThreadRole::Populate(thread), move || {
                populating.work(&memory, &pieces);
            })?;
        }
        Ok(())
    }

    /// The body of a thread: populates pieces in the order they come, until there are no more.
    fn work(&self, memory: &GuestMemory, pieces: &Mutex<Pieces>) {
        let next = || pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
        while let Some(piece) = next() {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            match memory.populate(piece) {
                Ok(()) => self.bytes.fetch_add(piece.len_bytes(), Ordering::Relaxed),
                Err(error) => {
                    // Nothing is lost: pages are allocated as their bytes come.
                    tracing::warn!(%error, "guest memory is not populated ahead");
                    self.stop();
                    break;
                }
            };
        }
        let took = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.took_ns.fetch_max(took, Ordering::Relaxed);
    }

    /// Has all threads end soon.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub(super) fn statistics(&self, threads: u16) -> Populated {
        Populated {
            threads,
            bytes: self.bytes.load(Ordering::Relaxed),
            took: Duration::from_nanos(self.took_ns.load(Ordering::Relaxed)),
        }
    }
}

/// Ranges cut into pieces as they are asked for, in order: takes the room of the ranges alone.
struct Pieces {
    ranges: std::vec::IntoIter<PageRange>,
    rest: Option<PageRange>,
}

fn pieces(ranges: Vec<PageRange>) -> Pieces {
    Pieces { ranges: ranges.into_iter(), rest: None }
}

impl Iterator for Pieces {
    type Item = PageRange;

    fn next(&mut self) -> Option<PageRange> {
        let range = self.rest.take().or_else(|| self.ranges.next())?;
        let pages = range.pages.min(PIECE_PAGES);
        let first_page = range.first_page + u64::from(pages);
        let rest = PageRange { first_page, pages: range.pages - pages, ..range };
        self.rest = Some(rest).filter(|rest| rest.pages > 0);
        Some(PageRange { pages, ..range })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_what_they_are_cut_from() {
        let ranges = [
            PageRange { region: 1, first_page: 5, pages: 2500 },
            PageRange { region: 2, first_page: 0, pages: 1 },
        ];
        let cut: Vec<_> =
            pieces(ranges.to_vec()).map(|p| (p.region, p.first_page, p.pages)).collect();
        assert_eq!(cut, [(1, 5, 1024), (1, 1029, 1024), (1, 2053, 452), (2, 0, 1)]);
    }
}
