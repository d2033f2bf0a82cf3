//! Settings over their whole range, at the start and at run time: whatever a host asks for, the
//! migration ends, and the guest is in one place.

#[path = "../support/mod.rs"]
mod support;

use std::num::{NonZeroU16, NonZeroU64};
use std::thread;
use std::time::Duration;

use crossbeam_channel::bounded;
use pageferry::convergence::{Bound, Policy, Throttling};
use pageferry::dirty::DirtySources;
use pageferry::protocol::MAX_DESCRIPTION_BYTES;
use pageferry::testing::{TestMemory, memory_transport};
use pageferry::{
    Destination, Error, Event, GuestAtDestination, GuestAtSource, Machine, MigrationHandle, Source,
    Timeouts,
};
use proptest::collection::vec;
use proptest::prelude::*;
use support::{SharedLog, SoftwareLog, TestMachine};

const PAGES: u64 = 600;
const WORKING_SET: u64 = 20;

/// What would go on for ever by these settings is cancelled after so long.
const PATIENCE: Duration = Duration::from_millis(200);

/// What a host may change while it runs.
#[derive(Debug, Clone)]
enum Change {
    DowntimeLimit(Duration),
    Bound(Bound),
    Policy(Policy),
    Deadline(Option<Duration>),
    Bandwidth(Option<NonZeroU64>),
    Channels(NonZeroU16),
}

impl Change {
    fn apply(&self, handle: &MigrationHandle) {
        match self {
            Self::DowntimeLimit(limit) => handle.set_downtime_limit(*limit),
            Self::Bound(bound) => handle.set_bound(*bound),
            // What makes no sense is refused, and changes nothing.
            Self::Policy(policy) => drop(handle.set_policy(*policy)),
            Self::Deadline(deadline) => handle.set_deadline(*deadline),
            Self::Bandwidth(limit) => handle.limit_bandwidth(*limit),
            Self::Channels(channels) => handle.use_channels(*channels),
        }
    }
}

#[derive(Debug, Clone)]
struct Setup {
    channels: u16,
    batch_bytes: u64,
    most_channels: u16,
    populate: u16,
    max_rounds: u32,
    description_bytes: usize,
    verify: bool,
    timeouts: [Timeouts; 2],
    /// Before it begins.
    first: Vec<Change>,
    /// One after each event.
    later: Vec<Change>,
}

fn duration() -> impl Strategy<Value = Duration> {
    prop_oneof![
        4 => (0_u64..1 << 40).prop_map(Duration::from_nanos),
        2 => any::<u64>().prop_map(Duration::from_secs),
        2 => Just(Duration::MAX),
        1 => Just(Duration::ZERO),
        1 => Just(Duration::from_nanos(1)),
        1 => any::<Duration>(),
    ]
}

/// Mostly what lets a migration come to its end.
fn timeouts() -> impl Strategy<Value = Timeouts> {
    let one = || prop_oneof![8 => (1_u64..100).prop_map(Duration::from_secs), 3 => duration()];
    (one(), one(), one(), one(), one(), one(), one()).prop_map(
        |(handshake, registration_per_gib, stall, load, release, rejoin, commit)| Timeouts {
            registration_per_gib,
            handshake,
            stall,
            load,
            release,
            rejoin,
            commit,
        },
    )
}

fn policy() -> impl Strategy<Value = Policy> {
    prop_oneof![
        Just(Policy::KeepTrying),
        Just(Policy::GiveUp),
        Just(Policy::PostCopy),
        any::<(u8, u8, u8)>().prop_map(|(first_percent, step_percent, max_percent)| {
            Policy::Throttle(Throttling { first_percent, step_percent, max_percent })
        }),
    ]
}

fn bandwidth() -> impl Strategy<Value = Option<NonZeroU64>> {
    prop_oneof![
        Just(None),
        any::<u64>().prop_map(NonZeroU64::new),
        (0_u64..300).prop_map(NonZeroU64::new),
        Just(NonZeroU64::new(u64::MAX)),
    ]
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => duration().prop_map(Change::DowntimeLimit),
        1 => prop_oneof![Just(Bound::Strict), Just(Bound::BestEffort)].prop_map(Change::Bound),
        1 => policy().prop_map(Change::Policy),
        1 => proptest::option::of(duration()).prop_map(Change::Deadline),
        1 => bandwidth().prop_map(Change::Bandwidth),
        1 => any::<NonZeroU16>().prop_map(Change::Channels),
    ]
}

