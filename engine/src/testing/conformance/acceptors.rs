//! What every acceptor does: whom it serves, and what who is turned away hears, whatever it calls.
//!
//! A transport gives a function that makes a fresh [`Venue`], whose acceptor serves who has
//! [greeted](crate::transport::Admission), and runs the suite with [`acceptor_suite!`](crate::acceptor_suite) or
//! [`run_all`]. What sources say here any source may say; what strangers do below the port is for each
//! transport's own tests.

use std::thread;
use std::time::{Duration, Instant};

use crate::testing::{SOON, TestMemory, greeting};
use crate::transport::reception::TurnedAway;
use crate::transport::{
    ControlChannel, ControlSender, DestinationLink, SourceLink, TransportError,
};

/// An acceptor, and how it is reached.
pub trait Venue: Send + Sync {
    /// Connects to it, as a source.
    fn connect(&self) -> Result<Box<dyn SourceLink>, TransportError>;

    /// Waits for a source, at most so long.
    fn accept(&self, timeout: Duration) -> Result<Box<dyn DestinationLink>, TransportError>;
}

/// Makes a fresh venue.
pub type MakeVenue<'a> = dyn Fn() -> Box<dyn Venue> + 'a;

/// Within which a source gets in, whoever else is there.
const GETS_IN: Duration = Duration::from_secs(5);
/// More than wait anywhere.
const MANY: u8 = 70;

/// Runs a case by its name.
///
/// # Panics
///
/// If the acceptor fails it, or there is no such case.
pub fn run(name: &str, make_venue: &MakeVenue<'_>) {
    let case = CASES.iter().find(|(case, _)| *case == name);
    let (_, body) = case.unwrap_or_else(|| panic!("there is no case {name}"));
    body(&*make_venue());
}

/// Runs all cases one after another.
///
/// # Panics
///
/// At the first case the acceptor fails; its name was printed before.
pub fn run_all(make_venue: &MakeVenue<'_>) {
    for (name, body) in CASES {
        eprintln!("acceptors: {name}");
        body(&*make_venue());
    }
}

type Body = fn(&dyn Venue);

macro_rules! cases {
    ($($case:ident)*) => {
        /// All cases, each with its name, a sentence.
        pub const CASES: &[(&str, Body)] = &[$((stringify!($case), $case),)*];

        /// Makes a `#[test]` of each case of [`acceptors`](crate::testing::conformance::acceptors) for a function
        /// that makes a `Box<dyn Venue>`.
        #[macro_export]
        macro_rules! acceptor_suite {
            ($make_venue:expr) => {
                mod acceptors {
                    #[allow(unused_imports)]
                    use super::*;

                    $(
                        #[test]
                        fn $case() {
                            $crate::testing::conformance::acceptors::run(
                                stringify!($case),
                                &$make_venue,
                            );
                        }
                    )*
                }
            };
        }
    };
}

cases! {
    who_has_not_greeted_keeps_nobody_out
    who_comes_while_another_one_keeps_its_place_is_told_so
    who_does_not_answer_its_welcome_gives_way_to_who_waits
    a_source_that_leaves_while_it_waits_is_forgotten
    sources_that_greet_and_leave_keep_nobody_out
    who_is_turned_away_while_it_sends_hears_why
    who_has_read_that_it_is_turned_away_hears_so_whatever_it_calls
    who_is_turned_away_while_it_opens_channels_hears_why
    who_is_turned_away_while_it_sends_and_receives_hears_why_twice
}

/// A source that has greeted.
struct Source {
    number: u8,
    link: Box<dyn SourceLink>,
    control: ControlChannel,
}

/// A source's first word, which tells it from others. It takes a transport several pieces.
fn hello(number: u8) -> Vec<u8> {
    greeting(vec![number; 20_000])
}

fn connect(venue: &dyn Venue) -> (Box<dyn SourceLink>, ControlChannel) {
    let mut link = venue.connect().expect("a source is let in");
    let control = link.control().expect("the source's control channel");
    (link, control)
}

fn greet(venue: &dyn Venue, number: u8) -> Source {
    let (link, mut control) = connect(venue);
    control.sender.send(&hello(number), SOON).expect("a greeting goes out");
    Source { number, link, control }
}

