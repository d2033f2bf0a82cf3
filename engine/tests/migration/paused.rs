//! A guest that somebody has paused is not let run by a migration, whatever becomes of that.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageferry::{Event, GuestAtDestination, GuestAtSource};

use crate::scene::Scene;
use crate::support::Refuse;

fn paused() -> (Scene, Arc<Mutex<Vec<Event>>>) {
    let mut scene = Scene::new();
    scene.paused = true;
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = Arc::clone(&told);
    scene.source = scene.source.on_event(move |event| tell.lock().unwrap().push(event.clone()));
    (scene, told)
}

#[test]
fn it_arrives_paused() {
    let (scene, told) = paused();
    let (here, there) = (scene.here.clone(), scene.there.clone());
    let outcome = scene.play(|link| link);
    let departed = outcome.source.expect("the source hands over");
    let arrived = outcome.destination.expect("the greeting fits").expect("the guest arrives");
    assert!(arrived.paused && arrived.verified);
    // Once it was let run here, before it was paused.
    assert_eq!((departed.machine.resumes, arrived.machine.resumes), (1, 0));
    assert!(!arrived.machine.is_running() && arrived.machine.holds_lock());
    assert_eq!(arrived.machine.loaded, Some(departed.machine.writes()));
    for region in 0..2 {
        for page in 0..700 {
            assert!(here.read(region, page) == there.read(region, page));
        }
    }
    let told = told.lock().unwrap();
    assert!(matches!(told.last(), Some(Event::GuestPausedThere)), "{told:?}");
    assert!(!told.iter().any(|event| matches!(event, Event::GuestRunsThere)));
    // Whoever paused it lets it run there.
    let mut machine = arrived.machine;
    pageferry::Machine::resume(&mut machine).unwrap();
    machine.await_writes();
}

/// Wherever it fails: before it is paused by the engine, after that, and at the destination.
#[test]
fn it_is_still_paused_where_it_was() {
    for (here, there) in [
        (Refuse::Schema, Refuse::Nothing),
        (Refuse::Pause, Refuse::Nothing),
        (Refuse::Save, Refuse::Nothing),
        (Refuse::Release, Refuse::Nothing),
        (Refuse::Nothing, Refuse::Schema),
        (Refuse::Nothing, Refuse::Load),
        (Refuse::Nothing, Refuse::Reacquire),
    ] {
        let (mut scene, told) = paused();
        (scene.source_refuses, scene.destination_refuses) = (here, there);
        let outcome = scene.play(|link| link);
        let failure = outcome.source.expect_err("the source keeps its guest");
        assert!(matches!(failure.guest, GuestAtSource::StillPaused), "{here:?} {failure:?}");
        assert_eq!(failure.machine.resumes, 1, "{here:?} {there:?}");
        assert!(!failure.machine.is_running() && failure.machine.holds_lock());
        let told = told.lock().unwrap();
        assert!(!told.iter().any(|event| matches!(event, Event::GuestKept)), "{told:?}");
        if let Ok(arrived) = outcome.destination {
            let failure = arrived.expect_err("it did not arrive");
            assert_ne!(failure.guest, GuestAtDestination::Uncertain);
            assert_eq!(failure.machine.resumes, 0);
        }
    }
}

#[test]
fn it_is_still_paused_after_a_cancel() {
    let (mut scene, _) = paused();
    let canceller = scene.source.handle();
    scene.source = scene.source.on_event(move |event| {
        if matches!(event, Event::GuestPaused) {
            canceller.cancel();
        }
    });
    let failure = scene.play(|link| link).source.expect_err("it was cancelled");
    assert!(matches!(failure.guest, GuestAtSource::StillPaused), "{failure:?}");
    assert_eq!(failure.machine.resumes, 1);
}

/// A rehearsal lets the guest run when it is over.
#[test]
fn it_is_not_rehearsed() {
    let (mut scene, _) = paused();
    scene.source_refuses = Refuse::Rehearse;
    let outcome = scene.play(|link| link);
    assert!(outcome.destination.unwrap().expect("it arrives").paused);
}

/// There is no downtime: neither is the limit waited for, nor is anything called off for it.
#[test]
fn it_moves_whatever_the_downtime_limit_is() {
    let (mut scene, told) = paused();
    scene.source = scene.source.downtime_limit(Duration::from_nanos(1));
    let outcome = scene.play(|link| link);
    let departed = outcome.source.expect("the source hands over");
    assert!(outcome.destination.unwrap().expect("it arrives").paused);
    let statistics = departed.statistics;
    // The last one is of what is dirtied while it is saved.
    assert_eq!((statistics.switchover_attempts, statistics.round_count), (1, 2));
    assert!(!told.lock().unwrap().iter().any(|event| matches!(event, Event::CalledOff { .. })));
}
