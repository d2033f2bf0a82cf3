//! Guests of a real QEMU, moved by the library.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use pageferry::convergence::Bound;
use pageferry::dirty::{DirtySource, DirtySources};
use pageferry::memory::{GuestMemory, PageRange};
use pageferry::transport::OneLink;
use pageferry::{
    Arrived, Departed, Destination, DestinationFailure, Error, Event, GuestAtDestination,
    GuestAtSource, Machine, MachineError, Source, SourceFailure,
};
use pageferry_qemu::ram::{self, Made};
use pageferry_qemu::testing::{Console, Guests, Running};
use pageferry_qemu::{QemuCommand, QemuDestination, QemuSource, Qmp};
use pageferry_rust_vmm::{ForeignPagemapScan, ForeignProcess, ForeignUserfaultfd, PagemapScan};
use pageferry_tcp::{TcpAcceptor, TcpOptions, connect};

use crate::commands::{Heard, has_kvm};

/// Pages that the guest writes, over and over.
const PAGES: u32 = 8192;

type Sent = Result<Departed<QemuSource>, Box<SourceFailure<QemuSource>>>;
type Received<M> = Result<Arrived<M>, Box<DestinationFailure<M>>>;

/// Long enough for a busy machine to meet.
const LIMIT: Duration = Duration::from_secs(2);

/// A guest that runs on one host, and what it takes to move it to another.
struct Scene {
    guests: Guests,
    source: Running,
    qmp: Arc<Qmp>,
    here: Heard,
    there: Console,
}

impl Scene {
    /// Says so if there can be none here.
    fn start() -> Option<Self> {
        Self::by("tcg")
    }

    fn by(accelerator: &'static str) -> Option<Self> {
        if let Err(error) = PagemapScan::supported() {
            eprintln!("skipped, because pages cannot be tracked here: {error}");
            return None;
        }
        let mut guests = Guests::bare(PAGES)?;
        guests.accelerator = accelerator;
        let (here, there) = (Heard::of(Console::of(&guests, "a")), Console::of(&guests, "b"));
        let source = Running::start(&guests, "a").unwrap();
        let qmp = Arc::new(source.connect().unwrap());
        here.next();
        Some(Self { guests, source, qmp, here, there })
    }

    /// Moves the guest, with what is written tracked or not, to a machine that `home` makes of a QEMU that waits.
    fn play<M: Machine + Send>(
        &self,
        source: Source,
        tracked: bool,
        home: impl FnOnce(QemuDestination) -> M + Send,
    ) -> (Sent, Received<M>) {
        let acceptor = TcpAcceptor::bind("127.0.0.1:0", TcpOptions::default()).unwrap();
        let address = acceptor.local_addr();
        let command = QemuCommand {
            program: "qemu-system-x86_64".into(),
            arguments: self.guests.arguments("b"),
        };
        let memory = ram::map(&ram::backends_of(&self.qmp).unwrap()).unwrap();
        let sources = if tracked { self.trackers(&memory) } else { Vec::new() };
        let machine = QemuSource::new(Arc::clone(&self.qmp)).unwrap();
        thread::scope(|scope| {
            let receiving = scope.spawn(|| {
                let link = acceptor.accept(None).unwrap();
                let offer =
                    Destination::new().negotiate(OneLink::destination(Box::new(link))).unwrap();
                let made = Made::create(&[self.guests.path("b.ram")]).unwrap();
                let mut machine = QemuDestination::start(command, made).unwrap();
                let backends = ram::backends_of(machine.qmp().unwrap()).unwrap();
                let memory = machine.map(&backends).unwrap();
                offer.receive(home(machine), &memory)
            });
            let link = connect(address, TcpOptions::default()).unwrap();
            let source = source.verify(true).downtime_limit(LIMIT);
            let sources = DirtySources::new(sources);
            let sent = source.migrate(machine, &memory, sources, OneLink::source(Box::new(link)));
            (sent, receiving.join().unwrap())
        })
    }

    /// The guest's QEMU at the destination, which would outlive the test.
    fn end_with_this(&self, machine: QemuDestination) -> (Running, Arc<Qmp>) {
        let (child, qmp) = machine.keep().unwrap();
        (Running { child, monitor: self.guests.path("b.qmp") }, qmp)
    }

    fn trackers(&self, memory: &GuestMemory) -> Vec<Box<dyn DirtySource>> {
        assert_eq!(self.qmp.peer_pid().unwrap(), self.source.child.id());
        let process = ForeignProcess::open(self.source.child.id()).unwrap();
        let made_in = ForeignUserfaultfd::made_in;
        vec![Box::new(ForeignPagemapScan::new(process, memory, made_in).unwrap())]
    }
}

