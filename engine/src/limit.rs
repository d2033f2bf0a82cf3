//! The bandwidth limit: a token bucket that the senders share without a lock.
//!
//! Kept as the time at which the link is free again (virtual scheduling, as in the generic cell
//! rate algorithm of ITU-T I.371, annex A): a batch takes the link for `bytes ÷ rate`, and begins
//! when those before it are through. One compare-and-swap a batch; no clock in here.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// How far the schedule may lie behind the clock: what an idle moment may be made up for. Small
/// against the second over which the limit is kept.
const BURST_NS: u64 = 5_000_000;

/// A limit in bytes per second over all channels; none at first.
#[derive(Debug, Default)]
pub(crate) struct Limiter {
    /// 0 for none.
    bytes_per_second: AtomicU64,
    /// When the link is free again, in nanoseconds of the caller's clock.
    free_at_ns: AtomicU64,
}

impl Limiter {
    /// Sets or lifts the limit; takes effect with the next batch.
    pub(crate) fn set(&self, bytes_per_second: Option<NonZeroU64>) {
        self.bytes_per_second.store(bytes_per_second.map_or(0, NonZeroU64::get), Relaxed);
    }

    /// Most bytes to send at a time, so that the limit is kept over short times too: what the
    /// limit allows in 5 ms.
    pub(crate) fn at_a_time(&self) -> u64 {
        match self.bytes_per_second.load(Relaxed) {
            0 => u64::MAX,
            rate => rate / 200,
        }
    }

    /// Takes the link for `bytes`. Returns how long to wait before using it. `now_ns` is of a
    /// clock that all callers share and that does not go back.
    pub(crate) fn take(&self, now_ns: u64, bytes: u64) -> Duration {
        let rate = self.bytes_per_second.load(Relaxed);
        if rate == 0 {
            return Duration::ZERO;
        }
        let cost_ns = u128::from(bytes) * 1_000_000_000 / u128::from(rate);
        let cost_ns = u64::try_from(cost_ns).unwrap_or(u64::MAX);
        let begin = |free_at: u64| free_at.max(now_ns.saturating_sub(BURST_NS));
        // Relaxed: the only thing shared is this number.
        let free_at = self
            .free_at_ns
            .fetch_update(Relaxed, Relaxed, |free_at| Some(begin(free_at).saturating_add(cost_ns)))
            .unwrap_or_else(|free_at| free_at);
        Duration::from_nanos(begin(free_at).saturating_sub(now_ns))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::testing::Random;

    const SECOND_NS: u64 = 1_000_000_000;

    /// Bytes that simulated senders get through in `seconds`, each taking `batch` bytes at a
    /// time and sending at once when allowed.
    fn simulate(limiter: &Limiter, senders: usize, batch: u64, seconds: u64, seed: u64) -> u64 {
        let mut random = Random::new(seed);
        let mut ready_ns = vec![0; senders];
        let mut bytes = 0;
        loop {
            // The sender that is ready first acts first.
            let next = (0..senders).min_by_key(|sender| ready_ns[*sender]).unwrap();
            let now_ns: u64 = ready_ns[next];
            let start_ns = now_ns + u64::try_from(limiter.take(now_ns, batch).as_nanos()).unwrap();
            if start_ns >= seconds * SECOND_NS {
                return bytes;
            }
            bytes += batch;
            // Sending takes a moment, up to 100 µs.
            ready_ns[next] = start_ns + random.below(100_000);
        }
    }

    #[test]
    fn the_limit_is_kept_within_two_percent_over_a_second() {
        for rate in [10 << 20, 100 << 20, 1 << 30, 10_u64 << 30] {
            for senders in [1, 2, 8, 64] {
                let limiter = Limiter::default();
                limiter.set(NonZeroU64::new(rate));
                let batch = (rate / 100).min(1 << 20);
                let bytes = simulate(&limiter, senders, batch, 1, rate ^ senders as u64);
                let ratio = bytes as f64 / rate as f64;
                // One sender of 100 µs a batch cannot do more than 10 GiB/s by itself.
                let reachable = senders > 1 || rate < 10 << 30;
                assert!(ratio <= 1.02, "{rate} B/s, {senders} senders: {ratio}");
                assert!(!reachable || ratio >= 0.98, "{rate} B/s, {senders} senders: {ratio}");
            }
        }
    }

    #[test]
    fn without_a_limit_nobody_waits() {
        let limiter = Limiter::default();
        assert_eq!(limiter.take(7, u64::MAX), Duration::ZERO);
        limiter.set(NonZeroU64::new(1));
        assert!(limiter.take(7, 1 << 30) == Duration::ZERO, "the first goes at once");
        assert!(limiter.take(7, 1) > Duration::from_secs(1 << 29));
        limiter.set(None);
        assert_eq!(limiter.take(7, 1 << 30), Duration::ZERO);
    }

    #[test]
    fn an_idle_minute_is_not_made_up_for() {
        let limiter = Limiter::default();
        limiter.set(NonZeroU64::new(1000));
        let _ = limiter.take(0, 1);
        let now_ns = 60 * SECOND_NS;
        let mut free = 0;
        while limiter.take(now_ns, 1) == Duration::ZERO {
            free += 1;
        }
        assert!(free <= 6, "{free} bytes at once after a minute, 5 ms are worth 5");
    }

    #[test]
    fn threads_share_one_limit() {
        let limiter = Limiter::default();
        limiter.set(NonZeroU64::new(1 << 20));
        let threads = 4;
        let each = 1000;
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    for _ in 0..each {
                        let _ = limiter.take(SECOND_NS, 1024);
                    }
                });
            }
        });
        // Every batch took its time of the link, whoever took it.
        let wait = limiter.take(SECOND_NS, 0);
        let all = Duration::from_secs_f64(f64::from(threads * each) * 1024.0 / f64::from(1 << 20));
        let difference = all.abs_diff(wait + Duration::from_nanos(BURST_NS));
        assert!(difference < Duration::from_millis(1), "{wait:?} {all:?}");
    }
}
