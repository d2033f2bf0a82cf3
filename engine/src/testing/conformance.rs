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
//! or with one call: [`run_all`].

mod reads;
mod waits;
mod zeroes;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::{Random, TestMemory};
use crate::memory::{PAGE_BYTES, PageRange};
use crate::transport::{
    ControlChannel, DestinationLink, MAX_BATCH_ZERO_PAGES, MAX_FRAME_BYTES, PageCounts,
    PageReceiver, PageSender, Received, Run, RunKind, SourceLink, TransportError,
};

pub use reads::pages_are_read_where_that_is_possible;
pub use waits::{
    a_control_send_that_nobody_reads_times_out, an_interrupt_of_one_channel_leaves_the_others,
    an_interrupt_wakes_a_control_send,
};
pub use zeroes::an_interrupt_ends_a_batch_of_zeroes;

/// Both ends of a link.
pub type Pair = (Box<dyn SourceLink>, Box<dyn DestinationLink>);

/// Makes a fresh pair.
pub type MakePair<'a> = dyn Fn() -> Pair + Sync + 'a;

/// A case: panics if the transport fails it.
pub type Case = fn(&MakePair<'_>);

/// All cases, by name.
pub const CASES: &[(&str, Case)] = &[
    ("frames_go_both_ways_whole_and_in_order", frames_go_both_ways_whole_and_in_order),
    ("a_waiting_control_receiver_times_out", a_waiting_control_receiver_times_out),
    ("a_control_send_that_nobody_reads_times_out", a_control_send_that_nobody_reads_times_out),
    ("frames_beyond_the_limit_are_refused", frames_beyond_the_limit_are_refused),
    ("stages_cannot_be_skipped", stages_cannot_be_skipped),
    ("pages_land_in_place", pages_land_in_place),
    ("channels_work_side_by_side", channels_work_side_by_side),
    ("the_newest_bytes_win", the_newest_bytes_win),
    ("zero_runs_zero_pages", zero_runs_zero_pages),
    ("landed_means_landed", landed_means_landed),
    ("batches_beyond_the_limits_are_refused", batches_beyond_the_limits_are_refused),
    ("runs_outside_guest_memory_are_refused", runs_outside_guest_memory_are_refused),
    ("frames_pass_while_pages_flow", frames_pass_while_pages_flow),
    ("an_orderly_end_is_seen", an_orderly_end_is_seen),
    ("a_lost_source_is_noticed", a_lost_source_is_noticed),
    ("a_lost_destination_is_noticed", a_lost_destination_is_noticed),
    ("an_interrupt_wakes_everyone", an_interrupt_wakes_everyone),
    ("an_interrupt_ends_a_batch_of_zeroes", an_interrupt_ends_a_batch_of_zeroes),
    ("an_interrupt_wakes_a_control_send", an_interrupt_wakes_a_control_send),
    (
        "an_interrupt_of_one_channel_leaves_the_others",
        an_interrupt_of_one_channel_leaves_the_others,
    ),
    ("pages_are_read_where_that_is_possible", pages_are_read_where_that_is_possible),
    ("memory_is_let_go", memory_is_let_go),
];

/// Makes a `#[test]` of each case for a function that makes a [`Pair`].
#[macro_export]
macro_rules! conformance_suite {
    ($make_pair:expr) => {
        $crate::conformance_suite!(@cases $make_pair;
            frames_go_both_ways_whole_and_in_order
            a_waiting_control_receiver_times_out
            a_control_send_that_nobody_reads_times_out
            frames_beyond_the_limit_are_refused
            stages_cannot_be_skipped
            pages_land_in_place
            channels_work_side_by_side
            the_newest_bytes_win
            zero_runs_zero_pages
            landed_means_landed
            batches_beyond_the_limits_are_refused
            runs_outside_guest_memory_are_refused
            frames_pass_while_pages_flow
            an_orderly_end_is_seen
            a_lost_source_is_noticed
            a_lost_destination_is_noticed
            an_interrupt_wakes_everyone
            an_interrupt_ends_a_batch_of_zeroes
            an_interrupt_wakes_a_control_send
            an_interrupt_of_one_channel_leaves_the_others
            pages_are_read_where_that_is_possible
            memory_is_let_go
        );
    };
    (@cases $make_pair:expr; $($case:ident)*) => {
        mod conformance {
            #[allow(unused_imports)]
            use super::*;

            $(
                #[test]
                fn $case() {
                    $crate::testing::conformance::$case(&$make_pair);
                }
            )*

            /// The macro names every case there is.
            #[test]
            fn no_case_is_missing() {
                let named = [$(stringify!($case)),*];
                let all = $crate::testing::conformance::CASES.iter().map(|(name, _)| *name);
                assert!(all.eq(named), "the macro and the list of cases differ");
            }
        }
    };
}

/// Runs all cases one after another.
///
/// # Panics
///
/// At the first case the transport fails; its name was printed before.
pub fn run_all(make_pair: &MakePair<'_>) {
    for (name, case) in CASES {
        eprintln!("conformance: {name}");
        case(make_pair);
    }
}

/// A bound on everything that should take no time.
const SOON: Duration = Duration::from_secs(20);

/// Opened data channels with memory on both sides.
struct Opened {
    // Dropped in this order: channels before links, as the port says.
    senders: Vec<Box<dyn PageSender>>,
    receivers: Vec<Box<dyn PageReceiver>>,
    control: (ControlChannel, ControlChannel),
    source: Box<dyn SourceLink>,
    destination: Box<dyn DestinationLink>,
    here: TestMemory,
    there: TestMemory,
}

const REGION_PAGES: [u64; 3] = [700, 1, 1300];

fn open(make_pair: &MakePair<'_>, channels: u16) -> Opened {
    open_with(make_pair, channels, &REGION_PAGES)
}

fn open_with(make_pair: &MakePair<'_>, channels: u16, region_pages: &[u64]) -> Opened {
    let (mut source, mut destination) = make_pair();
    let here = TestMemory::new(region_pages);
    let there = TestMemory::new(region_pages);
    let control = (
        source.control().expect("the source's control channel"),
        destination.control().expect("the destination's control channel"),
    );
    source.register(here.memory()).expect("source memory registers");
    destination.register(there.memory()).expect("destination memory registers");
    let (senders, receivers) = thread::scope(|scope| {
        let accept = scope.spawn(|| destination.open_receivers(channels, SOON));
        let senders = source.open_senders(channels).expect("channels open");
        (senders, accept.join().expect("no panic").expect("channels are accepted"))
    });
    assert_eq!(senders.len(), usize::from(channels));
    assert_eq!(receivers.len(), usize::from(channels));
    Opened { senders, receivers, control, source, destination, here, there }
}

fn run(region: u16, first_page: u64, pages: u32, kind: RunKind) -> Run {
    Run { range: PageRange { region, first_page, pages }, kind }
}

fn data(region: u16, first_page: u64, pages: u32) -> Run {
    run(region, first_page, pages, RunKind::Data)
}

/// Receives until the channel ends.
fn drain(receiver: &mut Box<dyn PageReceiver>) -> PageCounts {
    let mut counts = PageCounts::default();
    while let Received::Batch(batch) = receiver.receive().expect("a batch or the end") {
        counts.add(&batch);
    }
    counts
}

fn settle(sender: &mut Box<dyn PageSender>, ticket: u64) {
    let began = Instant::now();
    let mut before = sender.watermarks(None).expect("watermarks");
    while before.landed < ticket {
        assert!(began.elapsed() < SOON, "batch {ticket} never landed: {before:?}");
        let marks = sender.watermarks(Some(Duration::from_millis(100))).expect("watermarks");
        assert!(marks.landed >= before.landed && marks.released >= before.released);
        assert!(marks.landed <= ticket && marks.released <= ticket);
        before = marks;
    }
    assert!(before.released >= ticket, "landed and not released: {before:?}");
}

/// Splits `pages` pages of a region into batches that a transport takes.
fn batches(capabilities_bytes: u64, region: u16, pages: u64) -> Vec<Vec<Run>> {
    let most = (capabilities_bytes / PAGE_BYTES).clamp(1, 256);
    (0..pages)
        .step_by(usize::try_from(most).expect("small"))
        .map(|first| {
            vec![data(region, first, u32::try_from(most.min(pages - first)).expect("small"))]
        })
        .collect()
}

/// Frames of all sizes arrive whole, in order, both ways at once.
pub fn frames_go_both_ways_whole_and_in_order(make_pair: &MakePair<'_>) {
    let (mut source, mut destination) = make_pair();
    let mut here = source.control().expect("the source's control channel");
    let mut there = destination.control().expect("the destination's control channel");
    let sizes = [1, 2, 100, 4096, 70_000, MAX_FRAME_BYTES, 1];
    let frame = |seed: u64, size: usize| -> Vec<u8> {
        let mut random = Random::new(seed);
        (0..size).map(|_| random.next_u64().to_le_bytes()[0]).collect()
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            for (seed, size) in (0..).zip(sizes) {
                here.sender.send(&frame(seed, size), SOON).expect("a frame goes out");
            }
        });
        scope.spawn(|| {
            for (seed, size) in (100..).zip(sizes) {
                there.sender.send(&frame(seed, size), SOON).expect("a frame goes out");
            }
        });
        scope.spawn(|| {
            for (seed, size) in (0..).zip(sizes) {
                let got = there.receiver.receive(Some(SOON)).expect("a frame comes in");
                assert!(got == frame(seed, size), "frame {seed} of {size} bytes differs");
            }
        });
        for (seed, size) in (100..).zip(sizes) {
            let got = here.receiver.receive(Some(SOON)).expect("a frame comes in");
            assert!(got == frame(seed, size), "frame {seed} of {size} bytes differs");
        }
    });
}

