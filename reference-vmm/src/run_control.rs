//! Starting and stopping a guest's threads.
//!
//! Each virtual CPU is a thread that runs, or is *parked*: outside the guest, touching nothing.
//! Stopping is a request that the thread notices by itself, helped by a kick for one that is
//! inside the guest. A kick that comes just before it enters is lost, so kicks are repeated until
//! the thread has parked.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fmt, io};

/// How long a kick may take before it counts as lost.
const KICK_INTERVAL: Duration = Duration::from_micros(200);

/// What the threads should be doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Target {
    Paused,
    Running,
    Quit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Parked,
    Running,
}

/// What a parked thread is to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    Run,
    Quit,
}

/// Called once, with the reason, by the thread that failed.
pub(crate) type OnFailure = Box<dyn FnOnce(&str) + Send>;

/// Shared by a guest and its threads.
#[derive(Debug)]
pub(crate) struct RunControl {
    /// Mirrors `State::target`, for threads to look at without the lock.
    target: AtomicU8,
    state: Mutex<State>,
    changed: Condvar,
    /// By how many percent each thread is to be slowed down.
    throttle: Box<[AtomicU8]>,
}

struct State {
    target: Target,
    phases: Vec<Phase>,
    failure: Option<String>,
    /// Who is told of a failure.
    on_failure: Option<OnFailure>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("target", &self.target)
            .field("phases", &self.phases)
            .field("failure", &self.failure)
            .finish_non_exhaustive()
    }
}

impl RunControl {
    fn new(workers: usize) -> Self {
        let state = State {
            target: Target::Paused,
            phases: vec![Phase::Parked; workers],
            failure: None,
            on_failure: None,
        };
        Self {
            target: AtomicU8::new(Target::Paused as u8),
            state: Mutex::new(state),
            changed: Condvar::new(),
            throttle: (0..workers).map(|_| AtomicU8::new(0)).collect(),
        }
    }

    /// Whether the threads may go on. Cheap.
    pub(crate) fn running(&self) -> bool {
        self.target.load(Ordering::Acquire) == Target::Running as u8
    }

