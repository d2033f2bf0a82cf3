//! While data channels open a side waits in its transport, and only an interrupt of the whole link ends
//! that: the other side is told why nevertheless.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::support::{self, SharedLog, SoftwareLog, TestMachine};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use pageferry::dirty::DirtySources;
use pageferry::protocol::{FailureReason, Hello, Message, MigrationKey, negotiate};
use pageferry::testing::{
    LinkCall, TestMemory, WrappedDestination, WrappedLink, WrappedSource, hear, memory_transport,
    say,
};
use pageferry::transport::{ControlChannel, Interrupt, Link, OneLink, TransportError};
use pageferry::{Blame, Destination, Error, GuestAlarm, GuestAtSource, Source};

const PATIENCE: Duration = Duration::from_secs(30);

/// The last word, and that it is the last.
fn hear_failed(control: &mut ControlChannel) -> FailureReason {
    let Message::Failed { reason, .. } = hear(control) else { panic!("it goes on") };
    let end = control.receiver.receive(Some(PATIENCE));
    assert!(matches!(end, Err(TransportError::Closed)), "after the last word: {end:?}");
    reason
}

/// What no side may say while channels open: a message that there is none of, and one that is early.
fn nonsense() -> [Vec<u8>; 2] {
    [vec![27, 0], Message::Round { round: 1, dirty_pages: 1 }.encode()]
}

/// Opens when it is interrupted.
struct Latch {
    hold: Mutex<Option<Sender<()>>>,
    link: Arc<dyn Interrupt>,
}

impl Interrupt for Latch {
    fn interrupt(&self) {
        *self.hold.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.link.interrupt();
    }
}

/// A link whose data channels do not open until it is interrupted, and what says that somebody waits for
/// them.
fn stuck<L: Link + ?Sized, C: ?Sized>(link: Box<L>) -> (WrappedLink<L, C>, Receiver<()>) {
    let (waits, waited_for) = unbounded();
    let (hold, opened) = bounded::<()>(0);
    let link = WrappedLink::new(link)
        .interrupted_by(|link| Arc::new(Latch { hold: Mutex::new(Some(hold)), link }))
        .before(move |call| {
            if call != LinkCall::Open {
                return Ok(());
            }
            let _ = waits.send(());
            let _ = opened.recv();
            Err(TransportError::Interrupted)
        });
    (link, waited_for)
}

/// A source that waits for its data channels to open. `then` gets its control channel's other end, and
/// what its guest's end is told by.
fn source_that_opens(source: Source, then: impl FnOnce(&mut ControlChannel, &GuestAlarm)) -> Error {
    let (here, mut there) = memory_transport::pair();
    let memory = TestMemory::new(&[64]);
    let log = SoftwareLog::new(&memory);
    let machine = TestMachine::new(&memory, &log, 1, 1);
    let alarm = Arc::clone(&machine.alarm);
    let (link, waits): (WrappedSource, _) = stuck(Box::new(here));
    thread::scope(|scope| {
        let migrating = scope.spawn(|| {
            let dirty = DirtySources::new(vec![Box::new(SharedLog(Arc::clone(&log)))]);
            source.migrate(machine, memory.memory(), dirty, OneLink::source(Box::new(link)))
        });
        let mut control = there.control().expect("the control channel");
        let Message::Hello(hello) = hear(&mut control) else { panic!("no greeting") };
        let (_, welcome) = negotiate(&hello, 1, false, false).expect("it fits");
        say(&mut control, &Message::Welcome(welcome));
        assert!(matches!(hear(&mut control), Message::Agreed { .. }));
        assert_eq!(hear(&mut control), Message::Registered);
        say(&mut control, &Message::Registered);
        waits.recv_timeout(PATIENCE).expect("it opens channels");
        let alarm = alarm.lock().unwrap_or_else(PoisonError::into_inner).take();
        then(&mut control, &alarm.expect("it was set"));
        let failure = migrating.join().expect("no panic").expect_err("no guest left");
        assert!(matches!(failure.guest, GuestAtSource::Running), "{:?}", failure.guest);
        failure.error
    })
}