/// A receive gives up in time, and the next one works.
pub fn a_waiting_control_receiver_times_out(make_pair: &MakePair<'_>) {
    let (mut source, mut destination) = make_pair();
    let mut here = source.control().expect("the source's control channel");
    let mut there = destination.control().expect("the destination's control channel");
    let result = there.receiver.receive(Some(Duration::from_millis(20)));
    assert!(matches!(result, Err(TransportError::TimedOut { .. })), "{result:?}");
    here.sender.send(b"late", SOON).expect("a frame goes out");
    assert_eq!(there.receiver.receive(Some(SOON)).expect("a frame comes in"), b"late");
}

/// Empty and oversized frames are this side's own mistake.
pub fn frames_beyond_the_limit_are_refused(make_pair: &MakePair<'_>) {
    let (mut source, _destination) = make_pair();
    let mut control = source.control().expect("the source's control channel");
    assert!(control.sender.send(&[], SOON).is_err());
    let result = control.sender.send(&vec![0; MAX_FRAME_BYTES + 1], SOON);
    assert!(matches!(result, Err(TransportError::TooLarge { .. })), "{result:?}");
}

/// No channels before registration, no second control channel.
pub fn stages_cannot_be_skipped(make_pair: &MakePair<'_>) {
    let (mut source, mut destination) = make_pair();
    assert!(matches!(source.open_senders(1), Err(TransportError::OutOfOrder(_))));
    let result = destination.open_receivers(1, Duration::from_millis(10));
    assert!(matches!(result, Err(TransportError::OutOfOrder(_))));
    let _control = (source.control().expect("once"), destination.control().expect("once"));
    assert!(matches!(source.control(), Err(TransportError::OutOfOrder(_))));
    assert!(matches!(destination.control(), Err(TransportError::OutOfOrder(_))));
}

