//! The suite every transport passes.
//!
//! A transport gives a function that makes a fresh pair of connected links, and runs the suite
//! with one macro, which makes a test of each case:
//!
//! ```
//! use pageferry::testing::{conformance::Pair, memory_transport};
//!
//! fn pair() -> Pair {
//!     let (source, destination) = memory_transport::pair();
//!     (Box::new(source), Box::new(destination))
//! }
//!
//! pageferry::conformance_suite!(pair);
//! # fn main() { pageferry::testing::conformance::run_all(&pair) }
//! ```
//!
//! or with one call: [`run_all`]. [`Case::try_run`] gives the failure as a value.
//!
//! A case runs in threads of its own, and every call it makes of the transport has a name while it
//! is under way. When one thread fails, both ends are interrupted, so that the others end. What
//! should take no time has [`PROMPT`] for it; a call that nobody expected to hang is ended by the
//! watchdog after a minute, which says which calls those were. A thread that no interrupt wakes is
//! left behind.

pub mod acceptors;

mod cancelling;
mod control;
mod ends;
mod fixture;
mod interrupts;
mod pages;
mod reads;
mod registration;
mod watch;
mod watched;
mod watermarks;
mod zeroes;

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded, unbounded};

use crate::transport::{DestinationLink, SourceLink};

use watch::Watch;
pub use watch::What;

/// Both ends of a link.
pub type Pair = (Box<dyn SourceLink>, Box<dyn DestinationLink>);

/// Makes a fresh pair.
pub type MakePair<'a> = dyn Fn() -> Pair + Sync + 'a;

/// A bound on everything that should take no time.
pub const PROMPT: Duration = Duration::from_secs(10);

/// What a function that makes pairs may take, after which the process is aborted with a message:
/// nothing can be interrupted that is not there yet.
const PAIR_LIMIT: Duration = Duration::from_secs(60);
/// How often it is looked whether a case has failed or hangs.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// What threads of a case that failed may take to end, after they were interrupted.
const GRACE: Duration = Duration::from_secs(2);

/// One thing that every transport does.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Its name, a sentence.
    pub name: &'static str,
    body: fn(&Trial),
}

/// A transport does not pass a case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The case.
    pub case: &'static str,
    /// What is wrong.
    pub what: What,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.what {
            What::Wrong(what) => write!(f, "{}: {what}", self.case),
            What::Hung(what) => write!(f, "{}: did not end: {what}", self.case),
        }
    }
}

impl std::error::Error for Failure {}

impl Case {
    /// Runs the case.
    ///
    /// # Panics
    ///
    /// If the transport fails it.
    pub fn run(&self, make_pair: &MakePair<'_>) {
        if let Err(failure) = self.try_run(make_pair) {
            panic!("{failure}");
        }
    }

    /// Runs the case, and returns how the transport failed it. Threads of it that hang are left
    /// behind, and end when the transport lets them.
    pub fn try_run(&self, make_pair: &MakePair<'_>) -> Result<(), Failure> {
        let case = *self;
        let watch = Arc::new(Watch::default());
        let (pairs, wanted) = unbounded();
        let trial = Trial { case: case.name, watch: Arc::clone(&watch), pairs };
        thread::spawn(move || {
            let watch = Arc::clone(&trial.watch);
            // What went wrong is kept.
            let _ = watch.keep(|| (case.body)(&trial));
        });
        let mut failed_at = None;
        loop {
            match wanted.recv_timeout(LOOK_EVERY) {
                // A case that failed needs no more.
                Ok(_) if failed_at.is_some() => {}
                Ok(reply) => drop(reply.send(make_pair())),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => watch.look(),
            }
            if watch.failure().is_some()
                && failed_at.get_or_insert_with(Instant::now).elapsed() > GRACE
            {
                break;
            }
        }
        watch.failure().map_or(Ok(()), |what| Err(Failure { case: case.name, what }))
    }
}

/// What a case works with.
struct Trial {
    case: &'static str,
    watch: Arc<Watch>,
    pairs: Sender<Sender<Pair>>,
}