/// The same of a destination.
fn destination_that_opens(
    destination: Destination,
    then: impl FnOnce(&mut ControlChannel),
) -> Error {
    let (mut here, there) = memory_transport::pair();
    let memory = TestMemory::new(&[64]);
    let machine = TestMachine::new(&memory, &SoftwareLog::new(&memory), 1, 1);
    let (link, waits): (WrappedDestination, _) = stuck(Box::new(there));
    thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            destination
                .negotiate(OneLink::destination(Box::new(link)))
                .expect("an offer")
                .receive(machine, memory.memory())
        });
        let mut control = here.control().expect("the control channel");
        let hello = Hello::new(
            MigrationKey::of_a_test(),
            memory.memory().layout().clone(),
            1,
            false,
            Vec::new(),
        );
        let hello = Hello { state_schema: support::SCHEMA.to_vec(), ..hello };
        say(&mut control, &Message::Hello(hello.clone()));
        let Message::Welcome(welcome) = hear(&mut control) else { panic!("no welcome") };
        say(&mut control, &welcome.agreed(&hello));
        say(&mut control, &Message::Registered);
        assert_eq!(hear(&mut control), Message::Registered);
        waits.recv_timeout(PATIENCE).expect("it opens channels");
        then(&mut control);
        receiving.join().expect("no panic").expect_err("no guest came").error
    })
}

#[test]
fn a_destination_that_breaks_the_protocol_while_channels_open_is_told_so() {
    for frame in nonsense() {
        let error = source_that_opens(Source::new().channels(1), |control, _| {
            control.sender.send(&frame, PATIENCE).expect("the source listens");
            assert_eq!(hear_failed(control), FailureReason::PeerMisbehaved);
        });
        assert_eq!(error.blame(), Blame::PeerMisbehaved, "{error:?}");
    }
}

#[test]
fn a_source_that_breaks_the_protocol_while_channels_open_is_told_so() {
    for frame in nonsense() {
        let error = destination_that_opens(Destination::new(), |control| {
            control.sender.send(&frame, PATIENCE).expect("the destination listens");
            assert_eq!(hear_failed(control), FailureReason::PeerMisbehaved);
        });
        assert_eq!(error.blame(), Blame::PeerMisbehaved, "{error:?}");
    }
}

#[test]
fn who_is_called_off_while_channels_open_tells_the_other_side() {
    let source = Source::new().channels(1);
    let handle = source.handle();
    let error = source_that_opens(source, |control, _| {
        handle.cancel();
        assert_eq!(hear_failed(control), FailureReason::Cancelled);
    });
    assert!(matches!(error, Error::Cancelled), "{error:?}");

    let destination = Destination::new();
    let handle = destination.handle();
    let error = destination_that_opens(destination, |control| {
        handle.cancel();
        assert_eq!(hear_failed(control), FailureReason::Cancelled);
    });
    assert!(matches!(error, Error::Cancelled), "{error:?}");
}

#[test]
fn a_guest_that_ends_while_channels_open_is_why_for_both_sides() {
    let error = source_that_opens(Source::new().channels(1), |control, alarm| {
        alarm.raise("a triple fault".into());
        assert_eq!(hear_failed(control), FailureReason::Machine);
    });
    assert!(error.chain().to_string().contains("a triple fault"), "{error:?}");
}

#[test]
fn a_side_that_was_told_why_has_no_last_word_of_its_own() {
    let failed = Message::Failed { reason: FailureReason::Declined, text: "no".to_owned() };
    let error = source_that_opens(Source::new().channels(1), |control, _| {
        say(control, &failed);
        let end = control.receiver.receive(Some(PATIENCE));
        assert!(matches!(end, Err(TransportError::Closed)), "{end:?}");
    });
    assert!(matches!(error, Error::PeerFailed { .. }), "{error:?}");
}