#[test]
fn a_guest_moves() {
    let Some(mut scene) = Scene::start() else { return };
    let before = scene.here.await_pass();
    let (source, destination) =
        scene.play(Source::new().bound(Bound::BestEffort), true, |home| home);
    let departed = source.map_err(|failed| failed.error).unwrap();
    let arrived = destination.map_err(|failed| failed.error).unwrap();
    eprintln!("{:#?}", departed.statistics.downtime);
    let state = scene.qmp.run_state().unwrap();
    assert_eq!((&*state.status, state.running), ("postmigrate", false));
    let (_there, qmp) = scene.end_with_this(arrived.machine);
    assert!(qmp.run_state().unwrap().running);
    // Whole passes there, over pages that were written here.
    let passes = [scene.there.pass(), scene.there.pass(), scene.there.pass()];
    assert!(passes[0] > before, "pass {before} here, and then {passes:?} there");
}

/// The same with its writes tracked by nobody: memory differs, it is told, and the guest goes on where it was.
#[test]
fn a_guest_whose_writes_nobody_tracks_does_not_leave() {
    let Some(scene) = Scene::start() else { return };
    let ram = scene.guests.path("a.ram");
    // Something is written after it was sent, however busy this machine is.
    let source = Source::new().bound(Bound::BestEffort).on_event(move |event| {
        if matches!(event, Event::RoundFinished { .. }) {
            let before = std::fs::read(&ram).unwrap();
            while std::fs::read(&ram).unwrap() == before {}
        }
    });
    let (source, destination) = scene.play(source, false, |home| home);
    let failed = source.map(|_| ()).unwrap_err();
    assert!(matches!(failed.error, Error::MemoryDiffers { .. }), "{}", failed.error);
    assert!(matches!(failed.guest, GuestAtSource::Running), "{:?}", failed.guest);
    let there = destination.map(|_| ()).unwrap_err();
    assert_eq!(there.guest, GuestAtDestination::AtSource);
    drop(there);
    assert!(!scene.guests.path("b.ram").exists(), "the RAM of a guest that did not come is left");
    scene.here.await_pass();
}

/// A destination whose first load is over when the source waits no longer for it.
struct Late {
    inner: QemuDestination,
    called_off: Option<Receiver<()>>,
}

impl Machine for Late {
    fn pause(&mut self) -> Result<(), MachineError> {
        self.inner.pause()
    }
    fn resume(&mut self) -> Result<(), MachineError> {
        self.inner.resume()
    }
    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), MachineError> {
        self.inner.save(state)
    }
    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        self.inner.load(state)?;
        match self.called_off.take() {
            Some(called_off) => Ok(called_off.recv_timeout(Duration::from_secs(60))?),
            None => Ok(()),
        }
    }
    fn written_by_load(&mut self) -> Result<Vec<PageRange>, MachineError> {
        self.inner.written_by_load()
    }
    fn unload(&mut self) -> Result<(), MachineError> {
        self.inner.unload()
    }
}

/// QEMU goes on at the source although it has saved its state, and another QEMU takes it at the destination.
fn moves_after_a_switchover_that_was_called_off(mut scene: Scene) {
    let (tell, called_off) = mpsc::channel();
    let source = Source::new().on_event(move |event| {
        if matches!(event, Event::CalledOff { .. }) {
            let _ = tell.send(());
        }
    });
    let late = |inner| Late { inner, called_off: Some(called_off) };
    let (source, destination) = scene.play(source, true, late);
    let departed = source.map_err(|failed| failed.error).unwrap();
    let arrived = destination.map_err(|failed| failed.error).unwrap();
    assert!(departed.statistics.switchover_attempts > 1);
    let (_there, qmp) = scene.end_with_this(arrived.machine.inner);
    assert!(qmp.run_state().unwrap().running);
    let passes = [scene.there.pass(), scene.there.pass()];
    assert!(passes[1] > passes[0], "{passes:?}");
}

#[test]
fn a_guest_moves_after_a_switchover_that_was_called_off() {
    if let Some(scene) = Scene::start() {
        moves_after_a_switchover_that_was_called_off(scene);
    }
}

/// With KVM, where what QEMU writes as it loads is of a Linux guest's, which this one is not.
#[test]
fn a_guest_with_kvm_moves_after_a_switchover_that_was_called_off() {
    if has_kvm()
        && let Some(scene) = Scene::by("kvm")
    {
        moves_after_a_switchover_that_was_called_off(scene);
    }
}
