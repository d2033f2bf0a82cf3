//! A bandwidth limit holds until it is lifted.

use std::num::NonZeroU64;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};

use crate::scene::Scene;

#[test]
fn a_bandwidth_limit_is_kept() {
    let scene = Scene::new();
    let limit: u32 = 16 << 20;
    scene.source.handle().limit_bandwidth(NonZeroU64::new(limit.into()));
    let (departed, _) = scene.play(|link| link).expect_moved();
    let first = departed.statistics.rounds[0];
    // At least 2000 pages in the first round; each channel's last batch may still be under way.
    let sent_bytes = f64::from(2000 * 4096_u32);
    let expected =
        Duration::from_secs_f64((sent_bytes - 3.0 * f64::from(1_u32 << 20)) / f64::from(limit));
    assert!(first.took >= expected, "{:?} for a limit of {limit} B/s", first.took);
}

/// In the middle of a round that would take hours: without a word it is cancelled some time.
#[test]
fn a_bandwidth_limit_that_is_lifted_holds_nobody() {
    let scene = Scene::new();
    let handle = scene.source.handle();
    handle.limit_bandwidth(NonZeroU64::new(1 << 10));
    let (over, ended) = bounded::<()>(0);
    let outcome = thread::scope(|scope| {
        scope.spawn(|| {
            while handle.snapshot().landed_bytes == 0 {
                thread::yield_now();
            }
            handle.limit_bandwidth(None);
            if ended.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
                handle.cancel();
            }
        });
        let outcome = scene.play(|link| link);
        drop(over);
        outcome
    });
    outcome.expect_moved();
}
