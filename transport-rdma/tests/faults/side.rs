//! A side of a case: a process that moves a guest, or has one come, and is told by lines on stdin what happens to it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::protocol::Message;
use pageferry::testing::{WrappedDestination, WrappedSource};
use pageferry::transport::{
    Connector, ControlChannel, ControlSender, DestinationLink, Interrupt, LinkPurpose, Rendezvous,
    SourceLink, TransportError,
};
use pageferry::{Destination, GuestAtDestination, GuestAtSource, Source, Timeouts};
use pageferry_rdma::{RdmaAcceptor, RdmaDialler, RdmaOptions};
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::guest::{Guest, GuestConfig, GuestKind, kvm_available};
use pageferry_vmm::ram::{Backing, Ram};
use pageferry_vmm::workload::{WorkloadConfig, WorkloadKind};
use rustix::process::{Signal, getpid, kill_process};

use crate::model::{Step, Way};

/// Which side it is, and an address; and the steps at which links stop.
pub(crate) const ROLE: &str = "PAGEFERRY_TEST_SIDE";
pub(crate) const STEPS: &str = "PAGEFERRY_TEST_STEPS";
pub(crate) const SOURCE: &str = "source";
pub(crate) const DESTINATION: &str = "destination";
/// What a side says.
pub(crate) const LISTENS: &str = "listens at ";
pub(crate) const HELD: &str = "held";
pub(crate) const NOBODY: &str = "nobody";

/// What two sides wait for each other.
const LIMITS: Timeouts = Timeouts {
    handshake: Duration::from_secs(5),
    registration_per_gib: Duration::from_secs(1),
    stall: Duration::from_secs(4),
    load: Duration::from_secs(4),
    release: Duration::from_secs(300),
    rejoin: Duration::from_secs(6),
    commit: Duration::from_secs(4),
};
/// How long it may take to connect.
const CONNECT: Duration = Duration::from_secs(3);

/// What becomes of a message that is held.
enum Verdict {
    Deliver,
    /// It is lost, with its link.
    Drop,
    /// It goes on, and then this process has a signal.
    Then(Signal),
}

/// What all links of a side share.
struct Shared {
    state: Mutex<State>,
    verdicts: Mutex<Receiver<Verdict>>,
}

struct State {
    /// Those of messages that this side sends.
    steps: VecDeque<Step>,
    /// The last message that it has sent.
    before: Option<Message>,
    /// Until then nobody is reached.
    away: Option<Instant>,
    channels: Vec<Arc<dyn Interrupt>>,
    /// What ends the wait for a source.
    quit: Option<Arc<dyn Interrupt>>,
    quits: bool,
}