/// Accepts one who has greeted; it must be this one.
fn accept(venue: &dyn Venue, source: &Source) -> (Box<dyn DestinationLink>, ControlChannel) {
    let mut link = venue.accept(SOON).expect("a source came");
    let mut control = link.control().expect("the destination's control channel");
    let greeting = control.receiver.receive(Some(SOON)).expect("the greeting is there");
    assert!(greeting == hello(source.number), "another source than {} is served", source.number);
    (link, control)
}

/// One who has greeted, was accepted and welcomed.
fn welcome(venue: &dyn Venue, number: u8) -> (Source, Box<dyn DestinationLink>, ControlChannel) {
    let source = greet(venue, number);
    let (link, mut control) = accept(venue, &source);
    control.sender.send(b"welcome", SOON).expect("a welcome goes out");
    (source, link, control)
}

fn hear(control: &mut ControlChannel, expected: &[u8]) {
    let heard = control.receiver.receive(Some(SOON)).expect("a frame comes");
    assert_eq!(heard, expected);
}

/// The first attempt of a source succeeds.
fn assert_gets_in(venue: &dyn Venue) {
    let began = Instant::now();
    let (mut source, link, control) = welcome(venue, u8::MAX);
    hear(&mut source.control, b"welcome");
    assert!(began.elapsed() < GETS_IN, "a source got in after {:?}", began.elapsed());
    drop((source, control, link));
}

fn assert_refused(error: &TransportError, why: TurnedAway) {
    let TransportError::Refused { reason, .. } = error else { panic!("not refused: {error:?}") };
    assert_eq!(*reason, why.to_string());
}

/// It hears that again and again.
fn assert_turned_away(control: &mut ControlChannel, why: TurnedAway) {
    for _ in 0..2 {
        assert_refused(&control.receiver.receive(Some(SOON)).expect_err("turned away"), why);
    }
}

/// Waits until another source has taken its place, and reads nothing meanwhile: that would be an answer.
fn until_displaced(link: &mut dyn DestinationLink) {
    let began = Instant::now();
    loop {
        match link.control() {
            Err(TransportError::Displaced) => return,
            // It was taken.
            Err(TransportError::OutOfOrder(_)) => thread::yield_now(),
            other => panic!("a link that is to be displaced: {other:?}"),
        }
        assert!(began.elapsed() < SOON, "a silent source keeps its place while another one waits");
    }
}

/// A source that was welcomed, and has lost its place to another one; it has read neither. That one waits
/// behind it.
fn turned_away(venue: &dyn Venue) -> (Source, Source) {
    let (source, mut link, control) = welcome(venue, 1);
    let next = greet(venue, 2);
    until_displaced(&mut *link);
    // As a destination: the channel, each half of which may have a thread of its own, and then the link.
    let ControlChannel { sender, receiver } = control;
    drop(receiver);
    drop(sender);
    drop(link);
    (source, next)
}

/// Sends until that fails. It may take a moment until it is known here that there is nobody any more.
fn fails(sender: &mut dyn ControlSender) -> TransportError {
    let began = Instant::now();
    while began.elapsed() < SOON {
        if let Err(error) = sender.send(b"agreed", SOON) {
            return error;
        }
    }
    panic!("it does not fail");
}

fn who_has_not_greeted_keeps_nobody_out(venue: &dyn Venue) {
    let _silent: Vec<_> = (0..9).map(|_| connect(venue)).collect();
    let nobody = venue.accept(Duration::from_millis(50)).map(drop);
    assert!(matches!(nobody, Err(TransportError::TimedOut { .. })), "{nobody:?}");
    assert_gets_in(venue);
}

fn who_comes_while_another_one_keeps_its_place_is_told_so(venue: &dyn Venue) {
    let (mut source, mut link, mut control) = welcome(venue, 1);
    source.control.sender.send(b"agreed", SOON).expect("an answer goes out");
    hear(&mut control, b"agreed");
    let memory = TestMemory::new(&[1]);
    for registered in [false, true] {
        if registered {
            link.register(memory.memory()).expect("memory registers");
        }
        let began = Instant::now();
        let mut second = greet(venue, 2);
        assert_turned_away(&mut second.control, TurnedAway::Busy);
        assert!(began.elapsed() >= Duration::from_secs(1), "it waits a second for its turn");
    }
    source.control.sender.send(b"more", SOON).expect("a frame goes out");
    hear(&mut control, b"more");
    drop((control, link));
    assert_gets_in(venue);
}

