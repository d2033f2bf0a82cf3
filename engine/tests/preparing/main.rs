//! A *prepare* that goes out while its switchover is called off, from the thread that sends device
//! state: the destination loads then, and the source has to know.

#[path = "../support/mod.rs"]
mod support;

use std::io;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use pageferry::convergence::Policy;
use pageferry::digest::Digest;
use pageferry::dirty::DirtySources;
use pageferry::memory::GuestMemory;
use pageferry::testing::{TestMemory, WrappedSource, memory_transport, until_asleep};
use pageferry::threads::{Running, Spawn, StdThreads, ThreadBody, ThreadRole};
use pageferry::transport::{ControlChannel, ControlSender, OneLink, SourceLink, TransportError};
use pageferry::{
    Arrived, Departed, Destination, Event, Machine, MachineError, Source, SwitchoverStage,
};
use rustix::thread::{Pid, gettid};
use support::{SharedLog, SoftwareLog, TestMachine};

/// A *prepare* begins so, see docs/protocol.md.
const PREPARE: [u8; 2] = 6_u16.to_le_bytes();
/// So much device state goes out by a thread of its own.
const STATE_BYTES: usize = 64 << 10;
/// Longer than anything takes here that is not to happen.
const WATCHED: Duration = Duration::from_millis(500);
/// Longer than anything takes that is to happen.
const SOON: Duration = Duration::from_secs(60);

/// A link that takes its first *prepare* once the guest runs on and its driver waits for that.
fn holding(link: Box<dyn SourceLink>, resumed: Receiver<Pid>) -> WrappedSource {
    let mut resumed = Some(resumed);
    WrappedSource::new(link).control(move |ControlChannel { sender, receiver }| {
        let sender = Box::new(HoldingSender { inner: sender, resumed: resumed.take() });
        ControlChannel { sender, receiver }
    })
}

struct HoldingSender {
    inner: Box<dyn ControlSender>,
    resumed: Option<Receiver<Pid>>,
}

impl ControlSender for HoldingSender {
    fn send(&mut self, frame: &[u8], timeout: Duration) -> Result<(), TransportError> {
        if frame.starts_with(&PREPARE)
            && let Some(resumed) = self.resumed.take()
        {
            // What ran on earlier was not this switchover's.
            resumed.try_iter().for_each(drop);
            until_asleep(resumed.recv_timeout(SOON).expect("the switchover is called off"));
        }
        self.inner.send(frame, timeout)
    }
}

/// What a load sees of the source.
struct Seen {
    called_off: Receiver<()>,
    /// Rounds that began after that.
    rounds: Receiver<u32>,
}

struct LongState {
    inner: TestMachine,
    resumed: Option<Sender<Pid>>,
    /// The first load goes on until its switchover was called off, and for a while more.
    seen: Option<Seen>,
    memory: Arc<GuestMemory>,
}

impl LongState {
    fn outlive(&self, seen: &Seen) -> Result<(), MachineError> {
        let before = Digest::of(&self.memory)?;
        seen.called_off.recv_timeout(SOON)?;
        match seen.rounds.recv_timeout(WATCHED) {
            Err(RecvTimeoutError::Timeout) => {}
            round => return Err(format!("{round:?} began while this loads").into()),
        }
        if Digest::of(&self.memory)? != before {
            return Err("memory changes while this loads".into());
        }
        Ok(())
    }
}

impl Machine for LongState {
    fn pause(&mut self) -> Result<(), MachineError> {
        self.inner.pause()
    }
    fn resume(&mut self) -> Result<(), MachineError> {
        self.inner.resume()?;
        self.resumed.iter().try_for_each(|resumed| Ok(resumed.send(gettid())?))
    }
    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), MachineError> {
        self.inner.save(state)?;
        state.resize(STATE_BYTES, 0);
        Ok(())
    }
    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        if let Some(seen) = self.seen.take() {
            self.outlive(&seen)?;
        }
        self.inner.load(&state[..8])
    }
    fn unload(&mut self) -> Result<(), MachineError> {
        self.inner.unload()
    }
    fn release_resources(&mut self) -> Result<(), MachineError> {
        self.inner.release_resources()
    }
    fn reacquire_resources(&mut self) -> Result<(), MachineError> {
        self.inner.reacquire_resources()
    }
}

