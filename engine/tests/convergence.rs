//! Switchovers that take too long, guests that do not converge, and limits that change on the way.

mod support;

use std::num::{NonZeroU16, NonZeroU64};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::convergence::{Bound, Forecast, Policy, Term, Throttling};
use pageferry::dirty::{DirtyBitmap, DirtyError, DirtySource, DirtySources};
use pageferry::testing::faulty::{Faults, FaultySource};
use pageferry::testing::{TestMemory, memory_transport};
use pageferry::{
    Arrived, Departed, Destination, DestinationFailure, Ending, Error, Event, GuestAtDestination,
    GuestAtSource, Machine, MachineError, Rehearsal, Source, SourceFailure, SwitchoverStage,
    Timeouts,
};
use support::{SharedLog, SoftwareLog, TestMachine};

const PAGES: u64 = 2000;
const WORKING_SET: u64 = 200;

/// Long enough for a busy machine to meet, short enough to wait for.
const LIMIT: Duration = Duration::from_millis(400);

/// What nothing takes that goes on.
const HANG: Duration = Duration::from_secs(20);

/// When a machine takes its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slow {
    Save,
    Load,
    Release,
    /// For so long.
    ReleaseFor(Duration),
}

/// A machine that takes too long for something so many times, and notes by how much it was slowed
/// down.
struct SlowMachine {
    inner: TestMachine,
    slow: Slow,
    times: u32,
    takes: Duration,
    /// Instead of that: as long as the source's guest stands still, by what is heard of it.
    stands_still: Option<Receiver<bool>>,
    /// Bytes of device state beyond what it is about.
    padding: usize,
    throttled: Arc<Mutex<Vec<u8>>>,
    rehearsals: u32,
}

impl std::fmt::Debug for SlowMachine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SlowMachine").field("slow", &self.slow).finish_non_exhaustive()
    }
}

impl SlowMachine {
    fn take_time(&mut self, at: Slow) {
        if at == self.slow && self.times > 0 {
            self.times -= 1;
            let Some(stands_still) = &self.stands_still else {
                return thread::sleep(self.takes);
            };
            let mut stands = true;
            while let Ok(now) =
                stands_still.recv_timeout(if stands { HANG } else { Duration::ZERO })
            {
                stands = now;
            }
        }
    }
}

impl Machine for SlowMachine {
    fn pause(&mut self) -> Result<(), MachineError> {
        self.inner.pause()
    }
    fn resume(&mut self) -> Result<(), MachineError> {
        self.inner.resume()
    }
    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), MachineError> {
        self.take_time(Slow::Save);
        self.inner.save(state)?;
        state.resize(state.len() + self.padding, 7);
        Ok(())
    }
    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        self.take_time(Slow::Load);
        let (state, padding) = state.split_at(state.len() - self.padding);
        assert!(padding.iter().all(|byte| *byte == 7));
        self.inner.load(state)
    }
    fn release_resources(&mut self) -> Result<(), MachineError> {
        self.take_time(Slow::Release);
        if let Slow::ReleaseFor(time) = self.slow {
            thread::sleep(time);
        }
        self.inner.release_resources()
    }
    fn reacquire_resources(&mut self) -> Result<(), MachineError> {
        self.inner.reacquire_resources()
    }
    fn rehearse(&mut self) -> Result<Option<Rehearsal>, MachineError> {
        self.rehearsals += 1;
        Ok(Some(Rehearsal {
            state_bytes: 8,
            save: Duration::from_millis(1),
            ..Rehearsal::default()
        }))
    }
    fn throttle(&mut self, percent: u8) {
        self.throttled.lock().unwrap().push(percent);
    }
}

/// What was heard on one side.
type Events = Arc<Mutex<Vec<Event>>>;

struct Scene {
    here: TestMemory,
    log: Arc<SoftwareLog>,
    slow: (Slow, u32),
    /// How long each time.
    takes: Duration,
    /// For the destination's machine.
    stands_still: Option<Receiver<bool>>,
    padding: usize,
    faults: Faults,
    source: Source,
    destination: Destination,
    events: Events,
    there_events: Events,
    throttled: Arc<Mutex<Vec<u8>>>,
}

struct Outcome {
    source: Result<Departed<SlowMachine>, Box<SourceFailure<SlowMachine>>>,
    destination: Result<Arrived<SlowMachine>, Box<DestinationFailure<SlowMachine>>>,
    log: Arc<SoftwareLog>,
    events: Vec<Event>,
    there_events: Vec<Event>,
    throttled: Vec<u8>,
}