impl Trial {
    /// A fresh pair, made by the thread that called for the case.
    fn pair(&self) -> Pair {
        let (reply, pair) = bounded(1);
        self.pairs.send(reply).expect("pairs are made until the case ends");
        match pair.recv_timeout(PAIR_LIMIT) {
            Ok(pair) => watched::watched(pair, &self.watch),
            Err(RecvTimeoutError::Disconnected) => panic!("no pair was made"),
            Err(RecvTimeoutError::Timeout) => {
                eprintln!("{}: no pair of links was made within {PAIR_LIMIT:?}", self.case);
                std::process::abort();
            }
        }
    }
}

/// Runs a case by its name.
///
/// # Panics
///
/// If the transport fails it, or there is no such case.
pub fn run(name: &str, make_pair: &MakePair<'_>) {
    let case = CASES.iter().find(|case| case.name == name);
    case.unwrap_or_else(|| panic!("there is no case {name}")).run(make_pair);
}

/// Runs all cases one after another.
///
/// # Panics
///
/// At the first case the transport fails; its name was printed before.
pub fn run_all(make_pair: &MakePair<'_>) {
    for case in CASES {
        eprintln!("conformance: {}", case.name);
        case.run(make_pair);
    }
}

macro_rules! cases {
    ($($subject:ident: $($case:ident)*;)*) => {
        /// All cases.
        pub const CASES: &[Case] =
            &[$($(Case { name: stringify!($case), body: $subject::$case },)*)*];

        /// Makes a `#[test]` of each case for a function that makes a
        /// [`Pair`](crate::testing::conformance::Pair).
        #[macro_export]
        macro_rules! conformance_suite {
            ($make_pair:expr) => {
                mod conformance {
                    #[allow(unused_imports)]
                    use super::*;

                    $($(
                        #[test]
                        fn $case() {
                            $crate::testing::conformance::run(stringify!($case), &$make_pair);
                        }
                    )*)*
                }
            };
        }
    };
}

cases! {
    control:
        frames_go_both_ways_whole_and_in_order
        a_waiting_control_receiver_times_out
        timeouts_lose_no_byte
        frames_beyond_the_limit_are_refused
        a_frame_that_nobody_takes_times_out
        frames_pass_while_pages_flow;
    registration:
        capabilities_make_sense
        stages_cannot_be_skipped
        stages_cannot_be_taken_twice
        a_destination_waits_for_channels_in_time
        memory_is_let_go;
    pages:
        pages_land_in_place
        channels_work_side_by_side
        channels_are_the_same_at_both_ends
        the_newest_bytes_win
        batches_land_in_order
        batches_as_large_as_can_be_land
        zero_runs_zero_pages
        long_zero_runs_zero_pages
        batches_beyond_the_limits_are_refused
        runs_outside_guest_memory_are_refused
        counters_count;
    watermarks:
        tickets_count_from_one
        landed_means_landed
        landings_are_told_before_the_source_knows
        released_means_released
        watermarks_only_grow
        a_look_does_not_wait
        a_wait_is_as_long_as_asked
        a_wait_ends_when_batches_land;
    interrupts:
        an_interrupt_wakes_every_sender
        an_interrupt_wakes_every_receiver
        an_interrupt_wakes_the_control_channel
        an_interrupt_wakes_who_opens_channels
        an_interrupt_ends_what_comes_later
        an_interrupted_channel_ends_alone;
    zeroes:
        an_interrupt_ends_a_batch_of_zeroes;
    ends:
        an_orderly_end_is_seen
        a_lost_source_is_noticed
        a_lost_destination_is_noticed
        a_dropped_channel_is_lost_alone
        what_was_said_before_a_link_broke_is_heard;
    reads:
        pages_are_read_into_place
        requests_land_in_order
        a_lane_waits_for_no_other
        pages_land_in_the_memory_that_was_given
        requests_beyond_the_limits_are_refused
        a_lane_ends_alone
        an_interrupt_ends_all_lanes;
    cancelling:
        cancelling_ends_a_migration_whose_device_state_nobody_takes;
}
