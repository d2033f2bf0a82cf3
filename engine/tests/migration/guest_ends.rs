//! A guest that ends on the way has nowhere to go.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use pageferry::{Blame, Event};

use crate::scene::Scene;

/// A guest that ends is noticed in the middle of a round that would take hours, and wherever else the
/// source is: nothing follows that it could have left undone. How long that took is printed, since a
/// busy machine may make any bound wrong.
#[test]
fn a_guest_that_ends_ends_the_migration_at_once() {
    let ends_at: [fn(&Event) -> bool; 5] = [
        |event| matches!(event, Event::Agreed(_)),
        |event| matches!(event, Event::Registered(_)),
        |event| matches!(event, Event::RoundStarted { round: 1, .. }),
        |event| matches!(event, Event::RoundFinished { round: 1, .. }),
        |event| matches!(event, Event::GuestPaused),
    ];
    for (place, when) in ends_at.into_iter().enumerate() {
        let mut scene = Scene::new();
        if place < 3 {
            scene.source.handle().limit_bandwidth(NonZeroU64::new(1 << 10));
        }
        let (alarm, told) = (Arc::clone(&scene.alarm), Arc::new(Mutex::new(Vec::new())));
        let (raised, teller) = (Arc::new(Mutex::new(None)), Arc::clone(&told));
        let raising = Arc::clone(&raised);
        scene.source = scene.source.on_event(move |event| {
            if raising.lock().unwrap().is_some() {
                teller.lock().unwrap().push(event.clone());
            } else if when(event) {
                *raising.lock().unwrap() = Some(Instant::now());
                let alarm = alarm.lock().unwrap().clone().expect("it was given one");
                alarm.raise("triple fault".into());
                alarm.raise("and another one".into());
            }
        });
        let outcome = scene.play(|link| link);
        let raised = raised.lock().unwrap().expect("it was raised");
        eprintln!("at {place}: {:?}", raised.elapsed());
        let failure = outcome.source.as_ref().expect_err("its guest ended");
        assert!(failure.error.chain().to_string().contains("run the guest: triple fault"));
        assert_eq!(failure.error.blame(), Blame::Machine);
        let told = told.lock().unwrap();
        assert!(matches!(told[..], [Event::GuestKept]), "at {place}: {told:?}");
        drop(told);
        let (_, theirs) = outcome.expect_kept();
        assert!(theirs.unwrap().to_string().contains("triple fault"));
    }
}

/// The same by a virtual CPU, in the middle of a round: when pages have begun to flow, and the source
/// waits for the rest of them.
#[test]
fn a_guest_that_ends_in_the_middle_of_a_round_ends_it() {
    let mut scene = Scene::new();
    let handle = scene.source.handle();
    handle.limit_bandwidth(NonZeroU64::new(1 << 10));
    let (alarm, told) = (Arc::clone(&scene.alarm), Arc::new(Mutex::new(Vec::new())));
    let teller = Arc::clone(&told);
    scene.source = scene.source.on_event(move |event| teller.lock().unwrap().push(event.clone()));
    let (outcome, raised) = thread::scope(|scope| {
        let raising = scope.spawn(|| {
            while handle.snapshot().landed_bytes == 0 {
                thread::yield_now();
            }
            let alarm = alarm.lock().unwrap().clone().expect("it was given one");
            alarm.raise("triple fault".into());
            Instant::now()
        });
        (scene.play(|link| link), raising.join().expect("no panic"))
    });
    eprintln!("in a round: {:?}", raised.elapsed());
    let told = std::mem::take(&mut *told.lock().unwrap());
    let [.., Event::RoundStarted { round: 1, .. }, Event::GuestKept] = told[..] else {
        panic!("{told:?}")
    };
    let (error, _) = outcome.expect_kept();
    assert!(error.chain().to_string().contains("run the guest: triple fault"), "{error}");
}