impl Scene {
    fn new(slow: Slow, times: u32) -> Self {
        let here = TestMemory::new(&[PAGES]);
        (0..PAGES / 2).for_each(|page| here.fill_page(0, page, 1));
        Self {
            log: SoftwareLog::new(&here),
            here,
            slow: (slow, times),
            takes: LIMIT,
            stands_still: None,
            padding: 0,
            faults: Faults::default(),
            source: Source::new().channels(2).downtime_limit(LIMIT),
            destination: Destination::new(),
            events: Events::default(),
            there_events: Events::default(),
            throttled: Arc::default(),
        }
    }

    /// Has `hear` called with each event at the source, besides keeping it.
    fn on_event(mut self, mut hear: impl FnMut(&Event) + Send + 'static) -> Self {
        let events = Arc::clone(&self.events);
        self.source = self.source.on_event(move |event| {
            events.lock().unwrap().push(event.clone());
            hear(event);
        });
        self
    }

    fn play(self) -> Outcome {
        let there = TestMemory::new(&[PAGES]);
        let (source_link, destination_link) = memory_transport::pair();
        let machine = |memory: &TestMemory, log: &Arc<SoftwareLog>, seed| SlowMachine {
            inner: TestMachine::new(memory, log, WORKING_SET, seed),
            slow: self.slow.0,
            times: self.slow.1,
            takes: self.takes,
            stands_still: None,
            padding: self.padding,
            throttled: Arc::clone(&self.throttled),
            rehearsals: 0,
        };
        let mut mine = machine(&self.here, &self.log, 42);
        mine.resume().unwrap();
        mine.inner.await_writes();
        let mut theirs = machine(&there, &SoftwareLog::new(&there), 43);
        theirs.inner.contend_with(&mine.inner);
        theirs.stands_still = self.stands_still;
        let hear_there = Arc::clone(&self.there_events);
        let destination =
            self.destination.on_event(move |event| hear_there.lock().unwrap().push(event.clone()));
        let (source, destination) = thread::scope(|scope| {
            let receiving = scope.spawn(|| {
                let offer = destination.negotiate(Box::new(destination_link)).unwrap();
                offer.receive(theirs, there.memory())
            });
            let dirty = DirtySources::new(vec![Box::new(SharedLog(Arc::clone(&self.log)))]);
            let link = FaultySource::new(Box::new(source_link), self.faults, 1);
            let source = self.source.migrate(mine, self.here.memory(), dirty, Box::new(link));
            (source, receiving.join().expect("the destination does not panic"))
        });
        Outcome {
            source,
            destination,
            log: self.log,
            events: std::mem::take(&mut self.events.lock().unwrap()),
            there_events: std::mem::take(&mut self.there_events.lock().unwrap()),
            throttled: std::mem::take(&mut self.throttled.lock().unwrap()),
        }
    }
}

fn called_off(events: &[Event]) -> Vec<Option<SwitchoverStage>> {
    let stage = |event: &Event| match event {
        Event::CalledOff { stage, .. } => Some(*stage),
        _ => None,
    };
    events.iter().filter_map(stage).collect()
}

impl Outcome {
    /// The guest left in the end. By how it was called off before, as the source saw it.
    fn expect_moved(self) -> (Departed<SlowMachine>, Arrived<SlowMachine>, Vec<SwitchoverStage>) {
        let departed = self.source.expect("the source hands over");
        let arrived = self.destination.expect("the guest arrives");
        assert!(arrived.machine.inner.is_running() && !departed.machine.inner.is_running());
        assert!(arrived.machine.inner.holds_lock() && !departed.machine.inner.holds_lock());
        // What was loaded last is what the guest was when it left.
        assert_eq!(arrived.machine.inner.loaded, Some(departed.machine.inner.writes()));
        arrived.machine.inner.await_writes();
        let here = called_off(&self.events);
        assert_eq!(here.len(), called_off(&self.there_events).len());
        let statistics = &departed.statistics;
        assert_eq!(statistics.switchover_attempts as usize, here.len() + 1);
        assert_eq!(statistics.called_off > Duration::ZERO, !here.is_empty());
        assert!(statistics.downtime.total() <= LIMIT, "{statistics:?}");
        let stages = here.into_iter().flatten().collect();
        (departed, arrived, stages)
    }

