//! Links that do not come back.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::protocol::Kind;
use pageferry::testing::faulty::{Faults, FaultySource};
use pageferry::testing::memory_transport;
use pageferry::transport::{LinkPurpose, SourceLink, TransportError};
use pageferry::{Blame, Error, Event, GuestAtDestination, GuestAtSource, Timeouts};

use crate::scene::Scene;
use crate::trouble::{BreakingRendezvous, Once, meeting, scene_with, timeouts};

fn short() -> Timeouts {
    Timeouts { rejoin: Duration::from_millis(300), ..timeouts() }
}

fn unreachable() -> TransportError {
    let cause = io::ErrorKind::HostUnreachable.into();
    TransportError::Connect { address: "nowhere".to_owned(), cause }
}

/// The first link breaks before that message of the source, and there is no other.
fn only_link(
    before: Kind,
) -> (memory_transport::MemoryDialler, memory_transport::MemoryRendezvous) {
    let (dialler, rendezvous) = memory_transport::meeting();
    let dialler = dialler.wrapped(move |purpose, link| -> Result<Box<dyn SourceLink>, _> {
        if purpose != LinkPurpose::Begin {
            return Err(unreachable());
        }
        let faults = Faults { cut_before_message: Some(before as u16), ..Faults::default() };
        Ok(Box::new(FaultySource::new(Box::new(link), faults, 1)))
    });
    (dialler, rendezvous)
}

fn scene() -> Scene {
    scene_with(short())
}

#[test]
fn before_the_commit_the_guest_stays() {
    for before in [Kind::Round, Kind::Switchover, Kind::Prepare] {
        let (dialler, rendezvous) = only_link(before);
        let outcome = scene().play_by(Box::new(dialler), Box::new(rendezvous));
        let (here, there) = outcome.expect_kept();
        let there = there.expect("it had greeted");
        for error in [&here, &there] {
            assert!(matches!(error, Error::LinkLost { .. }), "{before}: {error:?}");
            assert_eq!(error.blame(), Blame::Transport);
        }
        let said = here.chain().to_string();
        assert!(
            said.contains(
                "did not come back within 300ms: the transport failed: failed to connect to nowhere"
            ),
            "{said}"
        );
    }
}

#[test]
fn after_the_commit_it_is_uncertain() {
    let (dialler, rendezvous) = only_link(Kind::Commit);
    let outcome = scene().play_by(Box::new(dialler), Box::new(rendezvous));
    let here = outcome.source.expect_err("nobody knows");
    let there = outcome.destination.unwrap().expect_err("nobody knows");
    assert!(matches!(here.guest, GuestAtSource::Uncertain), "{here:?}");
    assert_eq!(there.guest, GuestAtDestination::Uncertain);
    assert!(!here.machine.is_running() && !there.machine.is_running());
}

#[test]
fn a_guest_that_has_arrived_stays_whether_the_source_hears_of_it_or_not() {
    let (dialler, rendezvous) = memory_transport::meeting();
    let dialler = dialler.wrapped(|purpose, link| -> Result<Box<dyn SourceLink>, _> {
        if purpose == LinkPurpose::Begin { Ok(Box::new(link)) } else { Err(unreachable()) }
    });
    let rendezvous = BreakingRendezvous::new(rendezvous, Kind::Resumed as u16);
    let outcome = scene().play_by(Box::new(dialler), Box::new(rendezvous));
    let here = outcome.source.expect_err("it does not know");
    assert!(matches!(here.guest, GuestAtSource::Uncertain), "{here:?}");
    assert!(outcome.destination.unwrap().expect("it is here").machine.is_running());
}

#[test]
fn where_one_side_does_not_want_it_the_first_link_is_the_only_one() {
    for (here, there, once) in [(true, false, false), (false, true, false), (true, true, true)] {
        let limit = |rejoins| Timeouts {
            rejoin: if rejoins { Duration::from_secs(60) } else { Duration::ZERO },
            ..timeouts()
        };
        let mut scene = Scene::new();
        scene.source = scene.source.timeouts(limit(here));
        scene.destination = scene.destination.timeouts(limit(there));
        let (dialler, rendezvous) =
            meeting(|_| Faults { cut_after_page_bytes: Some(500 * 4096), ..Faults::default() });
        let connector: Box<dyn pageferry::transport::Connector> =
            if once { Box::new(Once(dialler)) } else { Box::new(dialler) };
        let began = Instant::now();
        let (error, _) = scene.play_by(connector, Box::new(rendezvous)).expect_kept();
        assert!(began.elapsed() < Duration::from_secs(20));
        assert!(!matches!(error, Error::LinkLost { .. }), "{error:?}");
    }
}

