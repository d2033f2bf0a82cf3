//! Warnings of what strangers do, of whom there may be many.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines at once, and a new one in each interval.
const LINES: u32 = 10;
const INTERVAL: Duration = Duration::from_secs(1);

/// A bounded share of the log: ten lines, and from then on one a second. A line tells how many were left
/// out before it.
#[derive(Debug, Default)]
pub struct Warnings(Mutex<Share>);

#[derive(Debug, Default)]
struct Share {
    written: u32,
    /// Where one line less counts as written.
    next: Option<Instant>,
    left_out: u64,
}

impl Warnings {
    /// How many lines were left out before the one that may be written now; `None` if that is to be left
    /// out too.
    pub fn turn(&self) -> Option<u64> {
        // No critical section leaves it half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).turn(Instant::now())
    }

    /// Warns of a peer, or counts that.
    pub fn warn(&self, peer: impl fmt::Display, what: impl fmt::Display) {
        match self.turn() {
            Some(0) => tracing::warn!(%peer, "{what}"),
            Some(left_out) => tracing::warn!(%peer, left_out, "{what}"),
            None => tracing::debug!(%peer, "{what}"),
        }
    }
}

impl Share {
    fn turn(&mut self, now: Instant) -> Option<u64> {
        while let Some(next) = self.next.filter(|next| *next <= now) {
            self.written -= 1;
            self.next = (self.written > 0).then_some(next + INTERVAL);
        }
        if self.written == LINES {
            self.left_out += 1;
            return None;
        }
        self.written += 1;
        self.next.get_or_insert(now + INTERVAL);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_and_what_is_left_out_is_counted() {
        let (mut share, now) = (Share::default(), Instant::now());
        for _ in 0..LINES {
            assert_eq!(share.turn(now), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(share.turn(now), None);
        }
        assert_eq!(share.turn(now + INTERVAL), Some(1000));
        assert_eq!(share.turn(now + INTERVAL), None);
        let later = now + INTERVAL * 2 * LINES;
        let lines = (0..100).filter(|_| share.turn(later).is_some()).count();
        assert_eq!(
            lines, LINES as usize,
            "no more than at the beginning, however long it was quiet"
        );
    }
}