/// Every page of every region lands in its place, and nothing else is touched.
pub fn pages_land_in_place(make_pair: &MakePair<'_>) {
    let mut opened = open(make_pair, 1);
    opened.here.fill(1);
    let limit = opened.source.capabilities().max_batch_bytes;
    let (mut sender, mut receiver) = (opened.senders.remove(0), opened.receivers.remove(0));
    // Leave the last page of the last region out.
    let region_pages = [REGION_PAGES[0], REGION_PAGES[1], REGION_PAGES[2] - 1];
    let mut pages = 0;
    thread::scope(|scope| {
        let receiving = scope.spawn(|| drain(&mut receiver));
        let mut last = 0;
        for (region, count) in (0..).zip(region_pages) {
            for batch in batches(limit, region, count) {
                last = sender.send(&batch).expect("a batch goes out");
            }
            pages += count;
        }
        settle(&mut sender, last);
        sender.finish().expect("the channel ends");
        let counts = receiving.join().expect("the receiver does not panic");
        if !opened.source.capabilities().one_sided_write {
            assert_eq!(counts.data, pages);
        }
    });
    let left_out = (2, REGION_PAGES[2] - 1);
    assert_eq!(opened.here.first_difference(&opened.there), Some(left_out));
    assert!(opened.there.read(left_out.0, left_out.1).iter().all(|byte| *byte == 0));
    assert!(sender.counters().wire_bytes >= pages * PAGE_BYTES, "{:?}", sender.counters());
}

