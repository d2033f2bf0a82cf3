//! A CPU for each of two sides that wait by looking: on one they would take turns, and measure the
//! scheduler.

use pageferry_cli::outcome::Failure;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Does something on the CPU of side 0 or 1, as far as this process may use two.
pub(crate) fn of_side<T>(
    side: usize,
    act: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let before = sched_getaffinity(None)?;
    let mut usable = (0..CpuSet::MAX_CPU).filter(|cpu| before.is_set(*cpu));
    let (first, second) = (usable.next(), usable.next());
    let (Some(first), Some(second)) = (first, second) else { return act() };
    let mut one = CpuSet::new();
    one.set(if side == 0 { first } else { second });
    sched_setaffinity(None, &one)?;
    let result = act();
    sched_setaffinity(None, &before)?;
    result
}
