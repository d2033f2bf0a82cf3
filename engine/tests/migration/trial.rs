//! A migration that is only tried out: the guest could go, and stays.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use pageferry::dirty::{DirtyBitmap, DirtyError, DirtySource, DirtySources};
use pageferry::testing::{TestMemory, memory_transport};
use pageferry::transport::{OneLink, SourceLink};
use pageferry::{
    Error, Event, GuestAtDestination, GuestAtSource, Machine, SourceFailure, Timeouts, Tried,
};

use crate::scene::{Scene, WORKING_SET, timeouts};
use crate::support::{Refuse, SharedLog, SoftwareLog, TestMachine};

type Answer = Result<Tried<TestMachine>, Box<SourceFailure<TestMachine>>>;

/// A log that reports at first all that was not re-armed before, as KVM's does.
struct AllSet {
    inner: SharedLog,
    armed: Mutex<Option<DirtyBitmap>>,
}

impl DirtySource for AllSet {
    fn name(&self) -> &'static str {
        "all set"
    }

    fn start(&self) -> Result<(), DirtyError> {
        self.inner.start()
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), DirtyError> {
        if let Some(armed) = self.armed.lock().unwrap().take() {
            for region in 0..u16::try_from(armed.regions()).unwrap() {
                let pages =
                    (0..armed.region_pages(region)).filter(|page| !armed.get(region, *page));
                pages.for_each(|page| into.set(region, page));
            }
        }
        self.inner.harvest(into)
    }

    fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        if let Some(armed) = &mut *self.armed.lock().unwrap() {
            armed.merge_words(region, first_page, words);
        }
        Ok(())
    }

    fn put_back(&self, pages: &DirtyBitmap) -> Result<(), DirtyError> {
        self.inner.put_back(pages)
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.inner.stop()
    }
}

/// Tries it out for that long. What came of it at the source, and why the destination says it ended.
fn try_out(scene: Scene, at_most: Duration) -> (Answer, Error) {
    let (source_link, destination_link) = memory_transport::pair();
    let log = SoftwareLog::new(&scene.here);
    let mut machine = TestMachine::new(&scene.here, &log, WORKING_SET, 42);
    machine.resume().unwrap();
    machine.await_writes();
    let mut theirs =
        TestMachine::new(&scene.there, &SoftwareLog::new(&scene.there), WORKING_SET, 43);
    theirs.refuse = scene.destination_refuses;
    theirs.contend_with(&machine);
    let link: Box<dyn SourceLink> = Box::new(source_link);
    let (here, there) = (scene.here.memory(), scene.there.memory());
    thread::scope(|scope| {
        let destination = scene.destination;
        let receiving = scope.spawn(move || {
            let offer =
                destination.negotiate(OneLink::destination(Box::new(destination_link))).unwrap();
            assert!(offer.is_trial());
            let failure = offer.receive(theirs, there).expect_err("no guest comes");
            assert_eq!(failure.guest, GuestAtDestination::AtSource);
            assert_eq!(failure.machine.resumes, 0);
            failure.error
        });
        let armed = Mutex::new(Some(DirtyBitmap::new(here.layout())));
        let dirty = DirtySources::new(vec![Box::new(AllSet { inner: SharedLog(log), armed })]);
        let answer = scene.source.try_out(machine, here, dirty, OneLink::source(link), at_most);
        (answer, receiving.join().expect("the destination does not panic"))
    })
}

#[test]
fn what_a_migration_would_be_like_is_told_and_the_guest_runs_on() {
    let mut scene = Scene::new();
    let paused = Arc::new(AtomicU64::new(0));
    let told = Arc::clone(&paused);
    scene.source = scene.source.on_event(move |event| {
        if matches!(event, Event::GuestPaused | Event::GuestRunsThere | Event::GuestKept) {
            told.fetch_add(1, Ordering::SeqCst);
        }
    });
    let (answer, theirs) = try_out(scene, Duration::from_millis(200));
    let Tried { machine, forecast, statistics } = answer.expect("it could go");
    let forecast = forecast.expect("there was something to measure");
    assert!(forecast.meets_limit && forecast.limit == Duration::from_secs(2), "{forecast:?}");
    assert!(forecast.bytes_per_second > 0.0 && forecast.dirty_pages_per_second > 0.0);
    assert_eq!((paused.load(Ordering::SeqCst), statistics.switchover_attempts), (0, 0));
    assert_eq!(machine.resumes, 1);
    machine.await_writes();
    assert!(machine.holds_lock());
    let told =
        matches!(&theirs, Error::PeerFailed { text, .. } if text.contains("this was a trial"));
    assert!(told, "{theirs}");
}

/// At once, and whatever time it has.
#[test]
fn what_does_not_fit_is_an_error() {
    let mut scene = Scene::new();
    scene.destination_refuses = Refuse::Schema;
    let (answer, _) = try_out(scene, Duration::from_secs(600));
    let failure = answer.expect_err("it could not go");
    assert!(matches!(failure.guest, GuestAtSource::Running), "{failure:?}");
    assert!(failure.error.to_string().contains("Schema refused by the test"), "{failure:?}");
    failure.machine.await_writes();
}

/// The destination serves one at a time.
#[test]
fn a_trial_without_end_is_ended_by_the_destination() {
    let mut scene = Scene::new();
    let stall = Duration::from_millis(100);
    scene.destination = scene.destination.timeouts(Timeouts { stall, ..timeouts() });
    let (answer, theirs) = try_out(scene, Duration::from_secs(600));
    let failure = answer.expect_err("it was ended");
    assert!(matches!(failure.guest, GuestAtSource::Running), "{failure:?}");
    assert!(failure.error.to_string().contains("the end of a trial"), "{failure:?}");
    assert!(matches!(theirs, Error::TimedOut { .. }), "{theirs}");
    failure.machine.await_writes();
}

#[test]
fn a_trial_can_be_cancelled() {
    let mut scene = Scene::new();
    let canceller = Mutex::new(Some(scene.source.handle()));
    scene.source = scene.source.on_event(move |event| {
        if matches!(event, Event::RoundStarted { round: 3, .. })
            && let Some(handle) = canceller.lock().unwrap().take()
        {
            handle.cancel();
        }
    });
    let (answer, _) = try_out(scene, Duration::from_secs(600));
    let failure = answer.expect_err("it was cancelled");
    assert!(matches!(failure.error, Error::Cancelled), "{failure:?}");
    failure.machine.await_writes();
}

/// A tracker may report all that was not re-armed yet, as KVM's log does: no more than parts is sent all the same.
#[test]
fn no_more_than_parts_of_memory_are_sent() {
    let mut scene = Scene::new();
    (scene.here, scene.there) = (TestMemory::new(&[40_000]), TestMemory::new(&[40_000]));
    (0..40_000).for_each(|page| scene.here.fill_page(0, page, 1));
    let (answer, _) = try_out(scene, Duration::ZERO);
    let Tried { forecast, statistics, .. } = answer.expect("it could go");
    let most = u64::from(statistics.round_count) * 2 * 4096;
    assert!(statistics.pages.data + statistics.pages.zero <= most, "{statistics:?}");
    // Nor are they taken for what the guest dirties, which writes 500 of them.
    for round in &statistics.rounds[1..] {
        assert!(round.dirty_pages <= 4096 + WORKING_SET, "{round:?}");
    }
    assert!(forecast.expect("a forecast").meets_limit);
}