/// Many channels at once, each with pages of its own in scattered runs.
pub fn channels_work_side_by_side(make_pair: &MakePair<'_>) {
    for channels in [2_u16, 8] {
        let mut opened = open(make_pair, channels);
        opened.here.fill(u64::from(channels));
        let runs_at_once = opened.source.capabilities().max_batch_runs.min(50);
        let most = opened.source.capabilities().max_batch_bytes / PAGE_BYTES;
        let at_once = runs_at_once.min(usize::try_from(most).unwrap_or(usize::MAX)).max(1);
        thread::scope(|scope| {
            for receiver in &mut opened.receivers {
                scope.spawn(|| drain(receiver));
            }
            for (channel, sender) in (0..).zip(&mut opened.senders) {
                scope.spawn(move || {
                    let mut last = 0;
                    for (region, pages) in (0..).zip(REGION_PAGES) {
                        let mine: Vec<Run> = (0..pages)
                            .filter(|page| page % u64::from(channels) == channel)
                            .map(|page| data(region, page, 1))
                            .collect();
                        for batch in mine.chunks(at_once) {
                            last = sender.send(batch).expect("a batch goes out");
                        }
                    }
                    settle(sender, last);
                    sender.finish().expect("the channel ends");
                });
            }
        });
        assert_eq!(opened.here.first_difference(&opened.there), None, "{channels} channels");
    }
}

/// The same page many times over: what was sent last is what stays.
pub fn the_newest_bytes_win(make_pair: &MakePair<'_>) {
    let mut opened = open(make_pair, 1);
    let (mut sender, mut receiver) = (opened.senders.remove(0), opened.receivers.remove(0));
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut receiver));
        for version in 0..200 {
            opened.here.fill_page(2, 7, version);
            let ticket = sender.send(&[data(2, 7, 1)]).expect("a batch goes out");
            // The page may be written again once it is not read any more.
            let began = Instant::now();
            while sender.watermarks(None).expect("watermarks").released < ticket {
                assert!(began.elapsed() < SOON, "batch {ticket} was never released");
                sender.watermarks(Some(Duration::from_millis(10))).expect("watermarks");
            }
        }
        sender.finish().expect("the channel ends");
    });
    assert_eq!(opened.here.first_difference(&opened.there), None);
}

/// Zero runs make pages zero, in order with the data around them.
pub fn zero_runs_zero_pages(make_pair: &MakePair<'_>) {
    let mut opened = open(make_pair, 1);
    opened.here.fill(3);
    let (mut sender, mut receiver) = (opened.senders.remove(0), opened.receivers.remove(0));
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut receiver));
        sender.send(&[data(0, 0, 20)]).expect("a batch goes out");
        sender.send(&[run(0, 5, 10, RunKind::Zero)]).expect("a batch goes out");
        // Mixed, and data again over zero.
        let last = sender
            .send(&[data(0, 6, 1), run(0, 0, 2, RunKind::Zero), data(0, 9, 2)])
            .expect("a batch goes out");
        settle(&mut sender, last);
        sender.finish().expect("the channel ends");
    });
    for page in 0..20 {
        let zero = matches!(page, 0 | 1 | 5 | 7 | 8 | 11..=14);
        let expected = if zero { vec![0; 4096] } else { opened.here.read(0, page) };
        assert!(opened.there.read(0, page) == expected, "page {page}");
    }
}