    /// The guest stayed, at its own speed.
    fn expect_kept(self) -> Error {
        let failure = self.source.expect_err("the source keeps its guest");
        assert!(matches!(failure.guest, GuestAtSource::Running), "{failure}");
        assert!(failure.machine.inner.is_running() && failure.machine.inner.holds_lock());
        failure.machine.inner.await_writes();
        assert!(self.destination.is_err());
        assert!(!self.log.tracking.load(std::sync::atomic::Ordering::SeqCst));
        assert!(matches!(self.throttled.last(), None | Some(0)), "{:?}", self.throttled);
        failure.error
    }
}

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

/// A destination that waits no longer for the commit says so, and a source that has not committed hears
/// it: its guest is its own, however long it took to release what it held.
#[test]
fn a_destination_that_waited_too_long_gets_no_commit() {
    let patience = Duration::from_millis(200);
    let mut scene = Scene::new(Slow::ReleaseFor(20 * patience), 0).on_event(|_| {});
    scene.source = scene.source.policy(Policy::KeepTrying).bound(Bound::BestEffort);
    let timeouts = Timeouts { commit: patience, release: patience, ..Timeouts::default() };
    scene.destination = scene.destination.timeouts(timeouts);
    let outcome = scene.play();
    let theirs = outcome.destination.as_ref().expect_err("it has waited for the commit");
    assert_eq!(theirs.guest, GuestAtDestination::Uncertain);
    let error = outcome.expect_kept();
    assert!(matches!(error, Error::PeerFailed { .. }), "{error:?}");
    assert!(error.to_string().contains("the source to release its resources"), "{error}");
}

/// A source that is busy releasing says so, and a destination waits longer for its commit than for that
/// of a silent one.
#[test]
fn a_release_that_takes_longer_than_the_wait_for_a_commit_is_waited_for() {
    let patience = Duration::from_secs(2);
    let mut scene = Scene::new(Slow::ReleaseFor(patience * 5 / 2), 0).on_event(|_| {});
    let timeouts = Timeouts { commit: patience, ..Timeouts::default() };
    scene.source = scene.source.policy(Policy::KeepTrying).bound(Bound::BestEffort);
    scene.source = scene.source.timeouts(timeouts);
    scene.destination = scene.destination.timeouts(timeouts);
    let outcome = scene.play();
    assert!(called_off(&outcome.events).is_empty());
    let departed = outcome.source.expect("the source hands over");
    assert!(departed.statistics.downtime.total() > 2 * patience);
    assert!(outcome.destination.expect("the guest arrives").machine.inner.is_running());
}

/// Each side has its own limits, and neither knows the other's: the least patient destination hears of a
/// release in time, from a source with any limits.
#[test]
fn a_destination_with_the_smallest_limit_waits_for_a_release() {
    for theirs in [Duration::ZERO, Duration::from_millis(500)] {
        let mut scene = Scene::new(Slow::ReleaseFor(Duration::from_secs(3)), 0).on_event(|_| {});
        scene.source = scene.source.policy(Policy::KeepTrying).bound(Bound::BestEffort);
        let timeouts = Timeouts { commit: theirs, ..Timeouts::default() };
        scene.destination = scene.destination.timeouts(timeouts);
        let outcome = scene.play();
        outcome.source.expect("the source hands over");
        assert!(outcome.destination.expect("the guest arrives").machine.inner.is_running());
    }
}

/// But not for ever, however often it says so.
#[test]
fn a_source_that_only_says_that_it_releases_is_not_waited_for() {
    let patience = Duration::from_secs(1);
    let mut scene = Scene::new(Slow::ReleaseFor(5 * patience), 0).on_event(|_| {});
    let timeouts = Timeouts { commit: patience, release: 2 * patience, ..Timeouts::default() };
    scene.source = scene.source.policy(Policy::KeepTrying).bound(Bound::BestEffort);
    scene.source = scene.source.timeouts(timeouts);
    scene.destination = scene.destination.timeouts(timeouts);
    let outcome = scene.play();
    let theirs = outcome.destination.as_ref().expect_err("it has waited for the release");
    assert_eq!(theirs.guest, GuestAtDestination::Uncertain);
    let error = outcome.expect_kept();
    assert!(error.to_string().contains("the source to release its resources"), "{error}");
}

