//! Code of the host that panics, wherever the engine calls it, on either side: the machine comes back,
//! nobody waits for a side that is gone, and the guest is where the handover says.

#[path = "../support/mod.rs"]
mod support;

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pageferry::dirty::{DirtyBitmap, DirtyError, DirtySource, DirtySources};
use pageferry::testing::{
    ChannelCall, LinkCall, TestMemory, WrappedChannel, WrappedDestination, WrappedLink,
    WrappedSource, memory_transport,
};
use pageferry::threads::{Running, Spawn, StdThreads, ThreadBody, ThreadRole};
use pageferry::transport::{
    ControlChannel, ControlReceiver, ControlSender, Link, OneLink, TransportError,
};
use pageferry::{
    Arrived, Departed, Destination, DestinationFailure, Error, Event, GuestAtDestination,
    GuestAtSource, Machine, Source, SourceFailure,
};
use support::{Refuse, SharedLog, SoftwareLog, TestMachine};

const PAGES: u64 = 1000;
const WORKING_SET: u64 = 50;

/// Where one side panics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spot {
    Nowhere,
    Machine(Refuse),
    /// The event sink, at events whose name begins so.
    Event(&'static str),
    /// A call of the dirty source.
    Dirty(&'static str),
    /// A call of the link, of a channel or of the control channel.
    Link(&'static str),
    /// The hook that starts threads, itself.
    Hook(ThreadRole),
    /// A thread before it has run the engine's part, as one would whose filter cannot be installed.
    Thread(ThreadRole),
    /// A hook that forgets what it was to run.
    Forgets(ThreadRole),
}

impl Spot {
    fn reach(self, spot: Self) {
        assert!(self != spot, "{spot:?} panics as the test wants");
    }
}

struct Hook(Spot);

impl Spawn for Hook {
    fn spawn(&self, role: ThreadRole, body: ThreadBody) -> io::Result<Box<dyn Running>> {
        self.0.reach(Spot::Hook(role));
        let spot = self.0;
        let body: ThreadBody = Box::new(move || {
            spot.reach(Spot::Thread(role));
            if spot != Spot::Forgets(role) {
                body();
            }
        });
        StdThreads.spawn(role, body)
    }
}

struct Log(SharedLog, Spot);

impl DirtySource for Log {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn start(&self) -> Result<(), DirtyError> {
        self.1.reach(Spot::Dirty("start"));
        self.0.start()
    }
    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), DirtyError> {
        self.1.reach(Spot::Dirty("harvest"));
        self.0.harvest(into)
    }
    fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        self.1.reach(Spot::Dirty("rearm"));
        self.0.rearm(region, first_page, words)
    }
    fn put_back(&self, pages: &DirtyBitmap) -> Result<(), DirtyError> {
        self.1.reach(Spot::Dirty("put_back"));
        self.0.put_back(pages)
    }
    fn stop(&self) -> Result<(), DirtyError> {
        self.0.stop()?;
        self.1.reach(Spot::Dirty("stop"));
        Ok(())
    }
}

/// A link that panics at the spot, or one of its channels does.
fn panicky<L: Link + ?Sized, C: ?Sized + 'static>(
    spot: Spot,
    link: Box<L>,
    channel: fn(WrappedChannel<C>) -> Box<C>,
) -> WrappedLink<L, C> {
    WrappedLink::new(link)
        .before(move |call| {
            spot.reach(Spot::Link(match call {
                LinkCall::Control => "control",
                LinkCall::Register => "register",
                LinkCall::Open => "open",
            }));
            Ok(())
        })
        .control(move |ControlChannel { sender, receiver }| ControlChannel {
            sender: Box::new(PanickyFrames(spot, sender)),
            receiver: Box::new(PanickyFrames(spot, receiver)),
        })
        .channels(move |_, inner| {
            let wrapped = WrappedChannel::new(inner).before(move |call| {
                match call {
                    ChannelCall::Send => spot.reach(Spot::Link("send pages")),
                    ChannelCall::Watermarks { .. } => spot.reach(Spot::Link("watermarks")),
                    ChannelCall::Finish => spot.reach(Spot::Link("finish")),
                    ChannelCall::Receive => {}
                }
                Ok(())
            });
            channel(wrapped.after(move |call| {
                if call == ChannelCall::Receive {
                    spot.reach(Spot::Link("receive pages"));
                }
            }))
        })
}

/// A half of the control channel.
struct PanickyFrames<C: ?Sized>(Spot, Box<C>);

impl ControlSender for PanickyFrames<dyn ControlSender> {
    fn send(&mut self, frame: &[u8], timeout: Duration) -> Result<(), TransportError> {
        self.0.reach(Spot::Link("send a frame"));
        self.1.send(frame, timeout)
    }
}

