//! Peers that break the protocol, or use up all that it allows: what they say is refused, costs
//! little, and keeps nobody from being heard.

#[path = "../support/mod.rs"]
mod support;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded, unbounded};
use pageferry::dirty::DirtySources;
use pageferry::protocol::{
    FailureReason, Hello, Message, MigrationKey, Prepare, Refusal, Welcome, Why, negotiate,
};
use pageferry::testing::{
    LinkCall, TestMemory, WrappedDestination, WrappedLink, WrappedSource, hear, memory_transport,
    say,
};
use pageferry::transport::{ControlChannel, Link, OneLink, Registration, SourceLink};
use pageferry::{
    Destination, DestinationFailure, Error, Event, GuestAtDestination, Offer, Source, Timeouts,
};
use support::{SharedLog, SoftwareLog, TestMachine};

const PATIENCE: Duration = Duration::from_secs(30);

/// Far more than anybody needs.
const FLOOD: u32 = 10_000;

/// What may wait between two sides: with the engine and with the transport of these tests.
const FEW: usize = 64;

fn hello(memory: &TestMemory, verify: bool) -> Hello {
    let hello = Hello::new(
        MigrationKey::of_a_test(),
        memory.memory().layout().clone(),
        1,
        verify,
        Vec::new(),
    );
    Hello { state_schema: support::SCHEMA.to_vec(), ..hello }
}

/// A destination, and what a source says to it that opens its data channel and is no engine.
fn destination_of(
    destination: Destination,
    verify: bool,
    source: impl FnOnce(&mut ControlChannel),
) -> Box<DestinationFailure<TestMachine>> {
    let (mut link, theirs) = memory_transport::pair();
    let (here, there) = (TestMemory::new(&[64]), TestMemory::new(&[64]));
    let machine = TestMachine::new(&there, &SoftwareLog::new(&there), 1, 1);
    thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let offer =
                destination.negotiate(OneLink::destination(Box::new(theirs))).expect("an offer");
            offer.receive(machine, there.memory())
        });
        let mut control = link.control().expect("the control channel");
        let hello = hello(&here, verify);
        say(&mut control, &Message::Hello(hello.clone()));
        let Message::Welcome(welcome) = hear(&mut control) else { panic!("no welcome") };
        say(&mut control, &welcome.agreed(&hello));
        link.register(here.memory()).expect("register");
        say(&mut control, &Message::Registered);
        assert_eq!(hear(&mut control), Message::Registered);
        let channels = link.open_senders(1).expect("open a channel");
        assert_eq!(hear(&mut control), Message::Ready);
        source(&mut control);
        let failure = receiving.join().expect("no panic").expect_err("no guest came");
        drop(channels);
        failure
    })
}

fn why(error: &Error) -> Why {
    let Error::UnexpectedMessage(Refusal { why, .. }) = error else { panic!("{error:?}") };
    *why
}

#[test]
fn a_source_that_nobody_has_accepted_can_say_nothing_more() {
    let (mut source, destination) = memory_transport::pair();
    let memory = TestMemory::new(&[64]);
    let mut control = source.control().expect("the control channel");
    say(&mut control, &Message::Hello(hello(&memory, false)));
    let offer: Offer = Destination::new()
        .negotiate(OneLink::destination(Box::new(destination)))
        .expect("an offer");
    let frame = Message::Ping { number: 1 }.encode();
    let taken = (0..FLOOD).take_while(|_| control.sender.send(&frame, PATIENCE).is_ok()).count();
    assert!(taken < FEW, "{taken} frames were taken");
    // Its host may take its time, and then has to do with a source that broke the protocol.
    let theirs = TestMachine::new(&memory, &SoftwareLog::new(&memory), 1, 1);
    let failure = offer.receive(theirs, memory.memory()).expect_err("no guest");
    assert_eq!(why(&failure.error), Why::Stage);
    assert_eq!(failure.guest, GuestAtDestination::AtSource);
}

#[test]
fn a_flood_of_what_is_allowed_waits_with_the_transport_and_silences_nobody() {
    let (release, released) = bounded::<()>(0);
    // The driver is busy with its host from the first round on.
    let destination = Destination::new().on_event(move |event| {
        if matches!(event, Event::RoundStarted { round: 1, .. }) {
            let _ = released.recv();
        }
    });
    let handle = destination.handle();
    let failure = destination_of(destination, false, |control| {
        let (tell, told) = unbounded();
        thread::scope(|scope| {
            scope.spawn(move || {
                for round in 1..FLOOD {
                    let frame = Message::Round { round, dirty_pages: 1 }.encode();
                    if control.sender.send(&frame, PATIENCE).is_err() {
                        return;
                    }
                    let _ = tell.send(round);
                }
            });
            let last = loop {
                match told.recv_timeout(Duration::from_secs(2)) {
                    Ok(round) => assert!((round as usize) < FEW, "{round} frames were taken"),
                    Err(end) => break end,
                }
            };
            assert_eq!(last, RecvTimeoutError::Timeout);
            handle.cancel();
            drop(release);
        });
    });
    assert!(matches!(failure.error, Error::Cancelled), "{:?}", failure.error);
}

