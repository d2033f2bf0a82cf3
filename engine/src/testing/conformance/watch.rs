//! Who watches a case: keeps the first failure, ends both ends of every link then, and knows what
//! each thread is doing on the transport, so that a hang has a name.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};

use crate::transport::Interrupt;

/// Longest that a single operation may take before the case is ended.
const OPERATION_LIMIT: Duration = Duration::from_secs(60);
/// An operation that has been under way for so long waits for something.
const STILL: Duration = Duration::from_millis(30);
/// Who does not wait by now does not do so at all: a one-sided transport has nobody to wait for.
const MOVES: Duration = Duration::from_secs(1);
/// What has not begun by now does not, because its thread waits in something else: a send for memory to be
/// registered. A thread that is merely late has begun.
const LATE: Duration = Duration::from_secs(3);

/// What went wrong in a case.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum What {
    /// The transport does something else than the port says.
    Wrong(String),
    /// These operations did not end. The case did not expect that, and was ended from outside.
    Hung(String),
}

/// What happens in a case; shared by all of its threads.
#[derive(Debug, Default)]
pub(super) struct Watch(Mutex<State>);

#[derive(Default)]
struct State {
    failure: Option<What>,
    interrupts: Vec<Arc<dyn Interrupt>>,
    /// Operations under way, oldest first.
    operations: Vec<(u64, String, Instant)>,
    /// Operations there have been.
    begun: u64,
    /// When the first of each name began.
    firsts: BTreeMap<String, Instant>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("failure", &self.failure).finish_non_exhaustive()
    }
}

impl Watch {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends these too when the case fails.
    pub(super) fn add(&self, interrupts: impl IntoIterator<Item = Arc<dyn Interrupt>>) {
        self.state().interrupts.extend(interrupts);
    }

    /// Runs an operation of the transport under a name.
    pub(super) fn operation<T>(&self, name: impl FnOnce() -> String, run: impl FnOnce() -> T) -> T {
        let id = {
            let (mut state, name, now) = (self.state(), name(), Instant::now());
            state.begun += 1;
            let id = state.begun;
            state.firsts.entry(name.clone()).or_insert(now);
            state.operations.push((id, name, now));
            id
        };
        let result = run();
        self.state().operations.retain(|(other, ..)| *other != id);
        result
    }

    /// Whether an operation of this name has been under way for so long.
    fn is_under_way(&self, part_of_name: &str, time: Duration) -> bool {
        let state = self.state();
        let mut operations = state.operations.iter();
        operations.any(|(_, name, since)| name.contains(part_of_name) && since.elapsed() >= time)
    }

    /// Whether an operation of this name began so long ago, or longer.
    fn has_begun(&self, part_of_name: &str, time: Duration) -> bool {
        let state = self.state();
        let mut firsts = state.firsts.iter();
        firsts.any(|(name, since)| name.contains(part_of_name) && since.elapsed() >= time)
    }

    /// Keeps the first failure, and ends both ends of every link: nobody is to wait for a thread
    /// that has failed. By a thread of its own, since an interrupt may hang too.
    pub(super) fn fail(&self, what: What) {
        let interrupts = {
            let mut state = self.state();
            if state.failure.is_some() {
                return;
            }
            state.failure = Some(what);
            std::mem::take(&mut state.interrupts)
        };
        thread::spawn(move || interrupts.iter().for_each(|end| end.interrupt()));
    }

    pub(super) fn failure(&self) -> Option<What> {
        self.state().failure.clone()
    }

    /// Fails if an operation takes too long.
    pub(super) fn look(&self) {
        let now = Instant::now();
        let hung = {
            let state = self.state();
            let overdue = state.operations.first().is_some_and(|(_, _, since)| {
                now.saturating_duration_since(*since) > OPERATION_LIMIT
            });
            let described = state.operations.iter().map(|(_, name, since)| {
                format!("{name}, for {:?}", now.saturating_duration_since(*since))
            });
            overdue.then(|| described.collect::<Vec<_>>().join("; "))
        };
        if let Some(hung) = hung {
            self.fail(What::Hung(hung));
        }
    }

    /// Runs something, and keeps its panic as the failure.
    pub(super) fn keep<T>(&self, run: impl FnOnce() -> T) -> thread::Result<T> {
        let result = catch_unwind(AssertUnwindSafe(run));
        if let Err(panic) = &result {
            self.fail(What::Wrong(message(panic.as_ref())));
        }
        result
    }

    /// As [`thread::scope`]; when one thread fails, links end, and so the others do.
    pub(super) fn together<'env, T>(
        self: &Arc<Self>,
        run: impl for<'scope> FnOnce(&Crew<'scope, 'env>) -> T,
    ) -> T {
        thread::scope(|scope| {
            let crew = Crew { scope, watch: Arc::clone(self) };
            self.keep(|| run(&crew)).unwrap_or_else(|panic| resume_unwind(panic))
        })
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without words".to_owned())
}

/// Spawns threads of a case.
pub(super) struct Crew<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    watch: Arc<Watch>,
}

impl<'scope> Crew<'scope, '_> {
    pub(super) fn spawn<T: Send + 'scope>(
        &self,
        run: impl FnOnce() -> T + Send + 'scope,
    ) -> Task<T> {
        let (done, result) = bounded(1);
        let watch = Arc::clone(&self.watch);
        self.scope.spawn(move || {
            // Nobody may want the result.
            let _ = done.send(watch.keep(run));
        });
        Task { result }
    }

    /// Waits until an operation of this name seems to wait for something, or never does.
    pub(super) fn await_standstill(&self, part_of_name: &str) {
        let (began, watch) = (Instant::now(), &self.watch);
        let moves = || began.elapsed() >= MOVES && watch.has_begun(part_of_name, MOVES);
        while !watch.is_under_way(part_of_name, STILL) && !moves() && began.elapsed() < LATE {
            thread::sleep(STILL / 10);
        }
    }
}

/// A thread of a case.
pub(super) struct Task<T> {
    result: Receiver<thread::Result<T>>,
}

impl<T> Task<T> {
    pub(super) fn is_done(&self) -> bool {
        !self.result.is_empty()
    }

    /// Its result, as long as that takes.
    pub(super) fn join(self) -> T {
        let result = self.result.recv().expect("a thread leaves a result");
        result.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Its result, which must be there within [`PROMPT`](super::PROMPT), or the case fails by
    /// saying that `what` did not happen.
    pub(super) fn join_promptly(self, what: &str) -> T {
        let result = self.result.recv_timeout(super::PROMPT);
        let result = result.unwrap_or_else(|_| panic!("{what}: not within {:?}", super::PROMPT));
        result.unwrap_or_else(|panic| resume_unwind(panic))
    }
}