impl ControlReceiver for PanickyFrames<dyn ControlReceiver> {
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Vec<u8>, TransportError> {
        let received = self.1.receive(timeout);
        self.0.reach(Spot::Link("receive a frame"));
        received
    }
}

struct Outcome {
    source: Result<Departed<TestMachine>, Box<SourceFailure<TestMachine>>>,
    destination: Result<Result<Arrived<TestMachine>, Box<DestinationFailure<TestMachine>>>, Error>,
    here: TestMemory,
}

/// Tells the sink what happens, and panics at the spot.
fn sink(spot: Spot) -> impl FnMut(&Event) + Send + 'static {
    move |event| {
        if let Spot::Event(name) = spot {
            assert!(!format!("{event:?}").starts_with(name), "{name} panics as the test wants");
        }
    }
}

fn machine(memory: &TestMemory, log: &Arc<SoftwareLog>, spot: Spot) -> TestMachine {
    let mut machine = TestMachine::new(memory, log, WORKING_SET, 42);
    if let Spot::Machine(call) = spot {
        (machine.refuse, machine.panics) = (call, true);
    }
    machine
}

/// Migrates with a source that panics at one spot, and a destination that does at another.
fn play(at_source: Spot, at_destination: Spot) -> Outcome {
    let (here, there) = (TestMemory::new(&[PAGES]), TestMemory::new(&[PAGES]));
    (0..PAGES / 2).for_each(|page| here.fill_page(0, page, 1));
    let (source_link, destination_link) = memory_transport::pair();
    let log = SoftwareLog::new(&here);
    let mut mine = machine(&here, &log, at_source);
    let refuse = std::mem::replace(&mut mine.refuse, Refuse::Nothing);
    mine.resume().unwrap();
    mine.refuse = refuse;
    let mut theirs = machine(&there, &SoftwareLog::new(&there), at_destination);
    theirs.contend_with(&mine);
    let source =
        Source::new().downtime_limit(Duration::from_secs(5)).threads(Arc::new(Hook(at_source)));
    let destination = Destination::new().threads(Arc::new(Hook(at_destination)));
    let (source, destination) =
        (source.on_event(sink(at_source)), destination.on_event(sink(at_destination)));
    let (source, destination) = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let link: WrappedDestination =
                panicky(at_destination, Box::new(destination_link), |channel| Box::new(channel));
            let offer = destination.negotiate(OneLink::destination(Box::new(link)))?;
            Ok(offer.receive(theirs, there.memory()))
        });
        let log = Log(SharedLog(log), at_source);
        let dirty = DirtySources::new(vec![Box::new(log)]);
        let link: WrappedSource =
            panicky(at_source, Box::new(source_link), |channel| Box::new(channel));
        (
            source.migrate(mine, here.memory(), dirty, OneLink::source(Box::new(link))),
            receiving.join().unwrap(),
        )
    });
    Outcome { source, destination, here }
}

/// All that the engine calls at a source before the commit.
fn spots_at_source() -> Vec<Spot> {
    let calls = [
        Refuse::Schema,
        Refuse::Rehearse,
        Refuse::Pause,
        Refuse::Save,
        Refuse::Release,
        Refuse::ReleaseHalfWay,
    ];
    let events = ["Agreed", "Registered", "RoundStarted", "RoundFinished", "GuestPaused"];
    let link = [
        "control",
        "register",
        "open",
        "send a frame",
        "receive a frame",
        "send pages",
        "watermarks",
    ];
    let roles = [ThreadRole::Control, ThreadRole::Sender(1)];
    let mut spots: Vec<_> = calls.into_iter().map(Spot::Machine).collect();
    spots.extend(events.map(Spot::Event));
    spots.extend(["start", "harvest", "rearm"].map(Spot::Dirty));
    spots.extend(link.map(Spot::Link));
    spots.extend(roles.map(Spot::Hook));
    spots.extend(roles.map(Spot::Thread));
    spots.extend(roles.map(Spot::Forgets));
    spots
}

/// All that the engine calls at a destination before the guest runs there.
fn spots_at_destination() -> Vec<Spot> {
    let calls = [Refuse::Schema, Refuse::Load, Refuse::Reacquire, Refuse::ReacquireHalfWay];
    let events = ["Agreed", "Registered", "RoundStarted"];
    let link = ["control", "register", "open", "send a frame", "receive a frame", "receive pages"];
    let roles = [ThreadRole::Control, ThreadRole::Receiver(1)];
    let mut spots: Vec<_> = calls.into_iter().map(Spot::Machine).collect();
    spots.extend(events.map(Spot::Event));
    spots.extend(link.map(Spot::Link));
    spots.extend(roles.map(Spot::Hook));
    spots.extend(roles.map(Spot::Thread));
    spots.extend(roles.map(Spot::Forgets));
    spots
}