impl Shared {
    /// With a thread that does what stdin says.
    fn new(way: Way) -> Arc<Self> {
        let named = std::env::var(STEPS).expect("steps");
        let step = |name: &str| Step::ALL.into_iter().find(|step| format!("{step:?}") == name);
        let steps = named.split(' ').map(|name| step(name).expect("a step"));
        let (say, verdicts) = channel();
        let shared = Arc::new(Self {
            state: Mutex::new(State {
                steps: steps.filter(|step| step.way() == way).collect(),
                before: None,
                away: None,
                channels: Vec::new(),
                quit: None,
                quits: false,
            }),
            verdicts: Mutex::new(verdicts),
        });
        let told = Arc::clone(&shared);
        thread::spawn(move || {
            io::stdin().lines().map_while(Result::ok).for_each(|line| told.obey(&line, &say));
        });
        shared
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn obey(&self, line: &str, say: &Sender<Verdict>) {
        let (command, number) = line.split_once(' ').unwrap_or((line, "0"));
        let number: u64 = number.parse().expect("a number");
        let verdict = match command {
            "deliver" => Verdict::Deliver,
            "drop" => Verdict::Drop,
            "stop" => Verdict::Then(Signal::STOP),
            "kill" => Verdict::Then(Signal::KILL),
            "reset" => {
                let channel = usize::try_from(number).expect("a channel");
                self.state().channels[channel].interrupt();
                return told(command);
            }
            "away" => {
                let never = Duration::from_secs(100_000);
                let time = Duration::from_millis(number).min(never);
                self.state().away = Some(Instant::now() + time);
                return told(command);
            }
            "quit" => {
                let mut state = self.state();
                state.quits = true;
                return state.quit.iter().for_each(|quit| quit.interrupt());
            }
            other => panic!("what is {other:?}?"),
        };
        say.send(verdict).expect("somebody holds a message");
    }

    /// Whether a message is the one that is waited for.
    fn stops_at(&self, message: &Message) -> bool {
        let mut state = self.state();
        let is_next =
            state.steps.front().is_some_and(|step| step.is(state.before.as_ref(), message));
        if is_next {
            state.steps.pop_front();
        }
        state.before = Some(message.clone());
        is_next
    }
}

/// Tells the parent.
pub(crate) fn told(line: &str) {
    // At once, whatever stdout is.
    writeln!(io::stdout().lock(), "{line}").and_then(|()| io::stdout().flush()).expect("a parent");
}

/// Sends control frames, and holds one at times.
struct Holding {
    inner: Box<dyn ControlSender>,
    link: Arc<dyn Interrupt>,
    shared: Arc<Shared>,
}

impl ControlSender for Holding {
    fn send(&mut self, frame: &[u8], timeout: Duration) -> Result<(), TransportError> {
        let message = Message::decode(frame).expect("a message of this side's own");
        if !self.shared.stops_at(&message) {
            return self.inner.send(frame, timeout);
        }
        told(HELD);
        let verdicts = self.shared.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        match verdicts.recv().expect("a parent") {
            Verdict::Deliver => self.inner.send(frame, timeout),
            Verdict::Drop => {
                self.link.interrupt();
                let (operation, cause) = ("survive a test", io::ErrorKind::ConnectionReset.into());
                Err(TransportError::Lost { operation, cause })
            }
            Verdict::Then(signal) => {
                let sent = self.inner.send(frame, timeout);
                kill_process(getpid(), signal).expect("this process");
                sent
            }
        }
    }
}

fn held(
    channel: ControlChannel,
    link: &Arc<dyn Interrupt>,
    shared: &Arc<Shared>,
) -> ControlChannel {
    let (link, shared) = (Arc::clone(link), Arc::clone(shared));
    let sender = Box::new(Holding { inner: channel.sender, link, shared });
    ControlChannel { sender, receiver: channel.receiver }
}

/// Dials, unless everybody is away.
struct Dialler {
    inner: Box<dyn Connector>,
    shared: Arc<Shared>,
}

impl Connector for Dialler {
    fn connect(&mut self, purpose: LinkPurpose) -> Result<Box<dyn SourceLink>, TransportError> {
        if self.shared.state().away.is_some_and(|until| Instant::now() < until) {
            let cause = io::ErrorKind::ConnectionRefused.into();
            return Err(TransportError::Connect { address: "who is away".to_owned(), cause });
        }
        let link = self.inner.connect(purpose)?;
        let interrupt = link.interrupter();
        let (shared, known) = (Arc::clone(&self.shared), Arc::clone(&self.shared));
        known.state().channels.clear();
        let link = WrappedSource::new(link)
            .control(move |channel| held(channel, &interrupt, &shared))
            .channels(move |_, channel| {
                known.state().channels.push(channel.interrupter());
                channel
            });
        Ok(Box::new(link))
    }

    fn redials(&self) -> bool {
        self.inner.redials()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}

struct Waiter {
    inner: Box<dyn Rendezvous>,
    shared: Arc<Shared>,
}

impl Rendezvous for Waiter {
    fn accept(
        &mut self,
        purpose: LinkPurpose,
        timeout: Option<Duration>,
    ) -> Result<Box<dyn DestinationLink>, TransportError> {
        let link = self.inner.accept(purpose, timeout)?;
        let (interrupt, shared) = (link.interrupter(), Arc::clone(&self.shared));
        let link = WrappedDestination::new(link)
            .control(move |channel| held(channel, &interrupt, &shared));
        Ok(Box::new(link))
    }