/// When a batch has landed its bytes are in the destination's memory, without any further help.
pub fn landed_means_landed(make_pair: &MakePair<'_>) {
    let mut opened = open(make_pair, 1);
    let (mut sender, mut receiver) = (opened.senders.remove(0), opened.receivers.remove(0));
    thread::scope(|scope| {
        scope.spawn(|| drain(&mut receiver));
        for page in 0..50 {
            opened.here.fill_page(0, page, 9);
            let ticket = sender.send(&[data(0, page, 1)]).expect("a batch goes out");
            settle(&mut sender, ticket);
            assert!(opened.here.read(0, page) == opened.there.read(0, page), "page {page}");
        }
        sender.finish().expect("the channel ends");
    });
}

/// A batch over the transport's own limits is refused before anything is sent.
pub fn batches_beyond_the_limits_are_refused(make_pair: &MakePair<'_>) {
    let region_pages = MAX_BATCH_ZERO_PAGES + 1;
    let mut opened = open_with(make_pair, 1, &[region_pages]);
    let capabilities = opened.source.capabilities();
    let too_many = vec![data(0, 0, 1); capabilities.max_batch_runs + 1];
    let result = opened.senders[0].send(&too_many);
    assert!(matches!(result, Err(TransportError::TooLarge { .. })), "{result:?}");
    let pages = u32::try_from(region_pages).expect("small");
    let result = opened.senders[0].send(&[run(0, 0, pages, RunKind::Zero)]);
    assert!(matches!(result, Err(TransportError::TooLarge { .. })), "{result:?}");
    let pages = u32::try_from(capabilities.max_batch_bytes / PAGE_BYTES + 1).expect("small");
    if u64::from(pages) <= region_pages {
        let result = opened.senders[0].send(&[data(0, 0, pages)]);
        assert!(matches!(result, Err(TransportError::TooLarge { .. })), "{result:?}");
    }
}

/// Nothing outside guest memory is ever read.
pub fn runs_outside_guest_memory_are_refused(make_pair: &MakePair<'_>) {
    let mut opened = open(make_pair, 1);
    let outside = [data(0, REGION_PAGES[0], 1), data(3, 0, 1), data(1, 0, 2), data(0, u64::MAX, 1)];
    for run in outside {
        let result = opened.senders[0].send(&[run]);
        assert!(matches!(result, Err(TransportError::OutOfRange(_))), "{run:?}: {result:?}");
    }
    drop(opened.control);
    drop(opened.destination);
}

/// The control channel stays usable while data channels are full.
pub fn frames_pass_while_pages_flow(make_pair: &MakePair<'_>) {
    let mut opened = open(make_pair, 2);
    opened.here.fill(4);
    let limit = opened.source.capabilities().max_batch_bytes;
    let (mut here, mut there) = opened.control;
    thread::scope(|scope| {
        for receiver in &mut opened.receivers {
            scope.spawn(|| drain(receiver));
        }
        for (region, sender) in [0, 2].into_iter().zip(&mut opened.senders) {
            scope.spawn(move || {
                for _ in 0..10 {
                    for batch in batches(limit, region, REGION_PAGES[usize::from(region)]) {
                        sender.send(&batch).expect("a batch goes out");
                    }
                }
                sender.finish().expect("the channel ends");
            });
        }
        for number in 0..50_u8 {
            here.sender.send(&[number], SOON).expect("a frame goes out");
            assert_eq!(there.receiver.receive(Some(SOON)).expect("a frame comes in"), [number]);
            there.sender.send(&[number, 1], SOON).expect("a frame goes out");
            assert_eq!(here.receiver.receive(Some(SOON)).expect("a frame comes in"), [number, 1]);
        }
    });
}

/// `finish` is seen as the end on a data channel, a dropped control channel as closed.
pub fn an_orderly_end_is_seen(make_pair: &MakePair<'_>) {
    let Opened { mut senders, mut receivers, control, source, destination: _kept, .. } =
        open(make_pair, 1);
    let (here, mut there) = control;
    senders[0].finish().expect("the channel ends");
    assert_eq!(receivers[0].receive().expect("the end"), Received::End);
    drop((here, senders, source));
    let result = there.receiver.receive(Some(SOON));
    assert!(matches!(result, Err(TransportError::Closed)), "{result:?}");
}