fn setup() -> impl Strategy<Value = Setup> {
    let channels = || prop_oneof![8 => 1_u16..5, 1 => any::<u16>()];
    let numbers = (
        channels(),
        prop_oneof![0_u64..100_000, any::<u64>()],
        prop_oneof![4 => 5_u16..300, 1 => any::<u16>()],
        prop_oneof![8 => 0_u16..3, 1 => any::<u16>()],
        prop_oneof![0_u32..4, any::<u32>()],
        prop_oneof![8 => 0_usize..100, 1 => MAX_DESCRIPTION_BYTES - 1..MAX_DESCRIPTION_BYTES + 2],
    );
    let changes = (vec(change(), 0..4), vec(change(), 0..10));
    (numbers, any::<bool>(), [timeouts(), timeouts()], changes).prop_map(
        |(numbers, verify, timeouts, (first, later))| {
            let (channels, batch_bytes, most_channels, populate, max_rounds, description_bytes) =
                numbers;
            Setup {
                channels,
                batch_bytes,
                most_channels,
                populate,
                max_rounds,
                description_bytes,
                verify,
                timeouts,
                first,
                later,
            }
        },
    )
}

fn check(setup: Setup) -> Result<(), TestCaseError> {
    let (here, there) = (TestMemory::new(&[PAGES]), TestMemory::new(&[PAGES]));
    (0..PAGES / 2).for_each(|page| here.fill_page(0, page, 1));
    let (dialler, rendezvous) = memory_transport::meeting();
    let log = SoftwareLog::new(&here);
    let mut mine = TestMachine::new(&here, &log, WORKING_SET, 42);
    mine.resume().unwrap();
    mine.await_writes();
    let mut theirs = TestMachine::new(&there, &SoftwareLog::new(&there), WORKING_SET, 43);
    theirs.contend_with(&mine);
    let [source_timeouts, destination_timeouts] = setup.timeouts;
    let source = Source::new()
        .channels(setup.channels)
        .batch_bytes(setup.batch_bytes)
        .max_rounds(setup.max_rounds)
        .description(vec![7; setup.description_bytes])
        .verify(setup.verify)
        .timeouts(source_timeouts);
    let destination = Destination::new()
        .most_channels(setup.most_channels)
        .populate_ahead(setup.populate)
        .timeouts(destination_timeouts);
    let handle = source.handle();
    setup.first.iter().for_each(|change| change.apply(&handle));
    let (changing, mut later) = (handle.clone(), setup.later.into_iter());
    let source = source.on_event(move |_: &Event| {
        if let Some(change) = later.next() {
            change.apply(&changing);
        }
    });
    let (over, ended) = bounded::<()>(0);
    let (source, destination) = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let offer = destination.negotiate(Box::new(rendezvous))?;
            Ok::<_, Error>(offer.receive(theirs, there.memory()))
        });
        scope.spawn(move || {
            if ended.recv_timeout(PATIENCE).is_err_and(|error| error.is_timeout()) {
                handle.cancel();
            }
        });
        let dirty = DirtySources::new(vec![Box::new(SharedLog(log))]);
        let left = source.migrate(mine, here.memory(), dirty, Box::new(dialler));
        drop(over);
        (left, receiving.join().expect("the destination does not panic"))
    });
    let (stays, knows) = match &source {
        Ok(departed) => (departed.machine.is_running(), true),
        Err(failure) => {
            prop_assert!(!matches!(failure.error, Error::Panicked { .. }), "{failure:?}");
            let runs = matches!(failure.guest, GuestAtSource::Running);
            prop_assert_eq!(failure.machine.is_running(), runs);
            (runs, !matches!(failure.guest, GuestAtSource::Uncertain))
        }
    };
    let arrives = match &destination {
        Ok(Ok(arrived)) => arrived.machine.is_running(),
        Ok(Err(failure)) => {
            prop_assert!(!matches!(failure.error, Error::Panicked { .. }), "{failure:?}");
            prop_assert!(failure.guest != GuestAtDestination::GivenBack, "{failure:?}");
            failure.machine.is_running()
        }
        Err(error) => {
            prop_assert!(!matches!(error, Error::Panicked { .. }), "{error:?}");
            false
        }
    };
    prop_assert!(!(stays && arrives), "two guests");
    prop_assert!(stays || arrives || !knows, "no guest, and nobody says so");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_migration_by_any_settings_ends_with_the_guest_in_one_place(setup in setup()) {
        check(setup)?;
    }
}

/// The longest of all limits, which no clock can add to.
#[test]
fn limits_without_an_end_are_kept() {
    let longest = Duration::MAX;
    let forever = Timeouts {
        handshake: longest,
        registration_per_gib: longest,
        stall: longest,
        load: longest,
        release: longest,
        rejoin: longest,
        commit: longest,
    };
    for (bound, verify) in
        [(Bound::Strict, false), (Bound::BestEffort, false), (Bound::Strict, true)]
    {
        check(Setup {
            channels: 2,
            batch_bytes: u64::MAX,
            most_channels: u16::MAX,
            populate: 1,
            max_rounds: u32::MAX,
            description_bytes: 0,
            verify,
            timeouts: [forever; 2],
            first: vec![
                Change::DowntimeLimit(longest),
                Change::Bound(bound),
                Change::Deadline(Some(longest)),
            ],
            later: vec![Change::DowntimeLimit(longest)],
        })
        .unwrap();
    }
}
