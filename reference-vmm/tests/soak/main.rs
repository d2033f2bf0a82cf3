//! One guest that moves back and forth within one process, again and again, with faults in a tenth of the moves:
//! nothing of a move stays behind, and the guest's time never goes back (its oracle looks).
//!
//! `PAGEFERRY_MOVES=1000` for more of them (`ci/soak --moves`), `PAGEFERRY_SEED=N` for the same ones again. A process of
//! its own: what it has open is counted.

#[expect(dead_code, reason = "what guest tests share")]
#[path = "../guest/common.rs"]
mod common;

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pageferry::testing::Random;
use pageferry::transport::{
    Connector, Interrupt, LinkPurpose, Rendezvous, SourceLink, TransportError,
};
use pageferry::{Destination, Event, GuestAtSource, Source};
use pageferry_iouring::{IoUringOptions, Rings};
use pageferry_tcp::{TcpAcceptor, TcpDialler, TcpOptions};
use pageferry_vmm::embed::GuestMachine;
use pageferry_vmm::guest::Guest;
use pageferry_vmm::workload::WorkloadKind;

use common::{assert_ok, booted, config, kinds, wait_for_beats};

const MOVES: u64 = 60;
/// Moves after which all is there that stays: arenas, caches, what is made once.
const WARM: u64 = 20;
/// Between looks at the guest's memory and at what the process has.
const EVERY: u64 = 20;

/// What may happen to a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The link is lost, and comes back.
    LinkLost,
    /// Somebody cancels it.
    Cancelled,
    /// The destination does not take the guest.
    Declined,
    /// Nobody listens any more.
    Unreachable,
}

const FAULTS: [Fault; 4] = [Fault::LinkLost, Fault::Cancelled, Fault::Declined, Fault::Unreachable];

/// What a process has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Footprint {
    descriptors: usize,
    threads: usize,
    mappings: usize,
    resident_kib: usize,
}

impl Footprint {
    fn now() -> Self {
        let entries = |path| std::fs::read_dir(path).expect("of this process").count();
        let status = std::fs::read_to_string("/proc/self/status").expect("of this process");
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.and_then(|line| line.trim().strip_suffix(" kB"));
        Self {
            descriptors: entries("/proc/self/fd"),
            threads: entries("/proc/self/task"),
            mappings: std::fs::read_to_string("/proc/self/maps").expect("maps").lines().count(),
            resident_kib: resident.and_then(|kib| kib.parse().ok()).expect("a number"),
        }
    }

    /// What is counted is the same; of memory, allocators may keep a little more or less.
    fn assert_like(&self, before: &Self, moves: u64) {
        let told = format!("{self:?} after {moves} moves, {before:?} before");
        assert_eq!(self.descriptors, before.descriptors, "{told}");
        assert_eq!(self.threads, before.threads, "{told}");
        assert!(self.mappings <= before.mappings + before.mappings / 10 + 8, "{told}");
        assert!(self.resident_kib <= before.resident_kib + before.resident_kib / 5, "{told}");
    }
}

/// Dials, and keeps what ends the link.
struct Watched {
    inner: Box<dyn Connector>,
    link: Arc<Mutex<Option<Arc<dyn Interrupt>>>>,
}

impl Connector for Watched {
    fn connect(&mut self, purpose: LinkPurpose) -> Result<Box<dyn SourceLink>, TransportError> {
        let link = self.inner.connect(purpose)?;
        let mut watched = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        *watched = Some(link.interrupter());
        Ok(link)
    }