    /// Waits until the deadline, or until the threads are to stop.
    pub(crate) fn wait_while_running(&self, deadline: Instant) {
        let mut state = self.lock();
        while state.target == Target::Running {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return };
            if left.is_zero() {
                return;
            }
            state = self.wait(state, left);
        }
    }

    /// By how many percent a thread is to be slowed down.
    pub(crate) fn throttle(&self, worker: usize) -> u8 {
        self.throttle.get(worker).map_or(0, |percent| percent.load(Ordering::Relaxed))
    }

    /// Slows threads down from their next beat on. One that no percentage is given for keeps its own.
    pub(crate) fn set_throttle(&self, percents: &[u8]) {
        for (throttle, percent) in self.throttle.iter().zip(percents) {
            throttle.store((*percent).min(99), Ordering::Relaxed);
        }
    }

    /// Why the guest ended by itself, if it did.
    pub(crate) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// Has `hear` called with the reason once a thread fails, now if one has.
    pub(crate) fn on_failure(&self, hear: OnFailure) {
        let mut state = self.lock();
        match &state.failure {
            Some(reason) => hear(reason),
            None => state.on_failure = Some(hear),
        }
    }

    fn park(&self, worker: usize) -> Next {
        let mut state = self.lock();
        state.phases[worker] = Phase::Parked;
        self.changed.notify_all();
        loop {
            match state.target {
                Target::Quit => return Next::Quit,
                Target::Running => {
                    state.phases[worker] = Phase::Running;
                    return Next::Run;
                }
                Target::Paused => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Notes the first failure and stops all threads: a guest that lost a virtual CPU is done.
    fn fail(&self, reason: String) {
        let mut state = self.lock();
        if let Some(hear) = state.on_failure.take() {
            hear(&reason);
        }
        state.failure.get_or_insert(reason);
        if state.target == Target::Running {
            self.set(&mut state, Target::Paused);
        }
    }

    fn set(&self, state: &mut State, target: Target) {
        state.target = target;
        self.target.store(target as u8, Ordering::Release);
        self.changed.notify_all();
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a thread leave the guest.
pub(crate) type Kick = fn(&JoinHandle<()>);

/// A guest's threads. Dropping it ends and joins them.
pub(crate) struct Workers {
    control: Arc<RunControl>,
    threads: Vec<JoinHandle<()>>,
    kick: Kick,
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers").field("control", &self.control).finish_non_exhaustive()
    }
}

/// The threads did not stop in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StillRunning {
    pub(crate) vcpus: usize,
}

impl Workers {
    /// Starts a parked thread for each body. A body runs the guest until the control says stop,
    /// and is called again for every resume.
    pub(crate) fn spawn<F>(bodies: Vec<F>, kick: Kick) -> io::Result<Self>
    where
        F: FnMut(&RunControl) -> Result<(), String> + Send + 'static,
    {
        let control = Arc::new(RunControl::new(bodies.len()));
        let mut workers = Self { control, threads: Vec::with_capacity(bodies.len()), kick };
        for (worker, mut body) in bodies.into_iter().enumerate() {
            let control = workers.control.clone();
            let thread = thread::Builder::new().name(format!("vcpu{worker}")).spawn(move || {
                let _parked_at_last = ParkOnPanic { control: &control, worker };
                while control.park(worker) == Next::Run {
                    if let Err(reason) = body(&control) {
                        control.fail(format!("vcpu {worker} {reason}"));
                    }
                }
            })?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    pub(crate) fn control(&self) -> &RunControl {
        &self.control
    }

    pub(crate) fn resume(&self) {
        self.control.set(&mut self.control.lock(), Target::Running);
    }

    /// Returns once every thread has parked. If one does not in time, the request stays.
    pub(crate) fn pause(&self, timeout: Duration) -> Result<(), StillRunning> {
        let deadline = Instant::now() + timeout;
        let mut state = self.control.lock();
        self.control.set(&mut state, Target::Paused);
        loop {
            let running = state.phases.iter().zip(&self.threads);
            let running = running.filter(|(phase, _)| **phase == Phase::Running);
            let mut vcpus = 0;
            for (_, thread) in running {
                vcpus += 1;
                (self.kick)(thread);
            }
            if vcpus == 0 {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(StillRunning { vcpus });
            }
            state = self.control.wait(state, KICK_INTERVAL);
        }
    }

    /// Whether every thread stands still and will until the next resume.
    pub(crate) fn is_paused(&self) -> bool {
        let state = self.control.lock();
        state.target != Target::Running && state.phases.iter().all(|p| *p == Phase::Parked)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.control.set(&mut self.control.lock(), Target::Quit);
        for thread in self.threads.drain(..) {
            while !thread.is_finished() {
                (self.kick)(&thread);
                thread::sleep(KICK_INTERVAL);
            }
            // A panic was already reported as the guest's failure.
            let _ = thread.join();
        }
    }
}

/// Without it a panic in a thread would make every later pause wait for it.
struct ParkOnPanic<'a> {
    control: &'a RunControl,
    worker: usize,
}

impl Drop for ParkOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.control.fail(format!("vcpu {} panicked", self.worker));
            let mut state = self.control.lock();
            state.phases[self.worker] = Phase::Parked;
            self.control.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(20);

    #[test]
    fn threads_park_and_go_on() {
        let steps = Arc::new(AtomicU64::new(0));
        let bodies: Vec<_> = (0..3)
            .map(|_| {
                let steps = steps.clone();
                move |control: &RunControl| {
                    while control.running() {
                        steps.fetch_add(1, Ordering::Relaxed);
                        control.wait_while_running(Instant::now() + Duration::from_secs(60));
                    }
                    Ok(())
                }
            })
            .collect();
        let workers = Workers::spawn(bodies, |_| ()).unwrap();
        assert!(workers.is_paused());
        for round in 1..=50 {
            workers.resume();
            while steps.load(Ordering::Relaxed) < round * 3 {
                thread::yield_now();
            }
            workers.pause(TIMEOUT).unwrap();
            assert!(workers.is_paused());
            assert_eq!(steps.load(Ordering::Relaxed), round * 3);
        }
    }

    #[test]
    fn a_failure_stops_the_others_and_is_kept() {
        let body = |fails| {
            move |control: &RunControl| {
                if fails {
                    return Err("broke".to_owned());
                }
                control.wait_while_running(Instant::now() + TIMEOUT);
                Ok(())
            }
        };
        let workers = Workers::spawn(vec![body(false), body(true)], |_| ()).unwrap();
        workers.resume();
        while workers.control().failure().is_none() {
            thread::yield_now();
        }
        workers.pause(TIMEOUT).unwrap();
        assert_eq!(workers.control().failure().as_deref(), Some("vcpu 1 broke"));
    }

    #[test]
    fn a_thread_that_does_not_stop_is_reported() {
        let release = Arc::new((Mutex::new(false), Condvar::new()));
        let held = release.clone();
        let body = move |_: &RunControl| {
            let mut released = held.0.lock().unwrap();
            while !*released {
                released = held.1.wait(released).unwrap();
            }
            Ok(())
        };
        let workers = Workers::spawn(vec![body], |_| ()).unwrap();
        workers.resume();
        while workers.control().lock().phases[0] == Phase::Parked {
            thread::yield_now();
        }
        let result = workers.pause(Duration::from_millis(5));
        assert_eq!(result, Err(StillRunning { vcpus: 1 }));
        *release.0.lock().unwrap() = true;
        release.1.notify_all();
        workers.pause(TIMEOUT).unwrap();
    }
}
