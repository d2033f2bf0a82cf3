//! Either side may call it off until the commit.

use pageferry::protocol::FailureReason;
use pageferry::{Error, Event, Phase};

use crate::scene::Scene;

#[test]
fn cancelling_at_any_event_before_the_commit_keeps_the_guest() {
    let cancel_at: [fn(&Event) -> bool; 5] = [
        |event| matches!(event, Event::Agreed(_)),
        |event| matches!(event, Event::Registered(_)),
        |event| matches!(event, Event::RoundStarted { .. }),
        |event| matches!(event, Event::RoundFinished { .. }),
        |event| matches!(event, Event::GuestPaused),
    ];
    for when in cancel_at {
        let mut scene = Scene::new();
        let handle = scene.source.handle();
        let canceller = handle.clone();
        scene.source = scene.source.on_event(move |event| {
            if when(event) {
                canceller.cancel();
            }
        });
        let (error, theirs) = scene.play(|link| link).expect_kept();
        assert!(matches!(error, Error::Cancelled), "{error:?}");
        assert!(theirs.unwrap().to_string().contains("cancelled"));
        assert_eq!(handle.snapshot().phase, Phase::Ended);
    }
}

/// It comes to the other side as what it is, at once, and not as a source that says nothing.
#[test]
fn a_cancel_before_the_migration_begins_is_told_to_the_destination() {
    let scene = Scene::new();
    scene.source.handle().cancel();
    let (error, theirs) = scene.play(|link| link).expect_kept();
    assert!(matches!(error, Error::Cancelled), "{error:?}");
    let told = matches!(theirs, Some(Error::PeerFailed { reason: FailureReason::Cancelled, .. }));
    assert!(told, "{theirs:?}");
}

#[test]
fn cancelling_after_the_commit_is_too_late() {
    let mut scene = Scene::new();
    let canceller = scene.source.handle();
    scene.source = scene.source.on_event(move |event| {
        if matches!(event, Event::Committed) {
            canceller.cancel();
        }
    });
    scene.play(|link| link).expect_moved();
}

#[test]
fn the_destination_can_cancel_too() {
    let mut scene = Scene::new();
    let canceller = scene.destination.handle();
    scene.destination = scene.destination.on_event(move |event| {
        if matches!(event, Event::RoundStarted { round: 1, .. }) {
            canceller.cancel();
        }
    });
    let (error, theirs) = scene.play(|link| link).expect_kept();
    assert!(error.to_string().contains("cancelled"), "{error}");
    assert!(matches!(theirs, Some(Error::Cancelled)));
}
