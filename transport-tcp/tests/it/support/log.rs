//! What was logged, for tests that look at warnings.

use std::io::{self, Write};
use std::sync::{Mutex, Once, PoisonError};

static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());
static START: Once = Once::new();

struct Capture;

impl Write for Capture {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        LOG.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Captures the log of the whole process from now on.
pub(crate) fn capture() {
    START.call_once(|| {
        tracing_subscriber::fmt().with_ansi(false).with_writer(|| Capture).init();
    });
}

/// Whether one line of the log has all of these.
pub(crate) fn has_line(parts: &[&str]) -> bool {
    count_lines(parts) > 0
}

/// How many have.
pub(crate) fn count_lines(parts: &[&str]) -> usize {
    let log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    let has_all = |line: &&str| parts.iter().all(|part| line.contains(part));
    String::from_utf8_lossy(&log).lines().filter(has_all).count()
}
