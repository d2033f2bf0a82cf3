//! A source that takes long to release what only one host may hold, and how long a destination waits for
//! its commit.

use std::time::Duration;

use pageferry::convergence::{Bound, Policy};
use pageferry::{Error, GuestAtDestination, Timeouts};

use crate::scene::{Scene, Slow, called_off};

/// A destination that waits no longer for the commit says so, and a source that has not committed hears
/// it: its guest is its own, however long it took to release what it held.
#[test]
fn a_destination_that_waited_too_long_gets_no_commit() {
    let patience = Duration::from_millis(200);
    let mut scene = Scene::new(Slow::ReleaseFor(20 * patience), 0).on_event(|_| {});
    scene.source = scene.source.policy(Policy::KeepTrying).bound(Bound::BestEffort);
    let timeouts = Timeouts { commit: patience, release: patience, ..Timeouts::default() };
    scene.destination = scene.destination.timeouts(timeouts);
    let outcome = scene.play();
    let theirs = outcome.destination.as_ref().expect_err("it has waited for the commit");
    assert_eq!(theirs.guest, GuestAtDestination::Uncertain);
    let error = outcome.expect_kept();
    assert!(matches!(error, Error::PeerFailed { .. }), "{error:?}");
    assert!(error.to_string().contains("the source to release its resources"), "{error}");
}

/// A source that is busy releasing says so, and a destination waits longer for its commit than for that
/// of a silent one.
#[test]
fn a_release_that_takes_longer_than_the_wait_for_a_commit_is_waited_for() {
    let patience = Duration::from_secs(2);
    let mut scene = Scene::new(Slow::ReleaseFor(patience * 5 / 2), 0).on_event(|_| {});
    let timeouts = Timeouts { commit: patience, ..Timeouts::default() };
    scene.source = scene.source.policy(Policy::KeepTrying).bound(Bound::BestEffort);
    scene.source = scene.source.timeouts(timeouts);
    scene.destination = scene.destination.timeouts(timeouts);
    let outcome = scene.play();
    assert!(called_off(&outcome.events).is_empty());
    let departed = outcome.source.expect("the source hands over");
    assert!(departed.statistics.downtime.total() > 2 * patience);
    assert!(outcome.destination.expect("the guest arrives").machine.inner.is_running());
}

/// Each side has its own limits, and neither knows the other's: the least patient destination hears of a
/// release in time, from a source with any limits.
#[test]
fn a_destination_with_the_smallest_limit_waits_for_a_release() {
    for theirs in [Duration::ZERO, Duration::from_millis(500)] {
        let mut scene = Scene::new(Slow::ReleaseFor(Duration::from_secs(3)), 0).on_event(|_| {});
        scene.source = scene.source.policy(Policy::KeepTrying).bound(Bound::BestEffort);
        let timeouts = Timeouts { commit: theirs, ..Timeouts::default() };
        scene.destination = scene.destination.timeouts(timeouts);
        let outcome = scene.play();
        outcome.source.expect("the source hands over");
        assert!(outcome.destination.expect("the guest arrives").machine.inner.is_running());
    }
}

/// But not for ever, however often it says so.
#[test]
fn a_source_that_only_says_that_it_releases_is_not_waited_for() {
    let patience = Duration::from_secs(1);
    let mut scene = Scene::new(Slow::ReleaseFor(5 * patience), 0).on_event(|_| {});
    let timeouts = Timeouts { commit: patience, release: 2 * patience, ..Timeouts::default() };
    scene.source = scene.source.policy(Policy::KeepTrying).bound(Bound::BestEffort);
    scene.source = scene.source.timeouts(timeouts);
    scene.destination = scene.destination.timeouts(timeouts);
    let outcome = scene.play();
    let theirs = outcome.destination.as_ref().expect_err("it has waited for the release");
    assert_eq!(theirs.guest, GuestAtDestination::Uncertain);
    let error = outcome.expect_kept();
    assert!(error.to_string().contains("the source to release its resources"), "{error}");
}
