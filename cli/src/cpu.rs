//! What a program takes of the CPUs.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// CPU time of all threads of this process so far, user and system. The sum that `getrusage` has in
/// microseconds.
pub fn time_of_process() -> Duration {
    time(ClockId::ProcessCPUTime)
}

/// The same of the calling thread alone.
pub fn time_of_thread() -> Duration {
    time(ClockId::ThreadCPUTime)
}

fn time(clock: ClockId) -> Duration {
    Duration::try_from(clock_gettime(clock)).unwrap_or_default()
}
