//! A destination that does nothing, one that talks too much, and one that says nothing more.

#[path = "../support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::convergence::{Bound, Policy};
use pageferry::dirty::DirtySources;
use pageferry::protocol::Message;
use pageferry::testing::{TestMemory, WrappedChannel, WrappedSource, memory_transport};
use pageferry::transport::{
    ChannelCounters, ControlChannel, ControlReceiver, Interrupt, OneLink, PageSender, Run,
    SourceLink, Ticket, TransportError, Watermarks,
};
use pageferry::{Blame, Destination, Event, GuestAtSource, Machine, Source, Timeouts};
use support::{SharedLog, SoftwareLog, TestMachine};

/// How long it keeps silent: so that the source has always something to hear.
const SILENCE: Duration = Duration::ZERO;

/// A link on which all lands, and nothing is heard any more once the greetings are over.
fn mute(link: Box<dyn SourceLink>) -> WrappedSource {
    WrappedSource::new(link).control(|ControlChannel { sender, receiver }| {
        let receiver = Box::new(MuteReceiver { inner: receiver, frames: 0 });
        ControlChannel { sender, receiver }
    })
}

struct MuteReceiver {
    inner: Box<dyn ControlReceiver>,
    frames: u32,
}

impl ControlReceiver for MuteReceiver {
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Vec<u8>, TransportError> {
        loop {
            let heard = self.inner.receive(timeout);
            self.frames += u32::from(heard.is_ok());
            if heard.is_err() || self.frames <= GREETINGS {
                return heard;
            }
        }
    }
}

/// A link whose other end takes all and has nothing land.
fn landless(link: Box<dyn SourceLink>) -> WrappedSource {
    WrappedSource::new(link).channels(|_, inner| Box::new(Sink { inner, sent: 0 }))
}

/// The same, and it says *pong* all the time.
fn chatty(link: Box<dyn SourceLink>) -> WrappedSource {
    landless(link).control(|ControlChannel { sender, receiver }| {
        let receiver = Box::new(Chatter { inner: receiver, frames: 0 });
        ControlChannel { sender, receiver }
    })
}

struct Chatter {
    inner: Box<dyn ControlReceiver>,
    frames: u32,
}

impl ControlReceiver for Chatter {
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Vec<u8>, TransportError> {
        // Once the greetings are over, which a pong has no place in.
        if self.frames < GREETINGS {
            let heard = self.inner.receive(timeout);
            self.frames += u32::from(heard.is_ok());
            return heard;
        }
        match self.inner.receive(Some(SILENCE)) {
            Err(TransportError::TimedOut { .. }) => Ok(Message::Pong { number: u32::MAX }.encode()),
            heard => heard,
        }
    }
}

/// What the destination says before the first round: *welcome*, *registered*, *ready*.
const GREETINGS: u32 = 3;

/// A link that breaks when it is told to, without another word of the other side.
fn deaf(link: Box<dyn SourceLink>, broken: &Arc<AtomicBool>) -> WrappedSource {
    let (deaf, breaking) = (Arc::clone(broken), Arc::clone(broken));
    WrappedSource::new(link)
        .control(move |ControlChannel { sender, receiver }| {
            let receiver = Box::new(DeafReceiver { inner: receiver, broken: Arc::clone(&deaf) });
            ControlChannel { sender, receiver }
        })
        .channels(move |_, inner| {
            Box::new(WrappedChannel::new(inner).breaking(Arc::clone(&breaking)))
        })
}

struct DeafReceiver {
    inner: Box<dyn ControlReceiver>,
    broken: Arc<AtomicBool>,
}

impl ControlReceiver for DeafReceiver {
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Vec<u8>, TransportError> {
        loop {
            let heard = self.inner.receive(timeout);
            if !self.broken.load(Ordering::SeqCst)
                || matches!(heard, Err(TransportError::Interrupted))
            {
                return heard;
            }
        }
    }
}

/// The source waits a second for the other side's account of why, and its guest does not: by the guest's
/// own clock.
#[test]
fn a_guest_does_not_wait_for_last_words() {
    (1..=3).for_each(lose_the_link_of);
}

