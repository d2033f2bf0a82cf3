//! Faults: a guest that runs while pages are missing waits for those that it touches.
//!
//! A destination of post-copy lets its guest run before all of its pages are there. Who touches one that is not waits;
//! a [`FaultSource`] tells of it, and makes the page visible once it has landed.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::pages::dirty::DirtyBitmap;
use crate::pages::memory::{GuestMemory, PageRange};

/// Why faults cannot be told of or resolved.
#[derive(Debug, Error)]
#[error("fault source {source_name}: failed to {operation}")]
pub struct FaultError {
    /// Name of the source ([`FaultSource::name`]).
    pub source_name: &'static str,
    /// What was tried.
    pub operation: &'static str,
    /// The cause.
    #[source]
    pub cause: Box<dyn std::error::Error + Send + Sync>,
}

/// Somebody waits for a page.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Index of the region.
    pub region: u16,
    /// The page, counted from the start of the region.
    pub page: u64,
    /// The system's number of the thread that waits, where that is known.
    pub thread: Option<u32>,
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {} of region {}", self.page, self.region)?;
        self.thread.map_or(Ok(()), |thread| write!(f, " for thread {thread}"))
    }
}

/// Something that holds back who touches a page that is missing.
///
/// # Contract
///
/// 1. Missing pages land in [`landing`](Self::landing), whoever waits for them or not. What is in there is not seen.
/// 2. From [`begin`](Self::begin) on nobody sees anything of a missing page: neither what was in its place before nor
///    a part of what lands. Who touches it waits, be it the guest, the process or the kernel on their behalf.
/// 3. [`resolve`](Self::resolve) is called when all of a range has landed, and makes it visible whole. Who waits for
///    it goes on. It may be called again for the same pages, and then changes nothing.
/// 4. A source that is dropped while pages are missing lets nobody see them: who touches one waits for ever.
///
/// # Thread safety
///
/// `begin` is called once, while the guest stands still; then `next` by one thread at a time, and `resolve` by several
/// at once, for ranges that do not overlap. [`end`](Self::end) comes after all of them.
pub trait FaultSource: Send + Sync {
    /// Short name for messages and statistics: "userfaultfd".
    fn name(&self) -> &'static str;

    /// Where missing pages land: memory of the same layout as the guest's.
    fn landing(&self) -> &Arc<GuestMemory>;

    /// Has the pages that are set in `missing` missing. What the guest's memory holds of them is gone, even if this
    /// fails.
    fn begin(&self, missing: &DirtyBitmap) -> Result<(), FaultError>;

    /// Waits until somebody waits for missing pages, until it is [woken](Self::wake), or at most so long, and adds
    /// those pages to `faults`. A page may be told of several times, and again just after it was resolved.
    fn next(&self, faults: &mut Vec<Fault>, timeout: Duration) -> Result<(), FaultError>;

    /// All of these pages has landed.
    fn resolve(&self, pages: PageRange) -> Result<(), FaultError>;

    /// Ends a [`next`](Self::next), now or the next one.
    fn wake(&self);

    /// Bytes of pages that had to be copied to become visible. 0 where that is by page tables alone.
    fn copied_bytes(&self) -> u64;

    /// Nothing is missing any more: memory is as it was before `begin`. An error, and nothing changes, if something is.
    fn end(&self) -> Result<(), FaultError>;
}
