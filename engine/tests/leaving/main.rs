//! A peer that goes while this side is in a call of the transport that waits for it: the wait ends,
//! and the reason is the peer's.

use std::thread;
use std::time::{Duration, Instant};

use pageferry::protocol::{FailureReason, Hello, Message, MigrationKey};
use pageferry::testing::memory_transport::{self, MemorySource};
use pageferry::testing::{TestMemory, hear, say};
use pageferry::transport::{ControlChannel, Link, OneLink, PageSender, SourceLink, TransportError};
use pageferry::{
    Destination, DestinationFailure, Error, GuestAtDestination, Machine, MachineError, Timeouts,
};

const PATIENCE: Duration = Duration::from_secs(30);

/// A guest's home that never gets one.
#[derive(Debug)]
struct Vacant;

impl Machine for Vacant {
    fn pause(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Err("there is no guest".into())
    }

    fn save(&mut self, _: &mut Vec<u8>) -> Result<(), MachineError> {
        Err("there is no guest".into())
    }

    fn load(&mut self, _: &[u8]) -> Result<(), MachineError> {
        Err("no guest was expected".into())
    }
}

/// A destination that is patient, of a source that opens no data channel and does
/// `last` once it is welcome. Its failure.
fn destination_of(last: impl FnOnce(ControlChannel)) -> Box<DestinationFailure<Vacant>> {
    let patient = Timeouts { handshake: 2 * PATIENCE, ..Timeouts::default() };
    destination_by(patient, |welcomed| last(welcomed.control))
}

/// A source that is welcome.
struct Welcomed {
    link: MemorySource,
    control: ControlChannel,
    agreed: Message,
}

/// The failure of a destination with these time limits, whose source goes on like this.
fn destination_by(
    timeouts: Timeouts,
    go_on: impl FnOnce(Welcomed),
) -> Box<DestinationFailure<Vacant>> {
    let (mut link, destination) = memory_transport::pair();
    let there = TestMemory::new(&[64]);
    thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let offer = Destination::new()
                .timeouts(timeouts)
                .negotiate(OneLink::destination(Box::new(destination)));
            offer.expect("an offer").receive(Vacant, there.memory())
        });
        let mut control = link.control().expect("the control channel");
        let hello = Hello::new(
            MigrationKey::of_a_test(),
            there.memory().layout().clone(),
            2,
            false,
            Vec::new(),
        );
        say(&mut control, &Message::Hello(hello.clone()));
        let Message::Welcome(welcome) = hear(&mut control) else { panic!("not welcome") };
        go_on(Welcomed { link, control, agreed: welcome.agreed(&hello) });
        receiving.join().expect("no panic").expect_err("no guest came")
    })
}

#[test]
fn a_source_that_leaves_after_the_welcome_is_not_waited_for() {
    let began = Instant::now();
    let failure = destination_of(drop);
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    assert_eq!(failure.guest, GuestAtDestination::AtSource);
    assert!(
        matches!(failure.error, Error::Transport(TransportError::Closed)),
        "{}",
        failure.error.chain()
    );
}

#[test]
fn a_source_that_fails_after_the_welcome_says_why() {
    let began = Instant::now();
    let mut kept = None;
    let failure = destination_of(|mut control| {
        let text = "no more cheese".to_owned();
        let failed = Message::Failed { reason: FailureReason::Host, text };
        control.sender.send(&failed.encode(), PATIENCE).expect("say so");
        kept = Some(control);
    });
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    let Error::PeerFailed { reason: FailureReason::Host, text } = &failure.error else {
        panic!("{}", failure.error.chain())
    };
    assert_eq!(text, "no more cheese");
}

/// It has come as far as the first page, and what it has opened.
fn begin(
    Welcomed { mut link, mut control, agreed }: Welcomed,
) -> (MemorySource, ControlChannel, Vec<Box<dyn PageSender>>) {
    let here = TestMemory::new(&[64]);
    say(&mut control, &agreed);
    link.register(here.memory()).expect("register");
    say(&mut control, &Message::Registered);
    assert_eq!(hear(&mut control), Message::Registered);
    let channels = link.open_senders(2).expect("channels");
    assert_eq!(hear(&mut control), Message::Ready);
    (link, control, channels)
}

/// The destination gives up, and says so.
fn hear_that_time_is_over(control: &mut ControlChannel) {
    let told = hear(control);
    let is_over = matches!(told, Message::Failed { reason: FailureReason::TimedOut, .. });
    assert!(is_over, "{told:?}");
}

fn assert_waited_for(failure: &DestinationFailure<Vacant>, what: &str) {
    assert_eq!(failure.guest, GuestAtDestination::AtSource);
    let said = failure.error.to_string();
    assert!(said.contains(what), "{said}");
}

/// Its host answers for it, and the link seems to live.
#[test]
fn a_source_that_falls_silent_in_a_round_is_not_waited_for() {
    let stall = Duration::from_secs(1);
    let (handshake, registration_per_gib, rejoin) = (stall, Duration::ZERO, Duration::ZERO);
    let timeouts =
        Timeouts { handshake, registration_per_gib, stall, rejoin, ..Timeouts::default() };
    let failure = destination_by(timeouts, |welcomed| {
        let (_link, mut control, _channels) = begin(welcomed);
        say(&mut control, &Message::Round { round: 1, dirty_pages: 9 });
        say(&mut control, &Message::Ping { number: 1 });
        assert_eq!(hear(&mut control), Message::Pong { number: 1 });
        hear_that_time_is_over(&mut control);
    });
    assert_waited_for(&failure, "a sign of life of the source");
}

/// It holds the place of another one.
#[test]
fn a_source_that_never_begins_is_not_waited_for() {
    let handshake = Duration::from_secs(1);
    let timeouts =
        Timeouts { handshake, registration_per_gib: Duration::ZERO, ..Timeouts::default() };
    let failure = destination_by(timeouts, |welcomed| {
        let (_link, mut control, _channels) = begin(welcomed);
        // And says nothing more.
        hear_that_time_is_over(&mut control);
    });
    assert_waited_for(&failure, "the source's first round");
}
