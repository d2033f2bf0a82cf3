//! A switchover that takes too long is called off, by a strict bound.

use std::sync::mpsc;
use std::time::Duration;

use pageferry::convergence::{Bound, Policy};
use pageferry::testing::faulty::Faults;
use pageferry::{Ending, Error, Event, SwitchoverStage};

use crate::scene::{LIMIT, Scene, Slow, called_off};

#[test]
fn a_switchover_that_takes_too_long_is_called_off_and_another_follows() {
    for (slow, stage) in [
        (Slow::Release, SwitchoverStage::Commit),
        (Slow::Load, SwitchoverStage::DeviceState),
        (Slow::Save, SwitchoverStage::Pages),
    ] {
        let (tell, stands_still) = mpsc::channel();
        let mut scene = Scene::new(slow, 1).on_event(move |event| {
            let stands = matches!(event, Event::GuestPaused);
            if stands || matches!(event, Event::CalledOff { .. }) {
                let _ = tell.send(stands);
            }
        });
        // A load that lasts as long as the limit may be over before a busy source has seen that the limit is.
        scene.stands_still = Some(stands_still);
        scene.source = scene.source.policy(Policy::KeepTrying);
        let (departed, _, stages) = scene.play().expect_moved();
        assert!(stages.contains(&stage) || slow == Slow::Save, "{slow:?}: {stages:?}");
        assert!(!stages.is_empty(), "{slow:?}");
        assert!(departed.machine.rehearsals > 0);
        assert_eq!(departed.statistics.convergence, Ending::Converged);
        assert!(departed.statistics.predicted_downtime.is_some());
    }
}

/// A link that stands still in the middle of the device state does not keep the guest standing; and
/// what is left of that state does not follow when it moves again, so that the destination does not load
/// what nobody waits for.
#[test]
fn a_link_that_stands_still_does_not_hold_up_the_guest() {
    let mut scene = Scene::new(Slow::Save, 0).on_event(|_| {});
    let stall = 5 * LIMIT;
    scene.padding = 3 << 20;
    scene.faults = Faults { stall_frame: Some((64 << 10, stall)), ..Faults::default() };
    scene.source = scene.source.policy(Policy::KeepTrying);
    let outcome = scene.play();
    let called_off = outcome.events.iter().filter_map(|event| match event {
        Event::CalledOff { stage, stood, .. } => Some((*stage, *stood)),
        _ => None,
    });
    // On a busy machine there may be others before it.
    let (before, (_, stood)) = called_off
        .enumerate()
        .find(|(_, (stage, _))| *stage == Some(SwitchoverStage::DeviceState))
        .expect("it was called off");
    assert!(stood < stall, "{stood:?}");
    let attempts = outcome.there_events.split(|event| matches!(event, Event::CalledOff { .. }));
    let until_called_off: Vec<_> = attempts.take(before + 1).flatten().collect();
    let loaded = until_called_off.iter().any(|event| matches!(event, Event::Loaded));
    assert!(!loaded, "{until_called_off:?}");
    outcome.expect_moved();
}

#[test]
fn by_best_effort_it_is_finished_however_long_it_takes() {
    let mut scene = Scene::new(Slow::Load, 1).on_event(|_| {});
    scene.source = scene.source.bound(Bound::BestEffort);
    let outcome = scene.play();
    assert!(called_off(&outcome.events).is_empty());
    let departed = outcome.source.expect("the source hands over");
    assert!(departed.statistics.downtime.total() > LIMIT);
    assert_eq!(departed.statistics.switchover_attempts, 1);
}

#[test]
fn a_destination_that_is_always_too_slow_leaves_the_guest_at_the_source() {
    let mut scene = Scene::new(Slow::Load, u32::MAX).on_event(|_| {});
    scene.source = scene.source.deadline(Duration::from_secs(3));
    let outcome = scene.play();
    assert!(!called_off(&outcome.events).is_empty());
    let failure = outcome.source.as_ref().expect_err("kept");
    assert_eq!(failure.statistics.convergence, Ending::GaveUp);
    assert_eq!(failure.statistics.downtime.total(), Duration::ZERO);
    assert!(failure.statistics.called_off > Duration::ZERO);
    let error = outcome.expect_kept();
    assert!(matches!(error, Error::NotConverging { .. }), "{error:?}");
}
