//! Machines that refuse, on either side.

use std::time::Duration;

use pageferry::protocol::{FailureReason, Incompatibility, MAX_DEVICE_STATE_BYTES};
use pageferry::{Blame, Error, GuestAtDestination, GuestAtSource};

use crate::scene::Scene;
use crate::support::Refuse;

#[test]
fn device_state_that_does_not_fit_is_known_before_a_page_moves() {
    let mut scene = Scene::new();
    scene.destination_refuses = Refuse::Schema;
    let outcome = scene.play(|link| link);
    let Err(failure) = &outcome.source else { panic!("it moved") };
    // Neither a round nor a pause, and nothing to put back.
    assert!(failure.statistics.rounds.is_empty() && failure.statistics.pages.data == 0);
    assert_eq!(failure.statistics.downtime.total(), Duration::ZERO);
    assert_eq!(outcome.log.put_back.lock().unwrap().count(), 0);
    let (error, theirs) = outcome.expect_kept();
    let Error::PeerFailed { reason: FailureReason::Incompatible, text } = &error else {
        panic!("{error:?}");
    };
    assert!(text.contains("Schema refused by the test"), "{text}");
    let theirs = theirs.expect("the destination's own error");
    assert!(matches!(theirs, Error::Incompatible(Incompatibility::DeviceState(_))), "{theirs:?}");
    assert_eq!(theirs.blame(), Blame::PeerIncompatible);
}

#[test]
fn a_machine_that_refuses_at_the_source_keeps_its_guest() {
    for refuse in [
        Refuse::Schema,
        Refuse::Rehearse,
        Refuse::Pause,
        Refuse::Save,
        Refuse::Release,
        Refuse::ReleaseHalfWay,
    ] {
        let mut scene = Scene::new();
        scene.source_refuses = refuse;
        let (error, theirs) = scene.play(|link| link).expect_kept();
        assert_eq!(error.blame(), Blame::Machine, "{refuse:?}: {error:?}");
        assert!(matches!(theirs, Some(Error::PeerFailed { .. })), "{theirs:?}");
    }
}

#[test]
fn a_machine_that_refuses_at_the_destination_leaves_the_guest_at_the_source() {
    for refuse in [Refuse::Load, Refuse::Reacquire, Refuse::ReacquireHalfWay, Refuse::Resume] {
        let mut scene = Scene::new();
        scene.destination_refuses = refuse;
        let (error, theirs) = scene.play(|link| link).expect_kept();
        assert_eq!(error.blame(), Blame::PeerFailed, "{refuse:?}: {error:?}");
        assert!(error.to_string().contains("refused by the test"), "{error}");
        assert!(matches!(theirs, Some(Error::Machine { .. })), "{theirs:?}");
    }
}

#[test]
fn a_rehearsal_that_fails_leaves_the_guest_as_it_is() {
    let mut scene = Scene::new();
    scene.source_refuses = Refuse::Rehearse;
    let outcome = scene.play(|link| link);
    let Err(failure) = &outcome.source else { panic!("it moved") };
    assert_eq!(failure.machine.resumes, 1, "a guest that runs was let run");
    outcome.expect_kept();
}

/// Device state that is too long is known from the rehearsal, before the guest has stood still.
#[test]
fn device_state_that_is_too_long_is_refused_before_a_page_moves() {
    let mut scene = Scene::new();
    scene.source_state_bytes = MAX_DEVICE_STATE_BYTES + 1;
    let outcome = scene.play(|link| link);
    let Err(failure) = &outcome.source else { panic!("it moved") };
    assert_eq!(failure.statistics.switchover_attempts, 0);
    assert_eq!(failure.statistics.rounds.len(), 0, "{:?}", failure.statistics);
    let (error, _) = outcome.expect_kept();
    assert_eq!(error.blame(), Blame::Configuration);
    assert!(error.to_string().contains("device state of 268435457 bytes"), "{error}");
}

/// What the destination cannot let go of is named at both sides, and the guest is where it says.
#[test]
fn resources_that_stay_at_a_destination_that_gives_back_are_named() {
    let mut scene = Scene::new();
    scene.destination_refuses = Refuse::ResumeAndRelease;
    let outcome = scene.play(|link| link);
    let failure = outcome.source.expect_err("it was given back");
    let GuestAtSource::Paused(why) = &failure.guest else { panic!("{failure:?}") };
    assert!(why.chain().to_string().contains("the other host holds the lock"), "{why:?}");
    let heard = failure.error.to_string();
    assert!(heard.contains("may still be held"), "{heard}");
    let theirs = outcome.destination.unwrap().expect_err("it gave the guest back");
    assert_eq!(theirs.guest, GuestAtDestination::GivenBack);
    assert!(matches!(theirs.error, Error::StillHeld { .. }), "{theirs:?}");
    let said = theirs.error.chain().to_string();
    assert!(said.contains("ResumeAndRelease refused by the test"), "{said}");
}

#[test]
fn a_guest_that_cannot_be_resumed_after_a_failure_comes_back_paused() {
    let mut scene = Scene::new();
    scene.source_refuses = Refuse::Resume;
    scene.destination_refuses = Refuse::Load;
    let outcome = scene.play(|link| link);
    let mut failure = outcome.source.expect_err("the source keeps its guest");
    assert!(matches!(failure.guest, GuestAtSource::Paused(_)), "{failure:?}");
    // Once the cause is mended the guest goes on.
    failure.machine.refuse = Refuse::Nothing;
    pageferry::Machine::resume(&mut failure.machine).unwrap();
    failure.machine.await_writes();
}
