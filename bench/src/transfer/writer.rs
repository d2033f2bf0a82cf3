//! A thread that writes to memory while the engine moves it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pageferry::memory::PAGE_BYTES;
use pageferry_cli::outcome::Failure;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::memory::ZeroBlocks;
use super::wire::Setup;
use crate::random::Random;
use crate::usage::thread_cpu_nanoseconds;

/// How often it gets up to write what is due.
const TICK: Duration = Duration::from_millis(1);

/// The most that it catches up on, when it could not run.
const CATCH_UP: Duration = Duration::from_millis(20);

/// The thread, until it is stopped.
#[derive(Debug)]
pub(super) struct Writer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<u64, String>>>,
}

impl Writer {
    /// Writes to random pages, so many a second. Zero pages stay zero and others stay random.
    pub(super) fn start(memory: Arc<GuestMemoryMmap<()>>, setup: &Setup) -> Result<Self, Failure> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, setup) = (Arc::clone(&stop), setup.clone());
        let thread = thread::Builder::new()
            .name("writer".into())
            .spawn(move || write(&memory, &setup, &stopped))
            .map_err(|error| format!("failed to start the writing thread: {error}"))?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends it, and returns the CPU time it took in nanoseconds.
    pub(super) fn stop(&mut self) -> Result<u64, Failure> {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return Ok(0) };
        Ok(thread.join().map_err(|_| "the writing thread panicked")??)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // What went wrong with it matters no more.
        let _ = self.stop();
    }
}

fn write(memory: &GuestMemoryMmap<()>, setup: &Setup, stop: &AtomicBool) -> Result<u64, String> {
    let rate = f64::from(setup.dirty_rate);
    let zeroes = ZeroBlocks::new(setup.zero_share);
    let mut random = Random::new(u64::from(setup.dirty_rate));
    let mut due = 0.0_f64;
    let mut last = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        due += rate * now.duration_since(last).min(CATCH_UP).as_secs_f64();
        last = now;
        while due >= 1.0 && !stop.load(Ordering::Relaxed) {
            due -= 1.0;
            let page = random.below(setup.memory_bytes / PAGE_BYTES);
            let word = random.below(PAGE_BYTES / 8);
            let value = if zeroes.contain(page) { 0 } else { random.next() };
            memory
                .write_obj(value, GuestAddress(page * PAGE_BYTES + word * 8))
                .map_err(|error| format!("failed to write to memory: {error}"))?;
        }
        thread::sleep(TICK);
    }
    Ok(thread_cpu_nanoseconds())
}
