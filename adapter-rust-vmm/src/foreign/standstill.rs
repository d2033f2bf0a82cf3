//! Looking at what was written while nobody writes.

use std::error::Error;
use std::sync::Arc;

use pageferry::dirty::{DirtyBitmap, DirtyError, DirtySource};
use thiserror::Error;

use crate::misuse::dirty_error;

/// Makes all that writes guest memory stand still for a moment: QEMU's `stop` and `cont`.
pub trait Standstill: Send + Sync {
    /// Nothing writes from its return on, and what was under way has been written. Also when the guest is paused
    /// already.
    fn hold(&self) -> Result<(), Box<dyn Error + Send + Sync>>;

    /// As before [`hold`](Self::hold), which may have failed: a guest that was paused then stays paused.
    fn let_go(&self) -> Result<(), Box<dyn Error + Send + Sync>>;
}

/// A guest did not stand still, or did not go on.
#[derive(Debug, Error)]
#[error("failed to {operation}")]
pub struct StandstillError {
    operation: &'static str,
    #[source]
    cause: Box<dyn Error + Send + Sync>,
}

/// A dirty source that has the guest [stand still](Standstill) for its start and for each harvest.
///
/// For writes that are seen only once they are over, if nobody looked in between: `O_DIRECT` reads of the VMM's,
/// whose pages the kernel takes first and fills later. And for sources that read what was written in one step
/// and forget it in another.
pub struct Pulsed<S> {
    inner: S,
    standstill: Arc<dyn Standstill>,
}

impl<S: std::fmt::Debug> std::fmt::Debug for Pulsed<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pulsed").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl<S: DirtySource> Pulsed<S> {
    /// Looks by `inner`, when `standstill` has the guest.
    pub fn by(inner: S, standstill: Arc<dyn Standstill>) -> Self {
        Self { inner, standstill }
    }

    fn pulse(
        &self,
        operation: &'static str,
        look: impl FnOnce() -> Result<(), DirtyError>,
    ) -> Result<(), DirtyError> {
        let failed = |tried| {
            move |cause| {
                let cause = StandstillError { operation: tried, cause };
                dirty_error(self.inner.name(), operation, cause)
            }
        };
        let held = self.standstill.hold().map_err(failed("make the guest stand still"));
        let looked = held.and_then(|()| look());
        // Also when it does not stand still, or only part of it does.
        let let_go = self.standstill.let_go().map_err(failed("let the guest go on"));
        looked.and(let_go)
    }
}

impl<S: DirtySource> DirtySource for Pulsed<S> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    /// What is under way when tracking starts would be written after it, and not be seen.
    fn start(&self) -> Result<(), DirtyError> {
        self.pulse("start", || self.inner.start())
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), DirtyError> {
        self.pulse("harvest", || self.inner.harvest(into))
    }

    fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        self.inner.rearm(region, first_page, words)
    }

    fn put_back(&self, pages: &DirtyBitmap) -> Result<(), DirtyError> {
        self.inner.put_back(pages)
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.inner.stop()
    }
}
