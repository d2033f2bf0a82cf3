//! Whole migrations over the in-memory transport: with a guest that writes all the time, with
//! every kind of trouble, and with machines that refuse.

mod channels;
mod opening;
mod scene;
#[path = "../support/mod.rs"]
mod support;

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, bounded};
use pageferry::convergence::Bound;
use pageferry::dirty::{DirtyBitmap, DirtySources};
use pageferry::protocol::{FailureReason, Incompatibility, MAX_DEVICE_STATE_BYTES};
use pageferry::testing::faulty::{Faults, FaultySource};
use pageferry::testing::{TestMemory, memory_transport};
use pageferry::{Blame, Error, Event, GuestAtDestination, GuestAtSource, Phase, Source};
use scene::{REGION_PAGES, Scene, WORKING_SET};
use support::{Refuse, SoftwareLog, TestMachine};

#[test]
fn a_busy_guest_moves_with_any_number_of_channels() {
    for channels in [1, 2, 5, 8] {
        let mut scene = Scene::new();
        scene.source = scene.source.channels(channels);
        let (departed, arrived) = scene.play(|link| link).expect_moved();
        let statistics = departed.statistics;
        assert!(statistics.rounds.len() >= 2, "{statistics:?}");
        assert!(statistics.pages.data >= 2100, "{statistics:?}");
        assert!(statistics.pages.zero >= REGION_PAGES.iter().sum::<u64>() - 2100);
        assert_eq!(arrived.statistics.pages.data, statistics.pages.data);
        // The in-memory transport copies, and says so.
        assert_eq!(statistics.user_copied_bytes, statistics.pages.data * 4096);
        let parts = statistics.downtime;
        assert!(parts.total() > Duration::ZERO && parts.standstill() >= parts.total());
        assert!(parts.standstill() <= statistics.total);
    }
}

#[test]
fn pages_that_are_zero_are_not_touched_on_either_side() {
    let mut scene = Scene::new();
    scene.here = TestMemory::of_memfds(&REGION_PAGES);
    scene.there = TestMemory::of_memfds(&REGION_PAGES);
    scene.log = SoftwareLog::new(&scene.here);
    (0..1000).for_each(|page| scene.here.fill_page(0, page, 1));
    // Zero pages that the source has touched are not touched at the destination either.
    (1000..2000).for_each(|page| scene.here.write(0, page, &[0; 4096]));
    let (here, there) = (scene.here.clone(), scene.there.clone());
    let before = here.allocated_bytes();
    let (_, arrived) = scene.play(|link| link).expect_moved_without_reading();
    // One page more at the source: saving the machine writes it.
    assert_eq!(here.allocated_bytes(), before + 4096);
    // The guest makes some of its pages zero; those are not touched either.
    assert!(there.allocated_bytes() <= 1001 * 4096, "{}", there.allocated_bytes());
    // Only pages that were sent as data before are mentioned as zero.
    assert!(arrived.statistics.pages.zero <= arrived.statistics.pages.data);
}

#[test]
fn memory_is_populated_ahead_where_there_is_data() {
    let mut scene = Scene::new();
    scene.here = TestMemory::of_memfds(&REGION_PAGES);
    scene.there = TestMemory::of_memfds(&REGION_PAGES);
    scene.log = SoftwareLog::new(&scene.here);
    (500..1500).for_each(|page| scene.here.fill_page(0, page, 1));
    scene.destination = scene.destination.populate_ahead(2);
    let there = scene.there.clone();
    let (_, arrived) = scene.play(|link| link).expect_moved_without_reading();
    let populated = arrived.statistics.populated;
    assert_eq!(populated.threads, 2);
    assert!(populated.bytes > 0 && populated.took > Duration::ZERO, "{populated:?}");
    // What the guest has written since, and nothing that is zero.
    assert!(there.allocated_bytes() <= 1501 * 4096, "{}", there.allocated_bytes());
}

#[test]
fn trouble_within_the_contract_is_survived() {
    for seed in 0..4 {
        eprintln!("seed {seed}");
        let faults = Faults {
            delay_at_most: Duration::from_micros(30),
            pieces_of_pages: Some(2 + 3 * u32::try_from(seed).unwrap()),
            reorder_depth: 4,
            ..Faults::default()
        };
        Scene::new().play(|link| Box::new(FaultySource::new(link, faults, seed))).expect_moved();
    }
}

#[test]
fn a_link_cut_while_pages_flow_leaves_the_guest_at_the_source() {
    for pages in [0, 1, 100, 1500, 2100] {
        let faults = Faults { cut_after_page_bytes: Some(pages * 4096), ..Faults::default() };
        let outcome = Scene::new().play(|link| Box::new(FaultySource::new(link, faults, pages)));
        let not_landed = outcome.log.put_back.lock().unwrap().count();
        let (error, _) = outcome.expect_kept();
        assert_eq!(error.blame(), Blame::Transport, "{error:?}");
        // What had not landed was put back: at least what never went out.
        let sent_at_most = pages;
        assert!(not_landed >= 2100 - sent_at_most, "{not_landed} put back after {pages}");
    }
}

