//! The thread that serves write faults.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use pageferry::dirty::WORD_PAGES;
use pageferry::memory::GuestMemory;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::addresses::{addresses, page_addresses, page_at, whole_pages};
use crate::bits::words_for;
use crate::pages::AtomicPages;
use crate::uffd;

/// From one word with something set to the next in a heap, at most.
const HEAP_WORDS: usize = 2;

/// What the thread and the source share while memory is tracked.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) uffd: OwnedFd,
    memory: Arc<GuestMemory>,
    /// Pages written. What is not protected is set here; what is set may be protected.
    pub(super) dirty: AtomicPages,
    /// Keeps that promise: the thread sets bits and then lets writes go on, re-arming clears
    /// bits and protects. Were a fault read from the userfaultfd before, and its page let go
    /// after a re-arm that came between, its bit would be lost. (Several threads that write to
    /// one page raise a fault each, so there are such late ones.) Re-arming reads, and the
    /// thread writes.
    order: RwLock<()>,
    /// Readable when the thread is to end.
    end: OwnedFd,
    /// Why the thread ended by itself.
    failure: OnceLock<Arc<io::Error>>,
}

impl Shared {
    pub(super) fn new(uffd: OwnedFd, memory: Arc<GuestMemory>) -> io::Result<Self> {
        let dirty = AtomicPages::new(memory.layout());
        let end = eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Self { uffd, memory, dirty, order: RwLock::new(()), end, failure: OnceLock::new() })
    }

    pub(super) fn failure(&self) -> Option<&Arc<io::Error>> {
        self.failure.get()
    }

    /// Makes the thread end.
    pub(super) fn end(&self) -> io::Result<()> {
        rustix::io::write(&self.end, &1_u64.to_ne_bytes()).map(drop).map_err(io::Error::from)
    }

    /// Serves faults until it is told to end, or cannot.
    pub(super) fn serve(&self) {
        let Err(cause) = self.serve_all() else { return };
        tracing::error!(error = %cause, "write faults are not served any more");
        // First, so that nobody believes that a write would be noted.
        let _ = self.failure.set(Arc::new(cause));
        // Nobody may wait for ever.
        for region in self.memory.regions() {
            if let Err(error) = uffd::unregister(&self.uffd, &addresses(region)) {
                tracing::error!(%error, "left guest memory write-protected with no one to serve");
            }
        }
    }

    fn serve_all(&self) -> io::Result<()> {
        loop {
            let mut polled =
                [PollFd::new(&self.uffd, PollFlags::IN), PollFd::new(&self.end, PollFlags::IN)];
            match poll(&mut polled, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !polled[1].revents().is_empty() {
                return Ok(());
            }
            if polled[0].revents().intersects(PollFlags::ERR | PollFlags::HUP) {
                return Err(io::Error::other("the userfaultfd is in an error state"));
            }
            let faults = uffd::faults(&self.uffd)?.filter(|fault| fault.protected);
            let _order = self.order.write().unwrap_or_else(PoisonError::into_inner);
            faults.into_iter().try_for_each(|fault| self.let_go(fault.address))?;
        }
    }

    /// Notes the page at an address, and lets writes to it go on.
    fn let_go(&self, address: u64) -> io::Result<()> {
        let Some((index, page)) = page_at(&self.memory, address) else {
            return Err(io::Error::other(format!("a fault at {address:#x}, which is not tracked")));
        };
        let region = &self.memory.regions()[usize::from(index)];
        let pages = whole_pages(region, page..page + 1);
        self.dirty.set(index, pages.clone());
        uffd::protect::allow_writes(&self.uffd, &page_addresses(region, &pages))
    }

    /// Clears the pages set in `words` and protects them. `words` lie inside the region.
    pub(super) fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> io::Result<()> {
        heaps(words).try_for_each(|heap| {
            self.rearm_heap(region, first_page + heap.start as u64 * WORD_PAGES, &words[heap])
        })
    }

    fn rearm_heap(&self, region: u16, first_page: u64, words: &[u64]) -> io::Result<()> {
        let first_word = words_for(first_page);
        let mine = &self.dirty.region(region)[first_word..first_word + words.len()];
        let set = |word: usize| mine[word].load(Ordering::Acquire) & words[word];
        // What is not set is protected: nothing to do for it. The lock is not needed to see
        // that, for what is set from now on is reported later.
        if (0..words.len()).all(|word| set(word) == 0) {
            return Ok(());
        }
        let _order = self.order.read().unwrap_or_else(PoisonError::into_inner);
        // Under the lock no bit is added, so that exactly what is cleared is protected.
        let Some(first) = (0..words.len()).find(|word| set(*word) != 0) else { return Ok(()) };
        let last = (first..words.len()).rfind(|word| set(*word) != 0).unwrap_or(first);
        let start = first as u64 * WORD_PAGES + u64::from(set(first).trailing_zeros());
        let end = (last as u64 + 1) * WORD_PAGES - u64::from(set(last).leading_zeros());
        let described = &self.memory.regions()[usize::from(region)];
        let pages = whole_pages(described, first_page + start..first_page + end);
        for (mine, theirs) in mine[first..=last].iter().zip(&words[first..=last]) {
            mine.fetch_and(!theirs, Ordering::AcqRel);
        }
        // In one call: it passes over what is protected already, and to protect a page that
        // stays set does no harm.
        uffd::protect::write_protect(&self.uffd, &page_addresses(described, &pages))
    }
}

/// Words with something set that lie close together, for one call each: it looks at all pages from
/// the first to the last, and writes wait as long.
fn heaps(words: &[u64]) -> impl Iterator<Item = Range<usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at + words[at..].iter().position(|word| *word != 0)?;
        at = start + 1;
        while let Some(next) = words[at..].iter().take(HEAP_WORDS).position(|word| *word != 0) {
            at += next + 1;
        }
        Some(start..at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_protected_in_heaps() {
        let heaps = |words: &[u64]| heaps(words).collect::<Vec<_>>();
        assert_eq!(heaps(&[]), []);
        assert_eq!(heaps(&[0, 0]), []);
        assert_eq!(heaps(&[0, 1, 0, 2, 0, 0, 4, 8, 0]), [1..4, 6..8]);
    }
}