#[test]
fn who_cancels_while_there_is_no_link_has_the_guest_at_once() {
    let mut scene = Scene::new();
    let long = Timeouts { rejoin: Duration::from_secs(600), ..timeouts() };
    scene.source = scene.source.timeouts(long);
    // It is not told, and gives up by itself.
    scene.destination = scene.destination.timeouts(short());
    let handle = scene.source.handle();
    let lost = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&lost);
    scene.source = scene.source.on_event(move |event| {
        if matches!(event, Event::LinkLost { .. }) {
            seen.store(true, Ordering::SeqCst);
        }
    });
    let canceller = thread::spawn(move || {
        while !lost.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        handle.cancel();
    });
    let (dialler, rendezvous) = only_link(Kind::Ping);
    let began = Instant::now();
    let (error, _) = scene.play_by(Box::new(dialler), Box::new(rendezvous)).expect_kept();
    assert!(matches!(error, Error::Cancelled), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(60));
    canceller.join().unwrap();
}

/// The source has given up, and all who knew the way here are gone: no limit, however long, is waited for.
#[test]
fn where_nobody_can_come_any_more_nobody_is_waited_for() {
    let mut scene = Scene::new();
    scene.source = scene.source.timeouts(short());
    let long = Timeouts { rejoin: Duration::MAX, ..timeouts() };
    scene.destination = scene.destination.timeouts(long);
    let (dialler, rendezvous) = only_link(Kind::Ping);
    let (ended, seen) = mpsc::channel();
    thread::spawn(move || {
        // Who looks at it has given up, perhaps.
        let _ = ended.send(scene.play_by(Box::new(dialler), Box::new(rendezvous)));
    });
    let outcome = seen.recv_timeout(Duration::from_secs(60)).expect("it ends");
    let (_, there) = outcome.expect_kept();
    let there = there.expect("it had greeted");
    assert!(matches!(there, Error::LinkLost { .. }), "{there:?}");
    assert!(there.chain().to_string().contains("wait for a source"), "{there:?}");
}

/// Each link is answered, and is lost before anything lands: there is no end of them, but for the limit.
#[test]
fn links_that_move_nothing_are_few_and_count_as_one_that_is_lost() {
    let scene = scene_with(Timeouts { rejoin: Duration::from_secs(2), ..timeouts() });
    let links = Arc::new(AtomicU32::new(0));
    let dials = Arc::clone(&links);
    let (dialler, rendezvous) = meeting(move |_| {
        dials.fetch_add(1, Ordering::SeqCst);
        Faults { cut_before_message: Some(Kind::Round as u16), ..Faults::default() }
    });
    let (error, _) = scene.play_by(Box::new(dialler), Box::new(rendezvous)).expect_kept();
    assert!(matches!(error, Error::LinkLost { .. }), "{error:?}");
    let links = links.load(Ordering::SeqCst);
    assert!((3..20).contains(&links), "{links} links");
}

#[test]
fn who_cancels_while_the_source_may_not_know_has_the_guest_at_once() {
    let mut scene = Scene::new();
    let long = Timeouts { rejoin: Duration::from_secs(600), ..timeouts() };
    scene.source = scene.source.timeouts(short());
    scene.destination = scene.destination.timeouts(long);
    let handle = scene.destination.handle();
    scene.destination = scene.destination.on_event(move |event| {
        if matches!(event, Event::LinkLost { .. }) {
            handle.cancel();
        }
    });
    let (dialler, rendezvous) = memory_transport::meeting();
    let dialler = dialler.wrapped(|purpose, link| -> Result<Box<dyn SourceLink>, _> {
        if purpose == LinkPurpose::Begin { Ok(Box::new(link)) } else { Err(unreachable()) }
    });
    let rendezvous = BreakingRendezvous::new(rendezvous, Kind::Resumed as u16);
    let began = Instant::now();
    let outcome = scene.play_by(Box::new(dialler), Box::new(rendezvous));
    assert!(began.elapsed() < Duration::from_secs(60));
    assert!(outcome.destination.unwrap().expect("it is here").machine.is_running());
}