#[test]
fn a_link_cut_at_any_control_message_is_safe() {
    const COMMIT: u16 = 8;
    // How many messages a migration takes is not the same each time, so the one that matters most is
    // told by its type.
    let by_count =
        (0..20).map(|frames| Faults { cut_after_frames: Some(frames), ..Faults::default() });
    let at_the_commit = Faults { cut_before_message: Some(COMMIT), ..Faults::default() };
    let mut ends = [0_u32; 3];
    for faults in by_count.chain([at_the_commit, Faults::default()]) {
        let outcome = Scene::new().play(|link| Box::new(FaultySource::new(link, faults, 1)));
        let source_runs = match &outcome.source {
            Ok(departed) => departed.machine.is_running(),
            Err(failure) => failure.machine.is_running(),
        };
        let destination_runs = match &outcome.destination {
            Ok(Ok(arrived)) => arrived.machine.is_running(),
            Ok(Err(failure)) => failure.machine.is_running(),
            Err(_) => false,
        };
        let uncertain = matches!(&outcome.source, Err(failure) if failure.error.is_uncertain())
            || matches!(&outcome.destination, Ok(Err(failure)) if failure.error.is_uncertain());
        assert!(!(source_runs && destination_runs), "two guests: {faults:?}");
        assert!(source_runs || destination_runs || uncertain, "no guest: {faults:?}");
        assert!(uncertain || faults.cut_before_message.is_none(), "certain without a commit");
        ends[if uncertain { 2 } else { usize::from(destination_runs) }] += 1;
    }
    assert!(ends.iter().all(|count| *count > 0), "kept, moved, uncertain: {ends:?}");
}

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

#[test]
fn different_memory_is_refused_before_a_page_moves() {
    let mut scene = Scene::new();
    scene.there = TestMemory::new(&[3000]);
    let (error, theirs) = scene.play(|link| link).expect_kept();
    assert!(error.to_string().contains("memory maps differ"), "{error}");
    assert_eq!(theirs.unwrap().blame(), Blame::PeerIncompatible);
}

#[test]
fn too_many_channels_are_refused() {
    let mut scene = Scene::new();
    scene.destination = scene.destination.most_channels(2);
    let (error, _) = scene.play(|link| link).expect_kept();
    assert!(error.to_string().contains("3 data channels wanted, 1 to 2"), "{error}");
}

#[test]
fn a_senseless_configuration_is_refused() {
    for source in [Source::new().channels(0), Source::new().max_rounds(0)] {
        let mut scene = Scene::new();
        scene.source = source;
        let (error, _) = scene.play(|link| link).expect_kept();
        assert_eq!(error.blame(), Blame::Configuration);
    }
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
        assert_eq!(handle.progress().phase, Phase::Ended);
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

#[test]
fn a_declined_offer_leaves_the_guest_at_the_source() {
    let Scene { here, log, source, destination, .. } = Scene::new();
    let (source_link, destination_link) = memory_transport::pair();
    let machine = TestMachine::new(&here, &log, WORKING_SET, 1);
    let failure = thread::scope(|scope| {
        scope.spawn(|| {
            let offer = destination.negotiate(Box::new(destination_link)).unwrap();
            assert_eq!(offer.description(), b"a machine");
            assert_eq!(offer.layout(), here.memory().layout());
            offer.decline("no room");
        });
        let source = source.description(b"a machine".to_vec());
        source
            .migrate(machine, here.memory(), DirtySources::new(vec![]), Box::new(source_link))
            .expect_err("declined")
    });
    assert!(failure.error.to_string().contains("no room"), "{}", failure.error);
}

/// What a dirty source misses is lost at the destination, and only comparing memory tells.
#[test]
fn memory_that_differs_is_found_before_the_commit() {
    let mut scene = Scene::new();
    let here = scene.here.clone();
    scene.source = scene.source.on_event(move |event| {
        if matches!(event, Event::GuestPaused) {
            // Behind the log's back.
            here.fill_page(0, WORKING_SET, 99);
        }
    });
    let (error, there) = scene.play(|link| link).expect_kept();
    assert!(matches!(error, Error::MemoryDiffers { .. }), "{error:?}");
    assert!(matches!(there, Some(Error::PeerFailed { .. })), "{there:?}");
}

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
            while handle.progress().landed_bytes == 0 {
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
            while handle.progress().landed_bytes == 0 {
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
