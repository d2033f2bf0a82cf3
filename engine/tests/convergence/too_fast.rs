//! A guest that dirties memory faster than it can be moved, and one that only seems to.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::convergence::{Forecast, Policy, Throttling};
use pageferry::dirty::{DirtyBitmap, DirtyError, DirtySource, DirtySources};
use pageferry::testing::{TestMemory, memory_transport};
use pageferry::transport::OneLink;
use pageferry::{Destination, Ending, Error, Event, Machine, Phase, Source};

use crate::scene::{LIMIT, PAGES, Scene, Slow, WORKING_SET};
use crate::support::{SoftwareLog, TestMachine};

/// A guest that dirties the same pages in every round, over a link of 4 MiB/s, also while the guest
/// stands still.
fn too_fast(policy: Policy) -> Scene {
    let mut scene = Scene::new(Slow::Save, 0);
    let log = Arc::clone(&scene.log);
    scene.source.handle().limit_bandwidth(NonZeroU64::new(4 << 20));
    scene.source = scene
        .source
        .policy(policy)
        .downtime_limit(Duration::from_millis(40))
        .switchover_bandwidth(NonZeroU64::new(4 << 20).unwrap());
    scene.on_event(move |event| {
        if matches!(event, Event::RoundStarted { .. }) {
            (0..WORKING_SET).for_each(|page| log.mark(0, page));
        }
    })
}

/// A guest that dirties so many pages a second, by the time from one harvest to the next.
struct Steady(Mutex<Instant>);

const STEADY_PAGES_PER_SECOND: f64 = 50_000.0;

impl DirtySource for Steady {
    fn name(&self) -> &'static str {
        "steady"
    }
    fn start(&self) -> Result<(), DirtyError> {
        *self.0.lock().unwrap() = Instant::now();
        Ok(())
    }
    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), DirtyError> {
        let mut since = self.0.lock().unwrap();
        let now = Instant::now();
        let seconds = (now - *since).as_secs_f64();
        *since = now;
        let pages = (0..PAGES).take_while(|page| *page as f64 <= seconds * STEADY_PAGES_PER_SECOND);
        pages.for_each(|page| into.set(0, page));
        Ok(())
    }
    fn rearm(&self, _region: u16, _first_page: u64, _words: &[u64]) -> Result<(), DirtyError> {
        Ok(())
    }
    fn put_back(&self, _pages: &DirtyBitmap) -> Result<(), DirtyError> {
        Ok(())
    }
    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

/// Rounds are over in no time, and most of the pages are written in the rests between them.
#[test]
fn a_guest_is_not_faster_than_it_is_because_rounds_are_short() {
    let memory = TestMemory::new(&[PAGES]);
    let there = TestMemory::new(&[PAGES]);
    let (here_link, there_link) = memory_transport::pair();
    let log = SoftwareLog::new(&memory);
    let failure = thread::scope(|scope| {
        scope.spawn(|| {
            let offer =
                Destination::new().negotiate(OneLink::destination(Box::new(there_link))).unwrap();
            let log = SoftwareLog::new(&there);
            let result = offer.receive(TestMachine::new(&there, &log, 1, 1), there.memory());
            assert!(result.is_err());
        });
        let mut machine = TestMachine::new(&memory, &log, 1, 1);
        machine.resume().unwrap();
        let dirty = DirtySources::new(vec![Box::new(Steady(Mutex::new(Instant::now())))]);
        Source::new()
            .downtime_limit(Duration::ZERO)
            .policy(Policy::KeepTrying)
            .deadline(Duration::from_millis(300))
            .migrate(machine, memory.memory(), dirty, OneLink::source(Box::new(here_link)))
            .unwrap_err()
    });
    assert!(matches!(failure.error, Error::NotConverging { .. }), "{:?}", failure.error);
    let statistics = &failure.statistics;
    assert!(statistics.round_count > 2, "{statistics:?}");
    let ratio = statistics.dirty_pages_per_second / STEADY_PAGES_PER_SECOND;
    assert!((0.5..=1.5).contains(&ratio), "{ratio} of the true rate");
}

/// The limit does not hold while the guest stands still: what remains is through in no time then, and
/// nobody has to be slowed down for it.
#[test]
fn a_guest_is_not_slowed_down_for_a_bandwidth_limit() {
    let mut scene = too_fast(Policy::Throttle(Throttling::default()));
    let handle = scene.source.handle();
    handle.set_switchover_bandwidth(None);
    handle.limit_bandwidth(NonZeroU64::new(2 << 20));
    // What remains takes twice as long by the bandwidth limit.
    scene.source = scene.source.downtime_limit(Duration::from_millis(200));
    let outcome = scene.play();
    assert!(outcome.throttled.is_empty(), "{:?}", outcome.throttled);
    let (departed, _, _) = outcome.expect_moved();
    assert_eq!(departed.statistics.convergence, Ending::Converged);
}

fn forecasts(events: &[Event]) -> Vec<Forecast> {
    let forecast = |event: &Event| match event {
        Event::Forecast(forecast) => Some(*forecast),
        _ => None,
    };
    events.iter().filter_map(forecast).collect()
}

