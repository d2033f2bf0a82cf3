//! Two sides, a machine that takes its time, and what must hold of them when it is over.

use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use pageferry::dirty::DirtySources;
use pageferry::memory::{PAGE_BYTES, PageRange};
use pageferry::testing::faulty::{Faults, FaultySource};
use pageferry::testing::{TestMemory, memory_transport};
use pageferry::transport::OneLink;
use pageferry::{
    Arrived, Departed, Destination, DestinationFailure, Error, Event, GuestAtSource, Machine,
    MachineError, Rehearsal, Source, SourceFailure, SwitchoverStage,
};

use crate::support::{SharedLog, SoftwareLog, TestMachine};

pub(crate) const PAGES: u64 = 2000;

pub(crate) const WORKING_SET: u64 = 200;

/// Long enough for a busy machine to meet, short enough to wait for.
pub(crate) const LIMIT: Duration = Duration::from_millis(400);

/// What nothing takes that goes on.
pub(crate) const HANG: Duration = Duration::from_secs(20);

/// When a machine takes its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slow {
    Save,
    Load,
    Release,
    /// For so long.
    ReleaseFor(Duration),
}

/// A machine that takes too long for something so many times, and notes by how much it was slowed
/// down.
pub(crate) struct SlowMachine {
    pub(crate) inner: TestMachine,
    pub(crate) memory: TestMemory,
    /// Each load writes a page of its own, that is zero otherwise. What the last one wrote is part of the guest: it
    /// has gone again before that is compared.
    pub(crate) loads: u64,
    pub(crate) slow: Slow,
    pub(crate) times: u32,
    pub(crate) takes: Duration,
    /// Instead of that: as long as the source's guest stands still, by what is heard of it.
    pub(crate) stands_still: Option<Receiver<bool>>,
    /// Bytes of device state beyond what it is about.
    pub(crate) padding: usize,
    pub(crate) throttled: Arc<Mutex<Vec<u8>>>,
    pub(crate) can_throttle: bool,
    pub(crate) rehearsals: u32,
}

impl std::fmt::Debug for SlowMachine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SlowMachine").field("slow", &self.slow).finish_non_exhaustive()
    }
}

impl SlowMachine {
    fn written(&self) -> u64 {
        PAGES / 4 * 3 + self.loads
    }

    pub(crate) fn take_time(&mut self, at: Slow) {
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
        if self.loads > 0 {
            let zeroes = vec![0; usize::try_from(PAGE_BYTES).unwrap()];
            self.memory.write(0, self.written(), &zeroes);
        }
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
        self.loads += 1;
        self.memory.fill_page(0, self.written(), 9);
        self.inner.load(state)
    }
    fn written_by_load(&mut self) -> Result<Vec<PageRange>, MachineError> {
        Ok(vec![PageRange { region: 0, first_page: self.written(), pages: 1 }])
    }
    fn unload(&mut self) -> Result<(), MachineError> {
        self.inner.unload()
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
    fn throttle(&mut self, percent: u8) -> bool {
        self.throttled.lock().unwrap().push(percent);
        self.can_throttle
    }
}

/// What was heard on one side.
pub(crate) type Events = Arc<Mutex<Vec<Event>>>;

pub(crate) struct Scene {
    pub(crate) here: TestMemory,
    pub(crate) log: Arc<SoftwareLog>,
    pub(crate) slow: (Slow, u32),
    /// How long each time.
    pub(crate) takes: Duration,
    /// For the destination's machine.
    pub(crate) stands_still: Option<Receiver<bool>>,
    pub(crate) padding: usize,
    pub(crate) faults: Faults,
    pub(crate) source: Source,
    pub(crate) destination: Destination,
    pub(crate) events: Events,
    pub(crate) there_events: Events,
    pub(crate) throttled: Arc<Mutex<Vec<u8>>>,
    pub(crate) can_throttle: bool,
}

pub(crate) struct Outcome {
    pub(crate) source: Result<Departed<SlowMachine>, Box<SourceFailure<SlowMachine>>>,
    pub(crate) destination: Result<Arrived<SlowMachine>, Box<DestinationFailure<SlowMachine>>>,
    pub(crate) log: Arc<SoftwareLog>,
    pub(crate) events: Vec<Event>,
    pub(crate) there_events: Vec<Event>,
    pub(crate) throttled: Vec<u8>,
}

impl Scene {
    pub(crate) fn new(slow: Slow, times: u32) -> Self {
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
            can_throttle: true,
        }
    }

    /// Has `hear` called with each event at the source, besides keeping it.
    pub(crate) fn on_event(mut self, mut hear: impl FnMut(&Event) + Send + 'static) -> Self {
        let events = Arc::clone(&self.events);
        self.source = self.source.on_event(move |event| {
            events.lock().unwrap().push(event.clone());
            hear(event);
        });
        self
    }

    pub(crate) fn play(self) -> Outcome {
        let there = TestMemory::new(&[PAGES]);
        let (source_link, destination_link) = memory_transport::pair();
        let machine = |memory: &TestMemory, log: &Arc<SoftwareLog>, seed| SlowMachine {
            inner: TestMachine::new(memory, log, WORKING_SET, seed),
            memory: memory.clone(),
            loads: 0,
            slow: self.slow.0,
            times: self.slow.1,
            takes: self.takes,
            stands_still: None,
            padding: self.padding,
            throttled: Arc::clone(&self.throttled),
            can_throttle: self.can_throttle,
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
                let offer = destination
                    .negotiate(OneLink::destination(Box::new(destination_link)))
                    .unwrap();
                offer.receive(theirs, there.memory())
            });
            let dirty = DirtySources::new(vec![Box::new(SharedLog(Arc::clone(&self.log)))]);
            let link = FaultySource::new(Box::new(source_link), self.faults, 1);
            let source = self.source.migrate(
                mine,
                self.here.memory(),
                dirty,
                OneLink::source(Box::new(link)),
            );
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

pub(crate) fn called_off(events: &[Event]) -> Vec<Option<SwitchoverStage>> {
    let stage = |event: &Event| match event {
        Event::CalledOff { stage, .. } => Some(*stage),
        _ => None,
    };
    events.iter().filter_map(stage).collect()
}

impl Outcome {
    /// The guest left in the end. By how it was called off before, as the source saw it.
    pub(crate) fn expect_moved(
        self,
    ) -> (Departed<SlowMachine>, Arrived<SlowMachine>, Vec<SwitchoverStage>) {
        let departed = self.source.expect("the source hands over");
        let arrived = self.destination.expect("the guest arrives");
        assert!(arrived.machine.inner.is_running() && !departed.machine.inner.is_running());
        assert!(arrived.machine.inner.holds_lock() && !departed.machine.inner.holds_lock());
        // What was loaded last is what the guest was when it left.
        assert_eq!(arrived.machine.inner.loaded, Some(departed.machine.inner.writes()));
        arrived.machine.inner.await_writes();
        // What no guest writes any more is what it was.
        let (from, to) = (&departed.machine.memory, &arrived.machine.memory);
        for page in WORKING_SET..PAGES - 1 {
            assert!(from.read(0, page) == to.read(0, page), "page {page} differs");
        }
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
    pub(crate) fn expect_kept(self) -> Error {
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