/// A source that goes away without a word ends the destination's waits with an error.
pub fn a_lost_source_is_noticed(make_pair: &MakePair<'_>) {
    let Opened { senders, mut receivers, control, source, destination: _kept, .. } =
        open(make_pair, 2);
    let (here, mut there) = control;
    let began = Instant::now();
    thread::scope(|scope| {
        for receiver in &mut receivers {
            scope.spawn(|| {
                let result = receiver.receive();
                assert!(result.is_err(), "{result:?}");
            });
        }
        scope.spawn(|| assert!(there.receiver.receive(Some(SOON)).is_err()));
        drop((here, senders, source));
    });
    assert!(began.elapsed() < SOON);
}

/// A destination that goes away ends the source's sends and waits with an error.
pub fn a_lost_destination_is_noticed(make_pair: &MakePair<'_>) {
    let mut opened = open(make_pair, 1);
    opened.here.fill(5);
    let limit = opened.source.capabilities().max_batch_bytes;
    drop((opened.receivers, opened.control.1, opened.destination));
    let began = Instant::now();
    let sender = &mut opened.senders[0];
    let error = 'lost: loop {
        assert!(began.elapsed() < SOON, "never noticed");
        for batch in batches(limit, 2, REGION_PAGES[2]) {
            match sender.send(&batch) {
                Ok(_) => {}
                Err(error) => break 'lost error,
            }
            match sender.watermarks(Some(Duration::from_millis(1))) {
                Ok(_) => {}
                Err(error) => break 'lost error,
            }
        }
    };
    assert!(matches!(error, TransportError::Lost { .. } | TransportError::Closed), "{error:?}");
}

/// An interrupt ends every wait at its end of the link, now and later, and does no harm after.
pub fn an_interrupt_wakes_everyone(make_pair: &MakePair<'_>) {
    let mut opened = open(make_pair, 2);
    opened.here.fill(6);
    let limit = opened.source.capabilities().max_batch_bytes;
    let (mut here, mut there) = opened.control;
    let source_interrupt = opened.source.interrupter();
    let destination_interrupt = opened.destination.interrupter();
    let interrupted = |result: Result<(), TransportError>| {
        assert!(matches!(result, Err(TransportError::Interrupted)), "{result:?}");
    };
    thread::scope(|scope| {
        // A sender that nobody receives from ends up waiting for room, the other one for landing.
        let mut senders = opened.senders.iter_mut();
        let (stuck, waiting) = (senders.next().expect("two"), senders.next().expect("two"));
        let sending = scope.spawn(|| {
            loop {
                for batch in batches(limit, 2, REGION_PAGES[2]) {
                    stuck.send(&batch)?;
                }
                // A one-sided transport needs nobody to receive: wait instead of running wild.
                stuck.watermarks(Some(Duration::from_millis(1)))?;
            }
        });
        let landing = scope.spawn(move || {
            waiting.send(&[data(0, 0, 1)])?;
            loop {
                waiting.watermarks(Some(SOON))?;
            }
        });
        let hearing = scope.spawn(move || here.receiver.receive(None).map(drop));
        source_interrupt.interrupt();
        interrupted(sending.join().expect("no panic"));
        interrupted(landing.join().expect("no panic"));
        interrupted(hearing.join().expect("no panic"));
    });
    interrupted(opened.senders[1].send(&[data(0, 0, 1)]).map(drop));
    thread::scope(|scope| {
        let hearing = scope.spawn(move || there.receiver.receive(None).map(drop));
        destination_interrupt.interrupt();
        // The source's end has been shut down before: both are true.
        assert!(hearing.join().expect("no panic").is_err());
    });
    drop((opened.senders, opened.receivers, opened.source, opened.destination));
    source_interrupt.interrupt();
    destination_interrupt.interrupt();
}

/// When links and channels are gone nobody holds guest memory any more.
pub fn memory_is_let_go(make_pair: &MakePair<'_>) {
    let opened = open(make_pair, 2);
    let Opened { senders, receivers, control, source, destination, here, there } = opened;
    drop((senders, receivers, control));
    drop((source, destination));
    let began = Instant::now();
    while Arc::strong_count(here.memory()) > 1 || Arc::strong_count(there.memory()) > 1 {
        assert!(began.elapsed() < SOON, "guest memory is still held");
        thread::yield_now();
    }
}
