//! The wait for what happens to an id.

use std::io;
use std::time::Instant;

use pageferry::transport::TransportError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cm::{Event, Id};
use crate::state::LinkState;

/// Waits for the next event of an id.
pub(super) fn event(
    id: &Id,
    state: &LinkState,
    deadline: Instant,
    operation: &'static str,
) -> Result<Event, TransportError> {
    let failed = |cause| TransportError::Io { operation, cause };
    loop {
        state.check()?;
        if let Some(event) = id.take_event().map_err(failed)? {
            return Ok(event);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failed(io::ErrorKind::TimedOut.into()));
        }
        let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
        let mut fds = [
            PollFd::from_borrowed_fd(id.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(state.bell(), PollFlags::IN),
        ];
        match poll(&mut fds, Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}