    fn redials(&self) -> bool {
        self.inner.redials()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}

/// Moves a guest once. It runs afterwards, there or, after a fault, here.
fn step(machine: GuestMachine, rings: Option<&Rings>, fault: Option<Fault>) -> GuestMachine {
    let guest = machine.guest.config().clone();
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", TcpOptions::default()).expect("a port");
    let options = TcpOptions { connect_timeout: Duration::from_secs(1), ..TcpOptions::default() };
    let dialler = TcpDialler::new(acceptor.local_addr().to_string(), options);
    let (connector, rendezvous): (Box<dyn Connector>, Box<dyn Rendezvous>) = match rings {
        Some(rings) => {
            (Box::new(rings.dialler(dialler)), Box::new(rings.rendezvous(acceptor.rendezvous())))
        }
        None => (Box::new(dialler), Box::new(acceptor.rendezvous())),
    };
    let link = Arc::new(Mutex::new(None::<Arc<dyn Interrupt>>));
    let connector = Box::new(Watched { inner: connector, link: Arc::clone(&link) });
    let source = Source::new().channels(2).verify(true).downtime_limit(Duration::from_secs(10));
    let handle = source.handle();
    let mut to_lose = Some(());
    let source = source.on_event(move |event| match (fault, event) {
        (Some(Fault::LinkLost), Event::RoundStarted { round: 1, .. }) => {
            // Once: the round begins again on the next link.
            let first = to_lose.take();
            let link = link.lock().unwrap_or_else(PoisonError::into_inner);
            if let (Some(()), Some(link)) = (first, &*link) {
                link.interrupt();
            }
        }
        (Some(Fault::Cancelled), Event::GuestPaused) => handle.cancel(),
        _ => {}
    });
    let (memory, dirty) = machine.described().expect("it tracks what is written");
    thread::scope(|scope| {
        let receiving = (fault != Some(Fault::Unreachable)).then(|| {
            scope.spawn(|| {
                let offer = Destination::new().negotiate(rendezvous).expect("a source greets");
                if fault == Some(Fault::Declined) {
                    offer.decline("not today");
                    return None;
                }
                let machine = GuestMachine { guest: Guest::create(guest).expect("room for it") };
                let memory = machine.memory().expect("memory");
                offer.receive(machine, &memory).ok().map(|arrived| arrived.machine)
            })
        });
        if receiving.is_none() {
            drop(acceptor);
        }
        let left = source.migrate(machine, &memory, dirty, connector);
        let arrived = receiving.and_then(|thread| thread.join().expect("no panic"));
        match (left, arrived) {
            (Ok(departed), Some(arrived)) => {
                let returns = u32::from(fault == Some(Fault::LinkLost));
                assert_eq!(departed.statistics.rejoins, returns, "{fault:?}");
                arrived
            }
            (Err(failure), None) => {
                let expected = fault.is_some_and(|fault| fault != Fault::LinkLost);
                assert!(expected, "{fault:?}: {}", failure.error.chain());
                assert!(matches!(failure.guest, GuestAtSource::Running), "{fault:?}");
                failure.machine
            }
            (left, arrived) => {
                let left = left.map(drop).map_err(|failure| failure.error.chain().to_string());
                panic!("{fault:?}: {left:?} here, and there {}", arrived.is_some())
            }
        }
    })
}

#[test]
fn nothing_of_a_move_stays_behind() {
    let number = |name, default| {
        std::env::var(name).ok().and_then(|number| number.parse().ok()).unwrap_or(default)
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let (moves, seed) =
        (number("PAGEFERRY_MOVES", MOVES), number("PAGEFERRY_SEED", now.subsec_nanos().into()));
    let rings = Rings::new(IoUringOptions::default());
    if let Err(error) = &rings {
        eprintln!("nothing_of_a_move_stays_behind: moves over io_uring skipped, because {error}");
    }
    let kind = kinds()[0];
    eprintln!("{moves} moves of a {kind} guest, PAGEFERRY_SEED={seed}");
    let mut random = Random::new(seed);
    let mut machine = GuestMachine { guest: booted(config(kind, WorkloadKind::HotCold, 2)) };
    machine.guest.resume().expect("it runs");
    let (mut before, mut faults) = (None, [0; FAULTS.len()]);
    for number in 1..=moves {
        let rings = rings.as_ref().ok().filter(|_| number % 2 == 0);
        // One that always happens in so many, and each of them.
        let dice = random.next_u64();
        let fault = dice.is_multiple_of(10).then(|| dice / 10 % FAULTS.len() as u64);
        let fault = fault.and_then(|index| usize::try_from(index).ok());
        if let Some(index) = fault {
            faults[index] += 1;
        }
        machine = step(machine, rings, fault.map(|index| FAULTS[index]));
        wait_for_beats(&machine.guest, 2);
        if number % EVERY == 0 {
            machine.guest.pause().expect("it runs");
            assert_ok(&machine.guest);
            // A thread that was joined is in the list for a moment longer.
            let began = Instant::now();
            let mut footprint = Footprint::now();
            while let Some(Footprint { threads, .. }) = before
                && footprint.threads > threads
                && began.elapsed() < Duration::from_secs(5)
            {
                footprint = Footprint::now();
            }
            match &before {
                Some(before) => footprint.assert_like(before, number),
                None if number >= WARM => before = Some(footprint),
                None => {}
            }
            machine.guest.resume().expect("it was paused");
        }
    }
    let told = FAULTS.iter().zip(faults).map(|(fault, count)| format!("{fault:?}: {count}"));
    eprintln!(
        "{}; {before:?} before, {:?} after",
        told.collect::<Vec<_>>().join(", "),
        Footprint::now()
    );
}
