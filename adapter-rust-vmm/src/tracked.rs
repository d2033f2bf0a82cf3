//! What all dirty sources of this crate have in common.

use std::sync::atomic::{AtomicBool, Ordering};

use pageferry::dirty::{DirtyBitmap, DirtyError, DirtySource};
use pageferry::memory::Layout;

use crate::carry::CarryOver;
use crate::misuse::{MisuseError, dirty_error};

/// What differs from one dirty source to the next: how writes are seen. When it is called is up to
/// [`Tracked`], which keeps the order of [`DirtySource`]'s contract.
pub trait Tracker: Send + Sync {
    /// Name of the source in messages and statistics.
    const NAME: &'static str;
    /// How things are left when `stop` fails, for the log: "left …".
    const LEFT: &'static str;

    /// Why it fails.
    type Error: std::error::Error + From<MisuseError> + Send + Sync + 'static;

    /// Begins; not twice in a row.
    fn start(&self) -> Result<(), Self::Error>;

    /// Adds the pages that were written to a bitmap of the memory map.
    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), Self::Error>;

    /// Re-arms pages; the words lie inside a region. Several threads at once.
    fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), Self::Error>;

    /// Ends, after a start.
    fn stop(&self) -> Result<(), Self::Error>;
}

/// A dirty source that sees writes by a tracker, carries over what is put back, and refuses what the contract
/// of [`DirtySource`] does not allow. Dropped while it tracks, it stops.
#[derive(Debug)]
pub struct Tracked<T: Tracker> {
    pub(crate) tracker: T,
    carry: CarryOver,
    /// Read by re-arming threads, which must not wait for a lock.
    started: AtomicBool,
}

impl<T: Tracker> Tracked<T> {
    /// For all of a memory map.
    pub(crate) fn by(tracker: T, layout: &Layout) -> Self {
        Self { tracker, carry: CarryOver::new(layout), started: AtomicBool::new(false) }
    }

    fn check_started(&self) -> Result<(), MisuseError> {
        let started = self.started.load(Ordering::Acquire);
        if started { Ok(()) } else { Err(MisuseError::NotStarted) }
    }

    fn try_start(&self) -> Result<(), T::Error> {
        if self.started.load(Ordering::Acquire) {
            return Err(MisuseError::AlreadyStarted.into());
        }
        self.tracker.start()?;
        self.started.store(true, Ordering::Release);
        Ok(())
    }

    fn try_harvest(&self, into: &mut DirtyBitmap) -> Result<(), T::Error> {
        self.check_started()?;
        // Checks the bitmap, before anything is taken that would have no place to go.
        self.carry.harvest(into)?;
        self.tracker.harvest(into)
    }

    fn try_rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), T::Error> {
        self.check_started()?;
        // Checks the range.
        self.carry.rearmed(region, first_page, words)?;
        self.tracker.rearm(region, first_page, words)
    }

    fn try_stop(&self) -> Result<(), T::Error> {
        if !self.started.swap(false, Ordering::AcqRel) {
            return Err(MisuseError::NotStarted.into());
        }
        self.tracker.stop()
    }
}

impl<T: Tracker> DirtySource for Tracked<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn start(&self) -> Result<(), DirtyError> {
        self.try_start().map_err(|error| dirty_error(T::NAME, "start", error))
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), DirtyError> {
        self.try_harvest(into).map_err(|error| dirty_error(T::NAME, "harvest", error))
    }

    fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        self.try_rearm(region, first_page, words)
            .map_err(|error| dirty_error(T::NAME, "re-arm", error))
    }

    fn put_back(&self, pages: &DirtyBitmap) -> Result<(), DirtyError> {
        self.carry.put_back(pages).map_err(|error| dirty_error(T::NAME, "put pages back", error))
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.try_stop().map_err(|error| dirty_error(T::NAME, "stop", error))
    }
}

impl<T: Tracker> Drop for Tracked<T> {
    fn drop(&mut self) {
        if self.started.load(Ordering::Acquire)
            && let Err(error) = self.try_stop()
        {
            tracing::warn!(%error, "left {}", T::LEFT);
        }
    }
}
