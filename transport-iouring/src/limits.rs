//! How much memory this user may lock, and what it means when there is no ring.

use std::io;

use rustix::process::{Resource, getrlimit};

/// Why there is no ring; names the limit if it is that.
pub(crate) fn no_ring(cause: io::Error) -> io::Error {
    if cause.raw_os_error() != Some(libc::ENOMEM) {
        return cause;
    }
    let text = format!(
        "{cause}: the ring of each channel is locked memory, and this user's limit is {}: raise \
         RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK= of systemd), give CAP_IPC_LOCK, or use another \
         transport",
        memlock_limit()
    );
    io::Error::new(cause.kind(), text)
}

/// How much memory this user may lock, as text.
pub(crate) fn memlock_limit() -> String {
    let limit = getrlimit(Resource::Memlock).current;
    limit.map_or("unlimited".to_owned(), |bytes| format!("{bytes} bytes"))
}