#[test]
fn a_guest_too_fast_is_given_up_early_and_the_event_says_why() {
    let outcome = too_fast(Policy::GiveUp).play();
    let forecasts = forecasts(&outcome.events);
    let first = forecasts[0];
    assert!(!first.meets_limit && first.rounds == 2, "{first:?}");
    assert!(first.least > first.limit && first.limit == Duration::from_millis(40), "{first:?}");
    assert!(first.bytes_per_second > 0.0 && first.dirty_pages_per_second > 0.0, "{first:?}");
    assert!(outcome.throttled.is_empty());
    let rounds = outcome.source.as_ref().expect_err("kept").statistics.rounds.len();
    assert!(rounds <= 6, "{rounds}");
    assert!(matches!(outcome.expect_kept(), Error::NotConverging { .. }));
}

#[test]
fn a_guest_too_fast_is_slowed_down_step_by_step_and_gets_its_speed_back() {
    let mut scene = too_fast(Policy::Throttle(Throttling { step_percent: 30, ..<_>::default() }));
    // It does not care.
    scene.source = scene.source.deadline(Duration::from_secs(3));
    let outcome = scene.play();
    let mut steps = outcome.throttled.clone();
    steps.dedup();
    assert_eq!(steps, [20, 50, 80, 99, 0]);
    let statistics = &outcome.source.as_ref().expect_err("kept").statistics;
    assert_eq!(statistics.throttle_max_percent, 99);
    let told = |percent| {
        let told =
            |event: &&Event| matches!(event, Event::Throttled { percent: p } if *p == percent);
        outcome.events.iter().filter(told).count()
    };
    assert_eq!([20, 50, 80, 99].map(told), [1, 1, 1, 1]);
    assert!(matches!(outcome.expect_kept(), Error::NotConverging { .. }));
}

/// What is polled is what is told.
#[test]
fn snapshots_say_what_is_done_about_a_guest_too_fast() {
    let scene = too_fast(Policy::Throttle(Throttling { step_percent: 79, ..<_>::default() }));
    let handle = scene.source.handle();
    let polled = handle.clone();
    let mut forecasts = 0;
    let mut scene = scene.on_event(move |event| {
        let snapshot = polled.snapshot();
        match event {
            Event::Throttled { percent } => assert_eq!(snapshot.throttle_percent, *percent),
            Event::Forecast(forecast) => {
                assert_eq!(snapshot.forecast, Some(*forecast));
                forecasts += 1;
            }
            Event::RoundStarted { round, dirty_pages } => {
                assert_eq!((snapshot.round, snapshot.round_pages), (*round, *dirty_pages));
            }
            Event::RoundFinished { verdict, .. } => {
                assert_eq!(snapshot.expected_downtime, verdict.expected());
                assert_eq!(snapshot.left_pages, 0);
            }
            Event::GuestKept => assert!(forecasts > 0 && snapshot.throttle_percent == 0),
            _ => {}
        }
    });
    scene.source = scene.source.deadline(Duration::from_secs(2));
    let outcome = scene.play();
    assert!(outcome.throttled.contains(&99), "{:?}", outcome.throttled);
    assert!(matches!(outcome.expect_kept(), Error::NotConverging { .. }));
    assert_eq!(handle.snapshot().phase, Phase::Ended);
}

/// Nothing is predicted of a guest that is slower, and nobody is told that it is.
#[test]
fn a_guest_that_cannot_be_slowed_down_is_waited_for() {
    let mut scene = too_fast(Policy::Throttle(Throttling::default()));
    scene.source = scene.source.deadline(Duration::from_secs(2));
    scene.can_throttle = false;
    let outcome = scene.play();
    assert_eq!(outcome.throttled, [20]);
    let told = |what: fn(&&Event) -> bool| outcome.events.iter().filter(what).count();
    assert_eq!(told(|event| matches!(event, Event::CannotThrottle)), 1);
    assert_eq!(told(|event| matches!(event, Event::Throttled { .. })), 0);
    let failure = outcome.source.as_ref().expect_err("kept");
    assert_eq!(failure.statistics.throttle_max_percent, 0);
    assert!(matches!(failure.error, Error::NotConverging { .. }));
}

#[test]
fn limits_and_policy_count_from_when_they_are_changed() {
    let scene = too_fast(Policy::Throttle(Throttling::default()));
    let handle = scene.source.handle();
    let log = Arc::clone(&scene.log);
    let scene = scene.on_event(move |event| match event {
        Event::RoundStarted { .. } => (0..WORKING_SET).for_each(|page| log.mark(0, page)),
        Event::Throttled { percent: 30 } => {
            assert!(matches!(handle.set_policy(Policy::PostCopy), Err(Error::Unsupported(_))));
            let nonsense = Throttling { max_percent: 100, ..Throttling::default() };
            let refused = handle.set_policy(Policy::Throttle(nonsense));
            assert!(matches!(refused, Err(Error::Configuration(_))));
            handle.set_policy(Policy::KeepTrying).unwrap();
        }
        Event::Throttled { percent: 0 } => handle.set_downtime_limit(LIMIT),
        _ => {}
    });
    let (departed, _, _) = scene.play().expect_moved();
    assert_eq!(departed.statistics.throttle_max_percent, 30);
    assert_eq!(departed.statistics.convergence, Ending::Throttled);
}
