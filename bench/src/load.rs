//! Load: threads that keep CPUs and memory as busy as they can.
//!
//! Each copies between two buffers that no cache holds, or reads a guest's memory, and computes in
//! between for about as long. What they got done and what CPU time they had is counted, so that a
//! report tells how much load there was, and not how much was asked for.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use pageferry_cli::outcome::Failure;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::usage::thread_cpu_nanoseconds;

/// More than the last level of caches has on most CPUs.
const BUFFER_BYTES: usize = 64 << 20;
const PIECE_BYTES: usize = 1 << 20;
/// Steps of computing for each piece: about as long as the copy of one takes.
const STEPS: u32 = 100_000;

/// What threads did.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Used {
    cpu_nanoseconds: u64,
    bytes: u64,
    nanoseconds: u128,
}

impl Used {
    /// CPU seconds a second.
    pub(crate) fn cpus(self) -> f64 {
        if self.nanoseconds == 0 {
            0.0
        } else {
            self.cpu_nanoseconds as f64 / self.nanoseconds as f64
        }
    }

    /// Bytes read and written a second, in 10⁹.
    pub(crate) fn gigabytes_per_second(self) -> f64 {
        if self.nanoseconds == 0 { 0.0 } else { self.bytes as f64 / self.nanoseconds as f64 }
    }
}

/// The threads, until they are stopped.
#[derive(Debug)]
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    began: Instant,
    threads: Vec<JoinHandle<Used>>,
}

impl Load {
    /// The host's: private memory is copied.
    pub(crate) fn of_host(threads: u16) -> Result<Self, Failure> {
        Self::start("host-load", threads, || {
            let (from, mut to) = (vec![1_u8; BUFFER_BYTES], vec![0_u8; BUFFER_BYTES]);
            let mut at = 0;
            move || {
                to[at..at + PIECE_BYTES].copy_from_slice(black_box(&from[at..at + PIECE_BYTES]));
                black_box(&to);
                at = (at + PIECE_BYTES) % BUFFER_BYTES;
                // Read and written.
                2 * PIECE_BYTES as u64
            }
        })
    }

    /// The guest's: its memory is read, so that it does not get dirty.
    pub(crate) fn of_guest<M>(threads: u16, memory: &Arc<M>) -> Result<Self, Failure>
    where
        M: GuestMemoryBackend + Send + Sync + 'static,
    {
        Self::start("guest-load", threads, || {
            let memory = Arc::clone(memory);
            let end = memory.last_addr().0;
            let (mut at, mut piece) = (0, vec![0_u8; PIECE_BYTES]);
            move || {
                // Between regions there is nothing to read, and the next piece is tried.
                let read = memory.read(&mut piece, GuestAddress(at)).unwrap_or(0);
                black_box(&piece);
                at = (at + PIECE_BYTES as u64) % end.max(1);
                read as u64
            }
        })
    }

    fn start<W: FnMut() -> u64 + Send + 'static>(
        name: &str,
        threads: u16,
        mut work: impl FnMut() -> W,
    ) -> Result<Self, Failure> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut load = Self { stop, began: Instant::now(), threads: Vec::new() };
        for _ in 0..threads {
            let (mut work, stop) = (work(), Arc::clone(&load.stop));
            let body = move || {
                let mut used = Used::default();
                while !stop.load(Ordering::Relaxed) {
                    used.bytes += work();
                    compute();
                }
                used.cpu_nanoseconds = thread_cpu_nanoseconds();
                used
            };
            let thread = thread::Builder::new().name(name.to_owned()).spawn(body);
            load.threads.push(thread.map_err(|error| format!("failed to make load: {error}"))?);
        }
        Ok(load)
    }

    /// They are to end soon; nobody waits for it yet.
    pub(crate) fn ask_to_stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Ends them.
    pub(crate) fn stop(mut self) -> Used {
        self.join()
    }

    fn join(&mut self) -> Used {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Used { nanoseconds: self.began.elapsed().as_nanos(), ..Used::default() };
        for thread in self.threads.drain(..) {
            // One that panicked made no load that is known.
            let used = thread.join().unwrap_or_default();
            all.cpu_nanoseconds += used.cpu_nanoseconds;
            all.bytes += used.bytes;
        }
        all
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.join();
    }
}

/// Arithmetic whose every step needs the one before.
fn compute() {
    let mut value = 1.0_f64;
    for step in 0..STEPS {
        value = value.mul_add(0.999_999, f64::from(step));
    }
    black_box(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_is_counted() {
        let load = Load::of_host(2).expect("threads");
        // Until both have done something; what they do is not waited for longer than that.
        let began = Instant::now();
        while began.elapsed().as_millis() < 50 {
            compute();
        }
        let used = load.stop();
        assert!(used.cpus() > 0.0 && used.gigabytes_per_second() > 0.0, "{used:?}");
        let none = Load::of_host(0).expect("no threads").stop();
        assert!(none.cpus() == 0.0 && none.gigabytes_per_second() == 0.0, "{none:?}");
    }
}