/// It does not converge, and the error names what is slow: slower than anything a busy machine makes of
/// the rest.
fn assert_names(scene: Scene, term: Term, at_least: Duration) {
    let error = scene.play().expect_kept();
    let Error::NotConverging { at_fault, takes, expected, .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(*at_fault, term, "{error}");
    assert!(*takes >= at_least && *expected >= *takes, "{error}");
    assert!(error.to_string().contains(&format!("{term} takes about")), "{error}");
}

/// However little is hoped for after a load that took too long, the error names what it took.
#[test]
fn what_takes_too_long_is_named() {
    for (slow, term) in [(Slow::Load, Term::Load), (Slow::Release, Term::Release)] {
        let mut scene = Scene::new(slow, u32::MAX).on_event(|_| {});
        scene.takes = 3 * LIMIT;
        scene.source = scene.source.policy(Policy::KeepTrying).deadline(8 * LIMIT);
        assert_names(scene, term, 3 * LIMIT);
    }
}

/// A load that is not over when it is given up is as much at fault.
#[test]
fn what_goes_on_for_too_long_is_named() {
    let mut scene = Scene::new(Slow::Load, u32::MAX).on_event(|_| {});
    scene.takes = 8 * LIMIT;
    scene.source =
        scene.source.policy(Policy::KeepTrying).downtime_limit(4 * LIMIT).deadline(LIMIT);
    assert_names(scene, Term::Load, 2 * LIMIT);
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
    let stood = outcome.events.iter().find_map(|event| match event {
        Event::CalledOff { stood, .. } => Some(*stood),
        _ => None,
    });
    assert!(stood.expect("it was called off") < stall, "{stood:?}");
    let until_called_off: Vec<_> = outcome
        .there_events
        .iter()
        .take_while(|event| !matches!(event, Event::CalledOff { .. }))
        .collect();
    let loaded = until_called_off.iter().any(|event| matches!(event, Event::Loaded));
    assert!(!loaded, "{until_called_off:?}");
    let (_, _, stages) = outcome.expect_moved();
    assert_eq!(stages.first(), Some(&SwitchoverStage::DeviceState));
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
            let offer = Destination::new().negotiate(Box::new(there_link)).unwrap();
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
            .migrate(machine, memory.memory(), dirty, Box::new(here_link))
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

#[test]
fn channels_can_be_given_up_and_taken_back_in_the_middle_of_a_round() {
    let mut scene = Scene::new(Slow::Save, 0);
    scene.source = scene.source.channels(4);
    let handle = scene.source.handle();
    handle.use_channels(NonZeroU16::new(2).unwrap());
    handle.limit_bandwidth(NonZeroU64::new(16 << 20));
    let mut dealt = 0;
    let scene = scene.on_event(move |event| {
        if let Event::Rebalanced { .. } = event {
            dealt += 1;
            let channels = if dealt == 1 { 1 } else { 4 };
            handle.use_channels(NonZeroU16::new(channels).unwrap());
        }
    });
    let outcome = scene.play();
    let weights: Vec<_> = outcome
        .events
        .iter()
        .filter_map(|event| match event {
            Event::Rebalanced { weights } => Some(weights.clone()),
            _ => None,
        })
        .collect();
    assert_eq!(weights[..3], [vec![1, 1, 0, 0], vec![1, 0, 0, 0], vec![1, 1, 1, 1]]);
    outcome.expect_moved();
}

#[test]
fn post_copy_is_refused_before_anything_moves() {
    let mut scene = Scene::new(Slow::Save, 0);
    let refused = scene.source.handle().set_policy(Policy::PostCopy);
    assert!(matches!(refused, Err(Error::Unsupported("post-copy"))));
    scene.source = scene.source.policy(Policy::PostCopy);
    let (source_link, _destination_link) = memory_transport::pair();
    let mut machine = TestMachine::new(&scene.here, &scene.log, WORKING_SET, 1);
    machine.resume().unwrap();
    let sources = DirtySources::new(vec![]);
    let failure = scene
        .source
        .migrate(machine, scene.here.memory(), sources, Box::new(source_link))
        .map(drop)
        .expect_err("refused");
    assert!(matches!(failure.error, Error::Unsupported("post-copy")), "{}", failure.error);
    assert!(matches!(failure.guest, GuestAtSource::Running));
    assert!(failure.machine.is_running());
}
