//! What a host hears of a migration, and of one that got nowhere.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageferry::convergence::Bound;
use pageferry::dirty::DirtyBitmap;
use pageferry::{Error, Event};

use crate::scene::Scene;

/// Whatever else the machine does: the limit is no reason for another round, nor for calling off.
#[test]
fn events_tell_the_story_in_order() {
    let story = Arc::new(Mutex::new(Vec::new()));
    let mut scene = Scene::new();
    let no_limit = Duration::from_secs(3600);
    scene.source = scene.source.downtime_limit(no_limit).bound(Bound::BestEffort);
    let teller = Arc::clone(&story);
    scene.source = scene.source.on_event(move |event| {
        let name = format!("{event:?}");
        let end = name.find(['(', ' ']).unwrap_or(name.len());
        teller.lock().unwrap().push(name[..end].to_owned());
    });
    scene.play(|link| link).expect_moved();
    let mut story = Arc::into_inner(story).unwrap().into_inner().unwrap();
    story.dedup();
    // One that is slower than the others for a while may be given less.
    story.retain(|name| name != "Rebalanced");
    let round = ["RoundStarted", "RoundFinished"];
    let last = ["GuestPaused", "RoundStarted", "Committed", "GuestRunsThere"];
    assert_eq!(story, [&["Agreed", "Registered"][..], &round, &last].concat());
}

#[test]
fn a_guest_faster_than_the_link_is_kept_and_the_figures_are_named() {
    let mut scene = Scene::new();
    scene.source = scene.source.downtime_limit(Duration::from_millis(1)).max_rounds(3);
    // However the machine is loaded, the guest has written something in every round.
    let log = Arc::clone(&scene.log);
    scene.source = scene.source.on_event(move |event| {
        if matches!(event, Event::RoundStarted { .. }) {
            log.mark(0, 7);
        }
    });
    let outcome = scene.play(|link| link);
    let untouched = DirtyBitmap::new(outcome.here.memory().layout());
    assert_ne!(*outcome.log.put_back.lock().unwrap(), untouched);
    let (error, _) = outcome.expect_kept();
    assert!(matches!(error, Error::NotConverging { rounds: 3, .. }), "{error:?}");
}
