//! Dirty tracking: who wrote to which page since we last looked.
//!
//! A VM has several trackers at once (KVM's dirty log for vCPUs, the VMM's own bitmap for device
//! emulation, vhost-user, uffd-wp); [`DirtySources`] unites them behind the one contract of
//! [`DirtySource`]: **harvest, then re-arm, then read the page**.

mod bitmap;

use thiserror::Error;

pub use bitmap::{DirtyBitmap, STRIPE_WORDS, WORD_PAGES, pages_in, runs};

use crate::pages::memory::Layout;

/// Why a tracker failed.
#[derive(Debug, Error)]
#[error("dirty source {source_name}: failed to {operation}")]
pub struct DirtyError {
    /// Name of the source ([`DirtySource::name`]).
    pub source_name: &'static str,
    /// What was tried.
    pub operation: &'static str,
    /// The cause.
    #[source]
    pub cause: Box<dyn std::error::Error + Send + Sync>,
}

/// Something that knows which pages were written.
///
/// # Contract
///
/// Between [`start`](Self::start) and [`stop`](Self::stop), every write to a tracked page is
/// reported by a [`harvest`](Self::harvest) that begins after the write, and stays reported by
/// later harvests until the page is [re-armed](Self::rearm). A source may also forget what it
/// reported once it has reported it (a bitmap that is swapped out); the engine keeps harvested
/// bits. What a source must never do is lose a write:
///
/// 1. `harvest` adds the written pages to the bitmap; it clears no bit that is set there.
/// 2. `rearm` is called for harvested pages *before* their bytes are read. A write that happens
///    after `rearm` returned shows in a later harvest. A write before it is in the bytes that
///    will be read.
/// 3. `put_back` returns pages that were harvested, and maybe re-armed, but did not reach the
///    destination: the next harvest reports them again. It is how a failed migration leaves the
///    tracker as it found it, for the next attempt or for another user of the same tracker.
///
/// A write is over when its bytes are in memory. A source that learns of it earlier, as page tables do of
/// one to pages that are pinned for it, must be told again afterwards, or say that it does not see it.
///
/// A source that knows nothing about writes before `start` reports just those after it; the
/// engine sends all pages in the first round anyway.
///
/// # Thread safety
///
/// `start`, `harvest`, `put_back` and `stop` are called by one thread at a time. `rearm` is
/// called by several sender threads at once, while no harvest runs: for words that do not overlap,
/// except that a word of one call's set bits may be in the middle of another call, and 0 there.
pub trait DirtySource: Send + Sync {
    /// Short name for messages and statistics: "kvm dirty log".
    fn name(&self) -> &'static str;

    /// Begins tracking.
    fn start(&self) -> Result<(), DirtyError>;

    /// Adds all pages written and not re-armed since to `into`.
    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), DirtyError>;

    /// Re-arms tracking of pages that a harvest reported. `words` are bitmap words of `region`,
    /// the first of which starts at page `first_page`, a multiple of [`WORD_PAGES`]; set bits
    /// are the pages about to be read. Bits another source reported may be set too. What is
    /// known of pages whose bits are clear stays.
    ///
    /// A sender re-arms what it will read in the next ten milliseconds or so with one call, up to
    /// 4096 pages that lie anywhere in up to 16384 words. It may then read none of them, and re-arm
    /// them again.
    fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), DirtyError>;

    /// Takes back pages that were harvested and have not landed.
    fn put_back(&self, pages: &DirtyBitmap) -> Result<(), DirtyError>;

    /// Ends tracking. Called once for each successful `start`, also after failures.
    fn stop(&self) -> Result<(), DirtyError>;
}

/// All trackers of one VM, united.
pub struct DirtySources {
    sources: Vec<Box<dyn DirtySource>>,
}

impl std::fmt::Debug for DirtySources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.sources.iter().map(|source| source.name())).finish()
    }
}

impl DirtySources {
    /// Unites trackers. With none, only memory that nobody writes to can be migrated: every page
    /// is sent once.
    pub fn new(sources: Vec<Box<dyn DirtySource>>) -> Self {
        Self { sources }
    }

    /// Names, in order.
    pub fn names(&self) -> Vec<&'static str> {
        self.sources.iter().map(|source| source.name()).collect()
    }

    /// Starts all, or none.
    pub fn start(&self) -> Result<(), DirtyError> {
        for (index, source) in self.sources.iter().enumerate() {
            if let Err(error) = source.start() {
                for started in &self.sources[..index] {
                    if let Err(error) = started.stop() {
                        tracing::warn!(%error, "left a dirty source running");
                    }
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Harvests all into one bitmap.
    pub fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), DirtyError> {
        self.sources.iter().try_for_each(|source| source.harvest(into))?;
        into.trim();
        Ok(())
    }

    /// Re-arms pages in all.
    pub fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        self.sources.iter().try_for_each(|source| source.rearm(region, first_page, words))
    }

    /// Puts pages back. One source is enough, since harvests are united; the first takes them
    /// unless it fails.
    pub fn put_back(&self, pages: &DirtyBitmap) -> Result<(), DirtyError> {
        let mut result = Ok(());
        for source in &self.sources {
            result = source.put_back(pages);
            if result.is_ok() {
                break;
            }
        }
        result
    }

    /// Stops all; the first error is returned after all were tried.
    pub fn stop(&self) -> Result<(), DirtyError> {
        let mut result = Ok(());
        for source in &self.sources {
            let stopped = source.stop();
            if result.is_ok() {
                result = stopped;
            }
        }
        result
    }
}

impl DirtyBitmap {
    /// A bitmap with every page of `layout` set: what the first round sends.
    pub fn all(layout: &Layout) -> Self {
        let mut bitmap = Self::new(layout);
        bitmap.fill();
        bitmap
    }
}
