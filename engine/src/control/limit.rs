//! The bandwidth limit: a bucket that the senders share.
//!
//! What was sent is a debt in bytes, which the limit pays off with time; the next batch goes once it
//! is paid, but for a moment's worth. Nothing is booked ahead, and when the limit is changed all debt
//! is forgiven: nobody waits for what another limit allowed or would have taken. No clock in here.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How much may be owed, in time, when the next batch goes: what an idle moment may be made up for.
/// Small against the second over which the limit is kept.
const BURST_NS: u64 = 5_000_000;

const SECOND_NS: u64 = 1_000_000_000;

/// A limit in bytes per second over all channels; none at first.
#[derive(Debug, Default)]
pub(crate) struct Limiter {
    /// That of the bucket, for those who only want to know; 0 for none.
    bytes_per_second: AtomicU64,
    bucket: Mutex<Bucket>,
}

#[derive(Debug, Default)]
struct Bucket {
    bytes_per_second: u64,
    /// Bytes times nanoseconds of a second, so that nothing is lost by rounding.
    owed: u128,
    /// Until when it was paid off.
    at_ns: u64,
}

impl Bucket {
    /// Pays off what the time since has paid.
    fn settle(&mut self, now_ns: u64) {
        let elapsed_ns = now_ns.saturating_sub(self.at_ns);
        let paid = u128::from(elapsed_ns) * u128::from(self.bytes_per_second);
        self.owed = self.owed.saturating_sub(paid);
        self.at_ns = self.at_ns.max(now_ns);
    }
}

impl Limiter {
    fn bucket(&self) -> MutexGuard<'_, Bucket> {
        // Plain numbers, each of which makes sense by itself.
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets or lifts the limit; takes effect at once, also for who waits.
    pub(crate) fn set(&self, bytes_per_second: Option<NonZeroU64>) {
        let bytes_per_second = bytes_per_second.map_or(0, NonZeroU64::get);
        let mut bucket = self.bucket();
        (bucket.bytes_per_second, bucket.owed) = (bytes_per_second, 0);
        self.bytes_per_second.store(bytes_per_second, Relaxed);
    }

    /// The limit.
    pub(crate) fn get(&self) -> Option<NonZeroU64> {
        NonZeroU64::new(self.bytes_per_second.load(Relaxed))
    }

    /// Most bytes to send at a time, so that the limit is kept over short times too: what the
    /// limit allows in 5 ms.
    pub(crate) fn at_a_time(&self) -> u64 {
        match self.bytes_per_second.load(Relaxed) {
            0 => u64::MAX,
            rate => rate / 200,
        }
    }