#[test]
fn a_greeting_that_the_destination_heard_otherwise_ends_the_migration_at_once() {
    let (source, mut theirs) = memory_transport::pair();
    let here = TestMemory::new(&[64]);
    let log = SoftwareLog::new(&here);
    let machine = TestMachine::new(&here, &log, 1, 1);
    thread::scope(|scope| {
        let migrating = scope.spawn(|| {
            let dirty = DirtySources::new(vec![Box::new(SharedLog(Arc::clone(&log)))]);
            let source_link: Box<dyn SourceLink> = Box::new(source);
            Source::new().verify(true).channels(1).migrate(
                machine,
                here.memory(),
                dirty,
                OneLink::source(source_link),
            )
        });
        let mut control = theirs.control().expect("the control channel");
        let Message::Hello(hello) = hear(&mut control) else { panic!("no greeting") };
        // A bit was flipped on its way.
        let hello = Hello { verify: false, ..hello };
        let (_, welcome) = negotiate(&hello, 1, false, false).expect("it fits");
        say(&mut control, &Message::Welcome(welcome));
        let Message::Failed { reason, text } = hear(&mut control) else { panic!("it goes on") };
        assert_eq!(reason, FailureReason::PeerMisbehaved, "{text}");
        let failure = migrating.join().expect("no panic").expect_err("no guest left");
        assert_eq!(why(&failure.error), Why::Greeting);
    });
}

#[test]
fn an_answer_that_the_source_heard_otherwise_ends_the_migration_at_once() {
    let (mut source, destination) = memory_transport::pair();
    let there = TestMemory::new(&[64]);
    let machine = TestMachine::new(&there, &SoftwareLog::new(&there), 1, 1);
    let failure = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let offer = Destination::new()
                .negotiate(OneLink::destination(Box::new(destination)))
                .expect("an offer");
            offer.receive(machine, there.memory())
        });
        let mut control = source.control().expect("the control channel");
        let hello = hello(&there, false);
        say(&mut control, &Message::Hello(hello.clone()));
        let Message::Welcome(welcome) = hear(&mut control) else { panic!("no welcome") };
        let heard = Welcome { wants_data_ranges: true, ..welcome };
        say(&mut control, &heard.agreed(&hello));
        receiving.join().expect("no panic").expect_err("no guest came")
    });
    assert_eq!(why(&failure.error), Why::Greeting);
    assert_eq!(failure.statistics.registration, Registration::default());
}

#[test]
fn nothing_is_loaded_before_memory_was_compared_as_agreed() {
    let failure = destination_of(Destination::new(), true, |control| {
        say(control, &Message::Round { round: 1, dirty_pages: 0 });
        say(control, &Message::Switchover { attempt: 1 });
        say(
            control,
            &Message::Prepare(Prepare {
                attempt: 1,
                state_bytes: 0,
                paused: false,
                sums: Vec::new(),
                samples: Vec::new(),
            }),
        );
        let Message::Failed { reason, text } = hear(control) else { panic!("it goes on") };
        assert_eq!(reason, FailureReason::PeerMisbehaved, "{text}");
    });
    assert_eq!(why(&failure.error), Why::NotCompared);
    assert_eq!(failure.machine.loaded, None);
}

/// The source's word that memory is equal is not taken on trust.
#[test]
fn the_destination_compares_memory_itself() {
    let failure = destination_of(Destination::new(), true, |control| {
        say(control, &Message::Round { round: 1, dirty_pages: 0 });
        say(control, &Message::Switchover { attempt: 1 });
        say(control, &Message::Verify { attempt: 1 });
        let Message::Verified { mut digest, .. } = hear(control) else { panic!("no digest") };
        digest.0[3] ^= 1;
        say(control, &Message::Compared { attempt: 1, digest });
        assert!(matches!(hear(control), Message::Failed { .. }));
    });
    assert!(matches!(failure.error, Error::MemoryDiffers { .. }), "{:?}", failure.error);
    assert_eq!(failure.machine.loaded, None);
}

/// A link whose registration takes its time, as pinning does.
fn slow<L: Link + ?Sized, C: ?Sized>(link: Box<L>, takes: Duration) -> WrappedLink<L, C> {
    WrappedLink::new(link).before(move |call| {
        if call == LinkCall::Register {
            thread::sleep(takes);
        }
        Ok(())
    })
}

#[test]
fn registration_has_a_time_of_its_own_on_either_side() {
    let timeouts = Timeouts {
        handshake: Duration::from_secs(1),
        registration_per_gib: PATIENCE,
        ..Timeouts::default()
    };
    let pinning = 2 * timeouts.handshake;
    for (source_takes, destination_takes) in [(pinning, Duration::ZERO), (Duration::ZERO, pinning)]
    {
        let (source, destination) = memory_transport::pair();
        let (here, there) = (TestMemory::new(&[64]), TestMemory::new(&[64]));
        let log = SoftwareLog::new(&here);
        let mut machine = TestMachine::new(&here, &log, 1, 1);
        pageferry::Machine::resume(&mut machine).unwrap();
        machine.await_writes();
        let mut theirs = TestMachine::new(&there, &SoftwareLog::new(&there), 1, 1);
        theirs.contend_with(&machine);
        thread::scope(|scope| {
            let receiving = scope.spawn(|| {
                let link: WrappedDestination = slow(Box::new(destination), destination_takes);
                let offer = Destination::new()
                    .timeouts(timeouts)
                    .negotiate(OneLink::destination(Box::new(link)))
                    .expect("an offer");
                offer.receive(theirs, there.memory())
            });
            let dirty = DirtySources::new(vec![Box::new(SharedLog(Arc::clone(&log)))]);
            let link: WrappedSource = slow(Box::new(source), source_takes);
            Source::new()
                .timeouts(timeouts)
                .downtime_limit(PATIENCE)
                .migrate(machine, here.memory(), dirty, OneLink::source(Box::new(link)))
                .unwrap_or_else(|failure| panic!("{}", failure.error.chain()));
            receiving.join().expect("no panic").expect("the guest arrives");
        });
    }
}
