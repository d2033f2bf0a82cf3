//! What a program takes of the CPUs.

use std::io;
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::unistd::Pid;
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

/// The same of all processes that this one has started and that have ended and were waited for; of others, as far as
/// those have waited for theirs. In microseconds.
pub fn time_of_children() -> io::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let all = usage.user_time() + usage.system_time();
    Ok(Duration::from_micros(u64::try_from(all.num_microseconds()).unwrap_or(0)))
}

/// The same of another process, whoever has it. An error if there is none with that number.
pub fn time_of_process_of(pid: u32) -> io::Result<Duration> {
    let clock = nix::time::ClockId::pid_cpu_clock_id(Pid::from_raw(pid.cast_signed()))?;
    Ok(clock.now()?.into())
}

/// The same of one of its threads. An error if there is no such thread, or if the kernel keeps no such figures
/// (Documentation/scheduler/sched-stats.rst).
pub fn time_of_thread_of(pid: u32, thread: u32) -> io::Result<Duration> {
    let path = format!("/proc/{pid}/task/{thread}/schedstat");
    let text = std::fs::read_to_string(path)?;
    let nanoseconds = text.split_ascii_whitespace().next().and_then(|first| first.parse().ok());
    nanoseconds.map(Duration::from_nanos).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn time(clock: ClockId) -> Duration {
    Duration::try_from(clock_gettime(clock)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_have_it_too() {
        let pid = std::process::id();
        let (before, own) = (time_of_process_of(pid).unwrap(), time_of_process());
        assert!(before <= own);
        let thread = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        assert!(time_of_thread_of(pid, thread).unwrap() <= time_of_process());
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert!(time_of_children().unwrap() > Duration::ZERO);
        assert!(time_of_process_of(child.id()).is_err());
    }
}
