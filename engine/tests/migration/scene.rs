//! Two sides and a guest that writes all the time, and what must hold of them when it is over.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use pageferry::dirty::DirtySources;
use pageferry::testing::{TestMemory, memory_transport};
use pageferry::transport::{Connector, DestinationLink, OneLink, Rendezvous, SourceLink};
use pageferry::{
    Arrived, Departed, Destination, DestinationFailure, Error, GuestAlarm, GuestAtDestination,
    GuestAtSource, PageChecks, Source, SourceFailure, Timeouts,
};

use crate::support::{Refuse, SharedLog, SoftwareLog, TestMachine};

pub(crate) const REGION_PAGES: [u64; 2] = [3000, 700];
pub(crate) const WORKING_SET: u64 = 500;

pub(crate) type SourceResult = Result<Departed<TestMachine>, Box<SourceFailure<TestMachine>>>;
pub(crate) type DestinationResult =
    Result<Result<Arrived<TestMachine>, Box<DestinationFailure<TestMachine>>>, Error>;

pub(crate) struct Scene {
    pub(crate) here: TestMemory,
    pub(crate) there: TestMemory,
    pub(crate) log: Arc<SoftwareLog>,
    /// Whether the guest is paused before it moves.
    pub(crate) paused: bool,
    pub(crate) source_refuses: Refuse,
    pub(crate) source_state_bytes: u64,
    pub(crate) destination_refuses: Refuse,
    pub(crate) source: Source,
    /// What the machine at the source is given.
    pub(crate) alarm: Arc<Mutex<Option<GuestAlarm>>>,
    pub(crate) destination: Destination,
}

pub(crate) struct Outcome {
    pub(crate) source: SourceResult,
    pub(crate) destination: DestinationResult,
    pub(crate) here: TestMemory,
    pub(crate) there: TestMemory,
    pub(crate) log: Arc<SoftwareLog>,
}

pub(crate) fn timeouts() -> Timeouts {
    Timeouts { stall: Duration::from_secs(5), ..Timeouts::default() }
}

impl Scene {
    pub(crate) fn new() -> Self {
        let here = TestMemory::new(&REGION_PAGES);
        // Part of memory holds data, part is zero.
        (0..2000).for_each(|page| here.fill_page(0, page, 1));
        (100..200).for_each(|page| here.fill_page(1, page, 1));
        let log = SoftwareLog::new(&here);
        Self {
            there: TestMemory::new(&REGION_PAGES),
            log,
            here,
            paused: false,
            source_refuses: Refuse::Nothing,
            source_state_bytes: 8,
            destination_refuses: Refuse::Nothing,
            source: Source::new()
                .verify(true)
                .page_checks(PageChecks::On)
                .channels(3)
                .downtime_limit(Duration::from_secs(2))
                .timeouts(timeouts()),
            alarm: Arc::default(),
            destination: Destination::new().timeouts(timeouts()),
        }
    }

    pub(crate) fn play(
        self,
        wrap: impl FnOnce(Box<dyn SourceLink>) -> Box<dyn SourceLink>,
    ) -> Outcome {
        let (source_link, destination_link) = memory_transport::pair();
        self.play_over(wrap(Box::new(source_link)), Box::new(destination_link))
    }

    pub(crate) fn play_over(
        self,
        source_link: Box<dyn SourceLink>,
        destination_link: Box<dyn DestinationLink>,
    ) -> Outcome {
        self.play_by(OneLink::source(source_link), OneLink::destination(destination_link))
    }

    /// Over as many links as it takes.
    pub(crate) fn play_by(
        self,
        connector: Box<dyn Connector>,
        rendezvous: Box<dyn Rendezvous>,
    ) -> Outcome {
        let Self {
            here,
            there,
            log,
            paused,
            source_refuses,
            source_state_bytes,
            destination_refuses,
            source,
            alarm,
            destination,
        } = self;
        let their_log = SoftwareLog::new(&there);
        let mut machine = TestMachine::new(&here, &log, WORKING_SET, 42);
        pageferry::Machine::resume(&mut machine).unwrap();
        machine.await_writes();
        if paused {
            pageferry::Machine::pause(&mut machine).unwrap();
            machine.paused = true;
        }
        machine.refuse = source_refuses;
        machine.state_bytes = source_state_bytes;
        machine.alarm = alarm;
        let mut theirs = TestMachine::new(&there, &their_log, WORKING_SET, 43);
        theirs.refuse = destination_refuses;
        theirs.contend_with(&machine);
        // A test that listens to spans hears both.
        let listener = tracing::dispatcher::get_default(Clone::clone);
        let receive = || {
            let offer = destination.negotiate(rendezvous)?;
            Ok(offer.receive(theirs, there.memory()))
        };
        let (source, destination) = thread::scope(|scope| {
            let receiving = scope.spawn(|| tracing::dispatcher::with_default(&listener, receive));
            let dirty = DirtySources::new(vec![Box::new(SharedLog(Arc::clone(&log)))]);
            let source = source.migrate(machine, here.memory(), dirty, connector);
            (source, receiving.join().expect("the destination does not panic"))
        });
        Outcome { source, destination, here, there, log }
    }
}

impl Outcome {
    /// The guest left, and memory was equal at the handover (by digest, so that the guest could
    /// run on at once).
    pub(crate) fn expect_moved(self) -> (Departed<TestMachine>, Arrived<TestMachine>) {
        let (here, there) = (self.here.clone(), self.there.clone());
        let moved = self.expect_moved_without_reading();
        // Pages the guest does not write are equal still.
        for (region, pages) in [(0, WORKING_SET..REGION_PAGES[0]), (1, 0..REGION_PAGES[1])] {
            for page in pages {
                assert!(here.read(region, page) == there.read(region, page));
            }
        }
        moved
    }

    pub(crate) fn expect_moved_without_reading(
        self,
    ) -> (Departed<TestMachine>, Arrived<TestMachine>) {
        let departed = self.source.expect("the source hands over");
        let arrived = self.destination.expect("the greeting fits").expect("the guest arrives");
        assert!(arrived.verified);
        assert_eq!(departed.statistics.damaged_pages, 0, "nothing was damaged");
        assert!(arrived.machine.is_running() && !departed.machine.is_running());
        arrived.machine.await_writes();
        assert_eq!(arrived.machine.loaded, Some(departed.machine.writes()));
        assert!(arrived.machine.holds_lock() && !departed.machine.holds_lock());
        (departed, arrived)
    }

    /// The guest stayed, runs, and everything was cleaned up.
    pub(crate) fn expect_kept(self) -> (Error, Option<Error>) {
        let failure = self.source.expect_err("the source keeps its guest");
        assert!(matches!(failure.guest, GuestAtSource::Running), "{failure:?}");
        assert!(failure.machine.is_running() && failure.machine.holds_lock());
        failure.machine.await_writes();
        assert!(!self.log.tracking.load(std::sync::atomic::Ordering::SeqCst));
        // All threads are gone, so nobody holds memory but this test and the guest.
        assert_eq!(Arc::strong_count(self.here.memory()), 2);
        let destination = match self.destination {
            Ok(Ok(_)) => panic!("a second guest runs at the destination"),
            Ok(Err(failure)) => {
                assert_ne!(failure.guest, GuestAtDestination::Uncertain, "{failure:?}");
                assert!(!failure.machine.is_running());
                Some(failure.error)
            }
            Err(error) => Some(error),
        };
        (failure.error, destination)
    }
}
