//! What is lost with a link, and that it is made up for.

use std::time::Duration;

use pageferry::protocol::Kind;
use pageferry::testing::faulty::Faults;
use pageferry::testing::{Random, TestMemory};
use pageferry::{Event, Timeouts};

use crate::scene::Scene;
use crate::support::SoftwareLog;
use crate::trouble::{BreakingRendezvous, Told, meeting, scene_with, timeouts};

fn scene() -> Scene {
    scene_with(timeouts())
}

/// A link that breaks is noticed, whatever the commit is waited for.
fn unending() -> Timeouts {
    Timeouts { commit: Duration::MAX, ..timeouts() }
}

#[test]
fn a_guest_arrives_whole_over_many_links_that_break_at_random() {
    let mut seeds = Random::seeded("links that break at random");
    for run in 0..10 {
        let mut random = Random::new(seeds.next_u64());
        let told = Told::default();
        let mut scene = scene();
        scene.source = scene.source.on_event(told.sink());
        // Twenty links of which each moves up to half of the guest.
        let (dialler, rendezvous) = meeting(move |link| Faults {
            cut_after_page_bytes: (link < 20).then(|| random.below(1500 * 4096)),
            delay_at_most: Duration::from_micros(100),
            reorder_depth: 2,
            ..Faults::default()
        });
        let (departed, arrived) =
            scene.play_by(Box::new(dialler), Box::new(rendezvous)).expect_moved();
        let lost = told.all().iter().filter(|what| *what == "lost").count();
        assert!(lost >= 1, "run {run}: {:?}", told.all());
        assert_eq!(departed.statistics.rejoins as usize, lost, "run {run}");
        assert_eq!(arrived.statistics.rejoins as usize, lost, "run {run}");
    }
}

/// Each message of the source is the one that a link breaks before, once.
#[test]
fn a_link_may_break_before_any_message_of_the_source() {
    for kind in [
        Kind::Round,
        Kind::Ping,
        Kind::Switchover,
        Kind::Verify,
        Kind::Compared,
        Kind::StateChunk,
        Kind::Prepare,
        Kind::Commit,
    ] {
        let (here, there) = (Told::default(), Told::default());
        let mut scene = scene_with(unending());
        scene.source = scene.source.on_event(here.sink());
        scene.destination = scene.destination.on_event(there.sink());
        let (dialler, rendezvous) = meeting(move |link| Faults {
            cut_before_message: (link == 0).then_some(kind as u16),
            ..Faults::default()
        });
        let (departed, _) = scene.play_by(Box::new(dialler), Box::new(rendezvous)).expect_moved();
        assert_eq!(departed.statistics.rejoins, 1, "{kind}");
        let is_stopped = !matches!(kind, Kind::Round | Kind::Ping | Kind::Commit);
        // A switchover that has not begun is called off for nothing.
        let called_off = is_stopped && kind != Kind::Switchover;
        let expected: &[&str] = if called_off {
            &["called off", "lost", "rejoined 1", "there"]
        } else {
            &["lost", "rejoined 1", "there"]
        };
        assert_eq!(here.all(), expected, "{kind}");
        assert!(there.all().contains(&"rejoined 1".to_owned()), "{kind}: {:?}", there.all());
    }
}

#[test]
fn a_link_may_break_before_any_message_of_the_destination() {
    for kind in [Kind::Pong, Kind::Verified, Kind::Prepared, Kind::Resumed] {
        let (here, there) = (Told::default(), Told::default());
        let mut scene = scene_with(unending());
        scene.source = scene.source.on_event(here.sink());
        scene.destination = scene.destination.on_event(there.sink());
        let (dialler, rendezvous) = meeting(|_| Faults::default());
        let rendezvous = BreakingRendezvous::new(rendezvous, kind as u16);
        let (departed, arrived) =
            scene.play_by(Box::new(dialler), Box::new(rendezvous)).expect_moved();
        assert_eq!(departed.statistics.rejoins, 1, "{kind}");
        assert_eq!(arrived.statistics.rejoins, 1, "{kind}");
        // One that is here has not come twice.
        assert_eq!(there.all().iter().filter(|what| *what == "there").count(), 1, "{kind}");
        let is_stopped = matches!(kind, Kind::Verified | Kind::Prepared);
        assert_eq!(here.all().contains(&"called off".to_owned()), is_stopped, "{kind}");
    }
}

#[test]
fn the_last_channel_is_made_anew_with_its_link() {
    let mut scene = scene();
    scene.source = scene.source.channels(1);
    let (dialler, rendezvous) = meeting(|link| Faults {
        lose_channel: (link < 3).then_some((0, 700 * 4096)),
        ..Faults::default()
    });
    let (departed, _) = scene.play_by(Box::new(dialler), Box::new(rendezvous)).expect_moved();
    assert!((1..=3).contains(&departed.statistics.rejoins), "{}", departed.statistics.rejoins);
}

/// Only the source may end it then, also where the link is lost.
#[test]
fn a_cancel_that_is_too_late_does_not_turn_the_source_away() {
    let mut scene = scene();
    let handle = scene.destination.handle();
    scene.destination = scene.destination.on_event(move |event| {
        if matches!(event, Event::Loaded) {
            handle.cancel();
        }
    });
    let (dialler, rendezvous) = meeting(|link| Faults {
        cut_before_message: (link == 0).then_some(Kind::Commit as u16),
        ..Faults::default()
    });
    let (departed, arrived) = scene.play_by(Box::new(dialler), Box::new(rendezvous)).expect_moved();
    assert_eq!((departed.statistics.rejoins, arrived.statistics.rejoins), (1, 1));
}

/// Nobody asks again: the guest is there, and the source knows.
#[test]
fn a_destination_that_does_not_hear_that_it_was_heard_goes_on() {
    let mut scene = scene();
    let short = Timeouts { rejoin: Duration::from_millis(300), ..timeouts() };
    scene.destination = scene.destination.timeouts(short);
    let (dialler, rendezvous) =
        meeting(|_| Faults { cut_before_message: Some(Kind::Heard as u16), ..Faults::default() });
    let (departed, arrived) = scene.play_by(Box::new(dialler), Box::new(rendezvous)).expect_moved();
    assert_eq!((departed.statistics.rejoins, arrived.statistics.rejoins), (0, 0));
}

/// Where everything that had landed was sent once more, it would be twice as much at least.
#[test]
fn what_has_landed_is_not_sent_again() {
    let bytes = |cuts: u32| {
        let mut scene = scene();
        (scene.here, scene.there) = (TestMemory::new(&[20_000]), TestMemory::new(&[20_000]));
        (0..15_000).for_each(|page| scene.here.fill_page(0, page, 1));
        scene.log = SoftwareLog::new(&scene.here);
        // No page is dirtied on the way.
        scene.paused = true;
        scene.source = scene.source.channels(1).verify(false);
        // Little is under way where all takes its time.
        let (dialler, rendezvous) = meeting(move |link| Faults {
            cut_after_page_bytes: (link < cuts).then_some(3000 * 4096),
            ..Faults::default()
        });
        let outcome = scene.play_by(Box::new(dialler), Box::new(rendezvous));
        let departed = outcome.source.expect("it left");
        assert_eq!(departed.statistics.rejoins, cuts);
        outcome.destination.expect("greeted").expect("it arrived").statistics.pages.data
    };
    let (undisturbed, cut) = (bytes(0), bytes(4));
    eprintln!("{undisturbed} pages, and {cut} over five links");
    assert!(cut < undisturbed * 3 / 2, "{cut} pages against {undisturbed}");
}