/// Two that come after it: both attempts succeed, one after the other.
fn who_does_not_answer_its_welcome_gives_way_to_who_waits(venue: &dyn Venue) {
    let (mut stranger, mut link, mut control) = welcome(venue, 1);
    hear(&mut stranger.control, b"welcome");
    let (first, second) = (greet(venue, 2), greet(venue, 3));
    let memory = TestMemory::new(&[1]);
    for error in [
        control.receiver.receive(Some(SOON)).map(drop).expect_err("another one waits"),
        control.sender.send(b"more", SOON).expect_err("another one waits"),
        link.register(memory.memory()).map(drop).expect_err("another one waits"),
    ] {
        assert!(matches!(error, TransportError::Displaced), "{error:?}");
    }
    drop((control, link));
    assert_turned_away(&mut stranger.control, TurnedAway::Displaced);
    for source in [first, second] {
        drop(accept(venue, &source));
    }
}

fn a_source_that_leaves_while_it_waits_is_forgotten(venue: &dyn Venue) {
    let (_source, link, control) = welcome(venue, 1);
    drop(greet(venue, 2));
    let next = greet(venue, 3);
    drop((control, link));
    drop(accept(venue, &next));
}

/// Of those that are gone none is waiting any more.
fn sources_that_greet_and_leave_keep_nobody_out(venue: &dyn Venue) {
    let holder = greet(venue, 1);
    // By the time that the next one is let in, it is known that this one has greeted.
    let left = (2..2 + MANY).fold(None, |_, number| Some(greet(venue, number)));
    let source = greet(venue, u8::MAX);
    drop(left);
    for source in [holder, source] {
        drop(accept(venue, &source));
    }
}

fn who_is_turned_away_while_it_sends_hears_why(venue: &dyn Venue) {
    let (Source { mut link, mut control, .. }, _next) = turned_away(venue);
    let memory = TestMemory::new(&[16]);
    for error in [
        fails(&mut *control.sender),
        control.receiver.receive(Some(SOON)).map(drop).expect_err("turned away"),
        link.register(memory.memory()).map(drop).expect_err("turned away"),
        link.open_senders(1).map(drop).expect_err("turned away"),
    ] {
        assert_refused(&error, TurnedAway::Displaced);
    }
}

fn who_has_read_that_it_is_turned_away_hears_so_whatever_it_calls(venue: &dyn Venue) {
    let (Source { mut link, mut control, .. }, _next) = turned_away(venue);
    hear(&mut control, b"welcome");
    let memory = TestMemory::new(&[16]);
    for error in [
        control.receiver.receive(Some(SOON)).map(drop).expect_err("turned away"),
        control.sender.send(b"agreed", SOON).expect_err("turned away"),
        control.receiver.receive(Some(SOON)).map(drop).expect_err("turned away"),
        link.register(memory.memory()).map(drop).expect_err("turned away"),
        link.open_senders(1).map(drop).expect_err("turned away"),
    ] {
        assert_refused(&error, TurnedAway::Displaced);
    }
}

/// The migration is not there any more when its data channels come, or reads.
fn who_is_turned_away_while_it_opens_channels_hears_why(venue: &dyn Venue) {
    for reads in [false, true] {
        let memory = TestMemory::new(&[16]);
        let (mut source, mut link, control) = welcome(venue, 1);
        source.link.register(memory.memory()).expect("memory registers");
        let next = greet(venue, 2);
        until_displaced(&mut *link);
        drop((control, link));
        let opened = if reads {
            source.link.serve_reads(2).map(drop)
        } else {
            source.link.open_senders(2).map(drop)
        };
        assert_refused(&opened.expect_err("turned away"), TurnedAway::Displaced);
        drop(accept(venue, &next));
    }
}

/// One thread waits for frames and another one sends, as in a migration.
fn who_is_turned_away_while_it_sends_and_receives_hears_why_twice(venue: &dyn Venue) {
    let (source, mut link, control) = welcome(venue, 1);
    let Source { link: _kept, control: ControlChannel { mut sender, mut receiver }, .. } = source;
    thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            loop {
                if let Err(error) = receiver.receive(Some(SOON)) {
                    return error;
                }
            }
        });
        let sending = scope.spawn(move || fails(&mut *sender));
        let _next = greet(venue, 2);
        until_displaced(&mut *link);
        drop((control, link));
        for half in [receiving, sending] {
            assert_refused(&half.join().expect("no panic"), TurnedAway::Displaced);
        }
    });
}