fn is_panic(error: &Error) -> bool {
    matches!(error, Error::Panicked { .. }) && error.to_string().contains(" panicked: ")
}

#[test]
fn a_panic_at_the_source_before_the_commit_leaves_the_guest_there() {
    for spot in spots_at_source() {
        let outcome = play(spot, Spot::Nowhere);
        let failure = outcome.source.expect_err("the source keeps its guest");
        assert!(matches!(failure.guest, GuestAtSource::Running), "{spot:?}: {failure:?}");
        assert!(is_panic(&failure.error), "{spot:?}: {failure:?}");
        assert!(failure.machine.holds_lock(), "{spot:?}");
        failure.machine.await_writes();
        assert_eq!(Arc::strong_count(outcome.here.memory()), 2, "{spot:?}");
        if let Ok(received) = outcome.destination {
            let theirs = received.expect_err("the guest is at the source");
            assert_eq!(theirs.guest, GuestAtDestination::AtSource, "{spot:?}");
        }
    }
}

#[test]
fn a_panic_at_the_destination_before_it_runs_the_guest_leaves_that_at_the_source() {
    for spot in spots_at_destination() {
        let outcome = play(Spot::Nowhere, spot);
        let failure = outcome.source.expect_err("the source keeps its guest");
        assert!(matches!(failure.guest, GuestAtSource::Running), "{spot:?}: {failure:?}");
        assert!(failure.machine.holds_lock(), "{spot:?}");
        failure.machine.await_writes();
        let error = match outcome.destination {
            Ok(received) => {
                let theirs = received.expect_err("the guest is at the source");
                assert!(!theirs.machine.is_running(), "{spot:?}");
                theirs.error
            }
            Err(error) => error,
        };
        assert!(is_panic(&error), "{spot:?}: {error:?}");
    }
}

/// Whoever only watches, or cleans up, does not stop a guest that has left.
#[test]
fn a_panic_after_the_commit_changes_nothing() {
    let nowhere = Spot::Nowhere;
    for (here, there) in [
        (Spot::Event("Committed"), nowhere),
        (Spot::Event("GuestRunsThere"), nowhere),
        (Spot::Link("finish"), nowhere),
        (Spot::Dirty("stop"), nowhere),
        (nowhere, Spot::Event("Committed")),
        (nowhere, Spot::Event("GuestRunsThere")),
    ] {
        let outcome = play(here, there);
        let departed = outcome.source.expect("the source hands over");
        let arrived = outcome.destination.unwrap().expect("the guest arrives");
        assert!(!departed.machine.is_running());
        arrived.machine.await_writes();
    }
}

/// A guest that was being let run may run: nobody else lets it run.
#[test]
fn a_destination_that_panics_as_it_resumes_keeps_the_guest() {
    let outcome = play(Spot::Nowhere, Spot::Machine(Refuse::Resume));
    let failure = outcome.source.expect_err("nobody says that the guest runs");
    assert!(matches!(failure.guest, GuestAtSource::Uncertain), "{failure:?}");
    assert!(!failure.machine.is_running());
    let said = failure.error.chain().to_string();
    assert!(said.contains("Resume panics as the test wants"), "{said}");
    let theirs = outcome.destination.unwrap().expect_err("it panicked");
    assert_eq!(theirs.guest, GuestAtDestination::Unresumed);
    assert!(is_panic(&theirs.error), "{theirs:?}");
    assert!(theirs.machine.holds_lock());
}

/// What is done to take the guest back may panic too.
#[test]
fn a_source_that_panics_as_it_takes_the_guest_back_says_so() {
    let outcome = play(Spot::Machine(Refuse::Resume), Spot::Machine(Refuse::Load));
    let failure = outcome.source.expect_err("the source keeps its guest");
    let GuestAtSource::Paused(why) = &failure.guest else { panic!("{failure:?}") };
    assert!(is_panic(why), "{why:?}");
    assert!(failure.machine.holds_lock() && !failure.machine.is_running());
}

#[test]
fn dirty_sources_that_panic_at_the_end_take_nothing_along() {
    for spot in ["put_back", "stop"].map(Spot::Dirty) {
        let outcome = play(spot, Spot::Machine(Refuse::Load));
        let failure = outcome.source.expect_err("the source keeps its guest");
        assert!(matches!(failure.guest, GuestAtSource::Running), "{spot:?}: {failure:?}");
        failure.machine.await_writes();
    }
}