    fn waits_again(&self) -> bool {
        self.inner.waits_again()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}

/// Both sides have the same.
fn guest() -> GuestConfig {
    let kind = match kvm_available() {
        Ok(()) => GuestKind::Kvm,
        Err(reason) => {
            eprintln!("faults of KVM guests skipped, because {reason}");
            GuestKind::Process
        }
    };
    GuestConfig {
        kind,
        regions: Ram::pc_regions(16 << 20),
        backing: Backing::Anonymous,
        vcpus: 1,
        cpu: None,
        workload: WorkloadConfig {
            kind: WorkloadKind::HotCold,
            working_set_bytes: 4 << 20,
            // Memory converges, and the guest is not throttled.
            dirty_rate_pages_per_second: Some(2_000),
            seed: 0x5eed,
        },
    }
}

fn options() -> RdmaOptions {
    RdmaOptions { connect_timeout: CONNECT, ..RdmaOptions::default() }
}

pub(crate) fn play(role: &str) {
    match role.split_once(' ') {
        Some((SOURCE, address)) => source(address),
        Some((DESTINATION, address)) => destination(address),
        other => panic!("what is {other:?}?"),
    }
}

/// It runs.
fn await_beats(guest: &Guest) {
    let (wanted, began) = (guest.heartbeat().beats + 2, Instant::now());
    while guest.heartbeat().beats < wanted {
        assert_eq!(guest.failure(), None);
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", guest.heartbeat());
        thread::sleep(Duration::from_millis(1));
    }
}

/// It runs, and has lost nothing.
fn check(mut guest: Guest) {
    await_beats(&guest);
    guest.pause().expect("it runs");
    let report = guest.check_oracle();
    assert!(report.ok && report.fpu_intact, "{report:?}");
}

fn source(address: &str) {
    let shared = Shared::new(Way::ToDestination);
    let mut machine = GuestMachine { guest: Guest::create(guest()).expect("room for it") };
    machine.guest.boot().expect("it boots");
    machine.guest.resume().expect("it runs");
    await_beats(&machine.guest);
    let inner = Box::new(RdmaDialler::new(address, options()));
    let connector = Box::new(Dialler { inner, shared });
    let (memory, dirty) = machine.described().expect("it tracks what is written");
    let source = Source::new().channels(2).verify(true).downtime_limit(Duration::from_secs(2));
    match source.timeouts(LIMITS).migrate(machine, &memory, dirty, connector) {
        Ok(_) => told("end AtDestination"),
        Err(failure) => {
            eprintln!("source: {}", failure.error.chain());
            match failure.guest {
                GuestAtSource::Running => {
                    check(failure.machine.guest);
                    told("end AtSource");
                }
                GuestAtSource::Uncertain => told("end Uncertain"),
                other => panic!("the guest is {other:?}"),
            }
        }
    }
}

fn destination(address: &str) {
    let shared = Shared::new(Way::ToSource);
    let acceptor = RdmaAcceptor::bind((address, 0), options()).expect("it listens");
    told(&format!("{LISTENS}{}", acceptor.local_addr()));
    loop {
        let rendezvous = acceptor.rendezvous();
        {
            let mut state = shared.state();
            if state.quits {
                return told("end Waits");
            }
            state.quit = Some(rendezvous.interrupter());
        }
        let (inner, shared) = (Box::new(rendezvous), Arc::clone(&shared));
        let rendezvous = Box::new(Waiter { inner, shared });
        let offer = match Destination::new().timeouts(LIMITS).negotiate(rendezvous) {
            Ok(offer) => offer,
            Err(error) => {
                eprintln!("destination: nobody: {}", error.chain());
                told(NOBODY);
                continue;
            }
        };
        let machine = GuestMachine { guest: Guest::create(guest()).expect("room for it") };
        let memory = machine.memory().expect("memory");
        return match offer.receive(machine, &memory) {
            Ok(arrived) => {
                assert!(arrived.verified, "memory was not compared");
                check(arrived.machine.guest);
                told("end AtDestination");
            }
            Err(failure) => {
                eprintln!("destination: {}", failure.error.chain());
                match failure.guest {
                    GuestAtDestination::AtSource => told("end AtSource"),
                    GuestAtDestination::Uncertain => told("end Uncertain"),
                    other => panic!("the guest is {other:?}"),
                }
            }
        };
    }
}
