//! What both ends of a link with a fault know.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pageferry::memory::GuestMemory;
use pageferry::transport::{Interrupt, Run, TransportError};

use crate::fault::Fault;

#[derive(Default)]
struct State {
    over: bool,
    /// Batches under way, by channel.
    lanes: HashMap<usize, VecDeque<Vec<Run>>>,
    kept: Vec<Arc<GuestMemory>>,
}

/// The fault of a link, and what it needs to be one.
pub(crate) struct Plot {
    pub(crate) fault: Fault,
    /// One did not go out.
    pub(crate) frames_are_lost: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

impl Plot {
    pub(crate) fn new(fault: Fault) -> Arc<Self> {
        let frames_are_lost = AtomicBool::new(false);
        Arc::new(Self { fault, frames_are_lost, state: Mutex::default(), changed: Condvar::new() })
    }

    pub(crate) fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of everyone who hangs.
    pub(crate) fn end(&self) {
        self.state().over = true;
        self.changed.notify_all();
    }

    /// Does nothing for so long, or until all is over.
    pub(crate) fn idle(&self, time: Duration) {
        let waits = self.changed.wait_timeout_while(self.state(), time, |state| !state.over);
        drop(waits.unwrap_or_else(PoisonError::into_inner));
    }

    /// Hangs until all is over.
    pub(crate) fn hang<T>(&self) -> Result<T, TransportError> {
        self.idle(Duration::from_secs(24 * 60 * 60));
        Err(lost())
    }

    pub(crate) fn keep(&self, memory: &Arc<GuestMemory>) {
        self.state().kept.push(Arc::clone(memory));
    }

    pub(crate) fn goes_out(&self, channel: usize, runs: &[Run]) {
        self.state().lanes.entry(channel).or_default().push_back(runs.to_vec());
    }

    /// What was to go out did not.
    pub(crate) fn went_back(&self, channel: usize) {
        self.state().lanes.entry(channel).or_default().pop_back();
    }

    pub(crate) fn came_in(&self, channel: usize) -> Vec<Run> {
        self.state().lanes.entry(channel).or_default().pop_front().unwrap_or_default()
    }

    /// Whether pages are under way, which have nothing to do with frames.
    pub(crate) fn has_pages_under_way(&self) -> bool {
        let state = self.state();
        !state.over && state.lanes.values().any(|lane| !lane.is_empty())
    }
}

pub(crate) fn lost() -> TransportError {
    TransportError::Lost { operation: "go on", cause: io::ErrorKind::BrokenPipe.into() }
}

/// Interrupts nobody.
pub(crate) struct Deaf;

impl Interrupt for Deaf {
    fn interrupt(&self) {}
}

/// An interrupter that keeps guest memory.
pub(crate) struct Keeping(
    pub(crate) Arc<dyn Interrupt>,
    #[expect(dead_code, reason = "kept, which is the fault")] pub(crate) Option<Arc<GuestMemory>>,
);

impl Interrupt for Keeping {
    fn interrupt(&self) {
        self.0.interrupt();
    }
}