/// A switchover that is called off while its *prepare* goes out, and one after it.
fn called_off_meanwhile(threads: Arc<dyn Spawn>, told: Option<Sender<()>>) {
    let (here, there) = (TestMemory::new(&[1000]), TestMemory::new(&[1000]));
    (0..500).for_each(|page| here.fill_page(0, page, 1));
    let (source_link, destination_link) = memory_transport::pair();
    let log = SoftwareLog::new(&here);
    let mut inner = TestMachine::new(&here, &log, 100, 42);
    inner.resume().unwrap();
    inner.await_writes();
    let (resumed_in, resumed) = unbounded();
    let memory = Arc::clone(here.memory());
    let mine = LongState { inner, resumed: Some(resumed_in), seen: None, memory };
    let mut inner = TestMachine::new(&there, &SoftwareLog::new(&there), 100, 43);
    inner.contend_with(&mine.inner);
    let (called_off_in, called_off) = unbounded();
    let (rounds_in, rounds) = unbounded();
    let seen = Some(Seen { called_off, rounds });
    let memory = Arc::clone(there.memory());
    let theirs = LongState { inner, resumed: None, seen, memory };

    let source = Source::new().policy(Policy::KeepTrying).verify(true).threads(threads);
    let source = source.downtime_limit(Duration::from_millis(400));
    let handle = source.handle();
    let (mut was_called_off, mut told) = (false, told);
    let source = source.on_event(move |event| match event {
        Event::CalledOff { stage: Some(SwitchoverStage::DeviceState), .. } => {
            was_called_off = true;
            // What one load took is no reason against another.
            handle.set_downtime_limit(SOON);
            called_off_in.send(()).expect("the destination loads, or will");
        }
        Event::RoundStarted { round, .. } if was_called_off => {
            // Nobody listens once it has loaded.
            let _ = rounds_in.send(*round);
        }
        Event::GuestRunsThere => drop(told.take()),
        _ => {}
    });
    let (departed, arrived) = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let offer = Destination::new()
                .negotiate(OneLink::destination(Box::new(destination_link)))
                .unwrap();
            offer.receive(theirs, there.memory())
        });
        let dirty = DirtySources::new(vec![Box::new(SharedLog(log))]);
        let link = Box::new(holding(Box::new(source_link), resumed));
        let departed = source.migrate(mine, here.memory(), dirty, OneLink::source(link));
        (departed, receiving.join().expect("the destination does not panic"))
    });
    let Arrived { machine, verified, .. } =
        arrived.map_err(|failure| failure.error).expect("the guest arrives");
    assert!(machine.seen.is_none() && machine.inner.is_running() && verified);
    let Departed { statistics, .. } =
        departed.map_err(|failure| failure.error).expect("the source hands over");
    assert!(statistics.switchover_attempts > 1);
}

#[test]
fn a_prepare_that_goes_out_as_its_switchover_is_called_off_is_waited_for() {
    called_off_meanwhile(Arc::new(StdThreads), None);
}

/// Threads that send device state and then have more to do, until the guest runs there and for a while
/// more. Each tells whether the migration waited for it.
struct Lingering {
    runs_there: Receiver<()>,
    returned: Receiver<()>,
    awaited: Sender<bool>,
    begun: Mutex<u32>,
}

impl Spawn for Lingering {
    fn spawn(&self, role: ThreadRole, body: ThreadBody) -> io::Result<Box<dyn Running>> {
        if role != ThreadRole::DeviceState {
            return StdThreads.spawn(role, body);
        }
        *self.begun.lock().unwrap() += 1;
        let (runs_there, returned) = (self.runs_there.clone(), self.returned.clone());
        let awaited = self.awaited.clone();
        let lingering = move || {
            body();
            let _ = runs_there.recv_timeout(SOON);
            let waits = returned.recv_timeout(WATCHED) == Err(RecvTimeoutError::Timeout);
            awaited.send(waits).expect("the test waits for it");
        };
        StdThreads.spawn(role, Box::new(lingering))
    }
}

#[test]
fn who_sends_device_state_is_joined_before_the_migration_is_over() {
    let (told, runs_there) = bounded(0);
    let (migrates, returned) = bounded(0);
    let (awaited_in, awaited) = unbounded();
    let threads =
        Arc::new(Lingering { runs_there, returned, awaited: awaited_in, begun: Mutex::new(0) });
    called_off_meanwhile(Arc::clone(&threads) as Arc<dyn Spawn>, Some(told));
    drop(migrates);
    let begun = *threads.begun.lock().unwrap();
    assert!(begun > 1, "one for each switchover");
    for _ in 0..begun {
        assert!(awaited.recv_timeout(SOON).expect("it ends"), "the migration was over before");
    }
}
