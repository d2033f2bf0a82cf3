//! What a process writes, line by line, to be waited for and looked at.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    lines: Vec<String>,
    ended: bool,
}

/// Collects the lines of a stream on a thread of its own.
pub(crate) struct Lines {
    shared: Arc<Shared>,
    /// Lines before this one were waited for already.
    next: usize,
    thread: Option<JoinHandle<()>>,
}

impl Lines {
    pub(crate) fn of(stream: impl Read + Send + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let thread = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || collect(stream, &shared))
        };
        Self { shared, next: 0, thread: Some(thread) }
    }

    /// The next line that contains `part`, of those that were not waited for yet. `None` when the
    /// stream ended without it or the time is over.
    pub(crate) fn wait_for(&mut self, part: &str, deadline: Instant) -> Option<String> {
        let mut state = self.shared.lock();
        loop {
            while let Some(line) = state.lines.get(self.next) {
                self.next += 1;
                if line.contains(part) {
                    return Some(line.clone());
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                return None;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All lines so far.
    pub(crate) fn so_far(&self) -> Vec<String> {
        self.shared.lock().lines.clone()
    }

    /// All lines, once everyone who could write more is gone.
    pub(crate) fn all(&mut self) -> Vec<String> {
        if let Some(thread) = self.thread.take() {
            thread.join().expect("collecting lines");
        }
        self.so_far()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn collect(stream: impl Read, shared: &Shared) {
    for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
        shared.lock().lines.push(String::from_utf8_lossy(&line).into_owned());
        shared.changed.notify_all();
    }
    shared.lock().ended = true;
    shared.changed.notify_all();
}