fn lose_the_link_of(channels: u16) {
    let (here, there) = (TestMemory::new(&[1000]), TestMemory::new(&[1000]));
    (0..500).for_each(|page| here.fill_page(0, page, 1));
    let (source_link, destination_link) = memory_transport::pair();
    let log = SoftwareLog::new(&here);
    let mut mine = TestMachine::new(&here, &log, 10, 42);
    mine.resume().unwrap();
    let mut theirs = TestMachine::new(&there, &SoftwareLog::new(&there), 10, 43);
    theirs.contend_with(&mine);
    let broken = Arc::new(AtomicBool::new(false));
    let (breaking, dirtied) = (Arc::clone(&broken), Arc::clone(&log));
    let timeouts = Timeouts { handshake: Duration::from_secs(2), ..Timeouts::default() };
    let source = Source::new().channels(channels).timeouts(timeouts);
    let source = source.downtime_limit(Duration::from_secs(5)).bound(Bound::BestEffort);
    let source = source.on_event(move |event| {
        if matches!(event, Event::GuestPaused) {
            // So that there is something to send over it.
            dirtied.mark(0, 7);
            breaking.store(true, Ordering::SeqCst);
        }
    });
    let (failure, took) = thread::scope(|scope| {
        scope.spawn(|| {
            let offer = Destination::new()
                .negotiate(OneLink::destination(Box::new(destination_link)))
                .unwrap();
            offer.receive(theirs, there.memory()).map(drop)
        });
        let dirty = DirtySources::new(vec![Box::new(SharedLog(log))]);
        let link = Box::new(deaf(Box::new(source_link), &broken));
        let failure = source
            .migrate(mine, here.memory(), dirty, OneLink::source(link))
            .expect_err("it broke");
        (failure, Instant::now())
    });
    assert!(matches!(failure.guest, GuestAtSource::Running), "{failure:?}");
    assert_eq!(failure.error.blame(), Blame::Transport, "{failure:?}");
    let machine = &failure.machine;
    let waited = took.saturating_duration_since(machine.resumed_at.expect("it was resumed"));
    assert!(waited >= Duration::from_millis(900), "nobody waited for last words: {waited:?}");
    let stood = machine.longest_standstill;
    let most = Duration::from_millis(800);
    assert!(stood > Duration::ZERO && stood < most, "{channels} channels: {stood:?}");
    machine.await_writes();
}

struct Sink {
    inner: Box<dyn PageSender>,
    sent: Ticket,
}

impl PageSender for Sink {
    fn send(&mut self, _: &[Run]) -> Result<Ticket, TransportError> {
        self.sent += 1;
        Ok(self.sent)
    }
    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
        thread::sleep(wait.unwrap_or_default());
        Ok(Watermarks { released: self.sent, landed: 0 })
    }
    fn counters(&self) -> ChannelCounters {
        self.inner.counters()
    }
    fn finish(&mut self) -> Result<(), TransportError> {
        Ok(())
    }
    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}

#[test]
fn a_peer_that_lands_nothing_is_given_up_in_time() {
    let (said, took) = migrate_over(landless);
    assert!(said.contains("pages to land"), "{said}");
    assert!(took >= STALL, "{took:?}");
}

/// It is not heard until its time is up: that it says anything is against the protocol.
#[test]
fn a_peer_that_says_what_nobody_asked_is_refused() {
    let (said, _) = migrate_over(chatty);
    assert!(said.contains("it sent pong at the stage copying"), "{said}");
}

/// Its pages land, round after round, and no switchover is due that would find out.
#[test]
fn a_peer_that_answers_no_ping_is_given_up_in_time() {
    let (said, took) = migrate_over(mute);
    assert!(said.contains("to answer a ping"), "{said}");
    assert!(took >= STALL, "{took:?}");
}

const STALL: Duration = Duration::from_millis(300);

/// What was said of such a link, and how long it took. No switchover is due.
fn migrate_over(link: fn(Box<dyn SourceLink>) -> WrappedSource) -> (String, Duration) {
    let (here, there) = (TestMemory::new(&[1000]), TestMemory::new(&[1000]));
    (0..500).for_each(|page| here.fill_page(0, page, 1));
    let (source_link, destination_link) = memory_transport::pair();
    let log = SoftwareLog::new(&here);
    let mut mine = TestMachine::new(&here, &log, 10, 42);
    mine.resume().unwrap();
    let mut theirs = TestMachine::new(&there, &SoftwareLog::new(&there), 10, 43);
    theirs.contend_with(&mine);
    let source = Source::new().timeouts(Timeouts { stall: STALL, ..Timeouts::default() });
    let source = source.downtime_limit(Duration::from_nanos(1)).policy(Policy::KeepTrying);
    // Should it be held all the same, that is no hang.
    let handle = source.handle();
    let began = Instant::now();
    let failure = thread::scope(|scope| {
        let (over, ended) = crossbeam_channel::bounded::<()>(0);
        scope.spawn(move || {
            if ended.recv_timeout(Duration::from_secs(20)).is_err_and(|error| error.is_timeout()) {
                handle.cancel();
            }
        });
        scope.spawn(|| {
            let offer = Destination::new()
                .negotiate(OneLink::destination(Box::new(destination_link)))
                .unwrap();
            offer.receive(theirs, there.memory()).map(drop)
        });
        let dirty = DirtySources::new(vec![Box::new(SharedLog(log))]);
        let link = Box::new(link(Box::new(source_link)));
        let failure = source
            .migrate(mine, here.memory(), dirty, OneLink::source(link))
            .expect_err("it is useless");
        drop(over);
        failure
    });
    let took = began.elapsed();
    assert!(took < Duration::from_secs(5), "{failure:?}");
    assert!(matches!(failure.guest, GuestAtSource::Running), "{failure:?}");
    failure.machine.await_writes();
    (failure.error.to_string(), took)
}