    /// Takes the link for `bytes`, if it is their turn. If not, how long that takes as things are:
    /// to be asked again, since the limit may be changed meanwhile. `now_ns` is of a clock that all
    /// callers share.
    pub(crate) fn take(&self, now_ns: u64, bytes: u64) -> Result<(), Duration> {
        if self.bytes_per_second.load(Relaxed) == 0 {
            return Ok(());
        }
        let mut bucket = self.bucket();
        let rate = u128::from(bucket.bytes_per_second);
        if rate == 0 {
            return Ok(());
        }
        bucket.settle(now_ns);
        let too_much = bucket.owed.saturating_sub(rate * u128::from(BURST_NS));
        if too_much > 0 {
            let wait_ns = u64::try_from(too_much.div_ceil(rate)).unwrap_or(u64::MAX);
            return Err(Duration::from_nanos(wait_ns));
        }
        bucket.owed += u128::from(bytes) * u128::from(SECOND_NS);
        Ok(())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::ops::Range;

    use proptest::prelude::*;

    use super::*;
    use crate::testing::Random;

    fn rate(bytes_per_second: u64) -> Option<NonZeroU64> {
        NonZeroU64::new(bytes_per_second)
    }

    fn ns(duration: Duration) -> u64 {
        u64::try_from(duration.as_nanos()).unwrap()
    }

    /// Bytes that simulated senders get through from one time to another, each taking `batch` bytes
    /// at a time and sending at once when allowed.
    fn simulate(
        limiter: &Limiter,
        senders: usize,
        batch: u64,
        ns_of: Range<u64>,
        seed: u64,
    ) -> u64 {
        let mut random = Random::new(seed);
        let mut ready_ns = vec![ns_of.start; senders];
        let mut bytes = 0;
        loop {
            // The sender that is ready first acts first.
            let next = (0..senders).min_by_key(|sender| ready_ns[*sender]).unwrap();
            let now_ns: u64 = ready_ns[next];
            if now_ns >= ns_of.end {
                return bytes;
            }
            match limiter.take(now_ns, batch) {
                Ok(()) => {
                    bytes += batch;
                    // Sending takes a moment, up to 100 µs.
                    ready_ns[next] = now_ns + random.below(100_000);
                }
                Err(wait) => ready_ns[next] = now_ns.saturating_add(ns(wait)),
            }
        }
    }

    #[test]
    fn the_limit_is_kept_within_two_percent_over_a_second() {
        for rate in [10 << 20, 100 << 20, 1 << 30, 10_u64 << 30] {
            for senders in [1, 2, 8, 64] {
                let limiter = Limiter::default();
                limiter.set(NonZeroU64::new(rate));
                let batch = (rate / 100).min(1 << 20);
                let bytes = simulate(&limiter, senders, batch, 0..SECOND_NS, rate ^ senders as u64);
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
        assert_eq!(limiter.take(7, u64::MAX), Ok(()));
        limiter.set(rate(1));
        assert_eq!(limiter.take(7, 1 << 30), Ok(()), "the first goes at once");
        assert!(limiter.take(7, 1).unwrap_err() > Duration::from_secs(1 << 29));
        limiter.set(None);
        assert_eq!(limiter.take(8, 1 << 30), Ok(()));
        // What was sent under another limit, or none, is nobody's debt.
        limiter.set(rate(1));
        assert_eq!(limiter.take(9, 1 << 30), Ok(()));
    }

    #[test]
    fn an_idle_minute_is_not_made_up_for() {
        let limiter = Limiter::default();
        limiter.set(rate(1000));
        limiter.take(0, 1).unwrap();
        let now_ns = 60 * SECOND_NS;
        let free = std::iter::repeat_with(|| limiter.take(now_ns, 1)).take_while(Result::is_ok);
        let free = free.take(100).count();
        assert!(free <= 6, "{free} bytes at once after a minute, 5 ms are worth 5");
    }

    #[test]
    fn threads_share_one_limit() {
        let limiter = Limiter::default();
        limiter.set(rate(1 << 20));
        let sent = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for now_ns in (0..SECOND_NS).step_by(100_000) {
                        if limiter.take(now_ns, 1024).is_ok() {
                            sent.fetch_add(1024, Relaxed);
                        }
                    }
                });
            }
        });
        let ratio = sent.into_inner() as f64 / f64::from(1 << 20);
        assert!((0.9..=1.02).contains(&ratio), "{ratio}");
    }

    proptest! {
        /// Whatever was set before, and however much was sent under it: what is set now counts from
        /// now on, and is kept.
        #[test]
        fn a_limit_is_kept_over_its_whole_range_whatever_was_set_before(
            before in prop::collection::vec((any_limit(), 0..10 * SECOND_NS), 0..6),
            limit in any_limit(),
            senders in 1_usize..5,
            seed: u64,
        ) {
            let limiter = Limiter::default();
            let batch_of = |limiter: &Limiter| limiter.at_a_time().clamp(4096, 4 << 20);
            let mut now_ns = 0;
            for (limit, took_ns) in before {
                limiter.set(limit);
                for _ in 0..10 {
                    let _ = limiter.take(now_ns, batch_of(&limiter));
                }
                now_ns += took_ns;
            }
            limiter.set(limit);
            prop_assert_eq!(limiter.take(now_ns, 0), Ok(()), "the first goes at once");
            let Some(limit) = limit.map(NonZeroU64::get) else { return Ok(()) };
            let batch = batch_of(&limiter);
            // As long as some batches take.
            let took_ns = u128::from(batch) * 100 * u128::from(SECOND_NS) / u128::from(limit);
            let end_ns = now_ns + u64::try_from(took_ns).unwrap_or(u64::MAX / 2).min(u64::MAX / 2);
            let bytes = simulate(&limiter, senders, batch, now_ns..end_ns, seed);
            let allowed = (end_ns - now_ns) as f64 / SECOND_NS as f64 * limit as f64;
            let burst = limit as f64 / 200.0 + 2.0 * batch as f64;
            prop_assert!(bytes as f64 <= allowed + burst, "{bytes} where {allowed} are allowed");
        }

        /// A limit near zero, by mistake: once it is raised or lifted, batches go.
        #[test]
        fn a_mistake_is_undone_at_once(low in 1_u64..10_000, high in any_limit(), now_ns: u32) {
            let limiter = Limiter::default();
            limiter.set(rate(low));
            prop_assert_eq!(limiter.take(0, 4 << 20), Ok(()));
            prop_assert!(limiter.take(0, 4096).is_err());
            limiter.set(high);
            prop_assert_eq!(limiter.take(now_ns.into(), 4096), Ok(()));
        }
    }

    /// Of any magnitude, or none.
    fn any_limit() -> impl Strategy<Value = Option<NonZeroU64>> {
        prop_oneof![
            1 => Just(None),
            6 => (0..64_u32, any::<u64>()).prop_map(|(shift, any)| rate((any | 1 << 63) >> shift)),
        ]
    }
}
