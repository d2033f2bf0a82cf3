//! A process that is migrated while it reads with `O_DIRECT`.

use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use pageferry::convergence::Bound;
use pageferry::dirty::{DirtyBitmap, DirtyError, DirtySource, DirtySources};
use pageferry::memory::GuestMemory;
use pageferry::testing::memory_transport;
use pageferry::transport::OneLink;
use pageferry::{Destination, Error, Machine, MachineError, Source};
use pageferry_rust_vmm::{DirectWrites, PagemapScan};

use super::{Disk, READ_BYTES, READ_PAGES, anonymous};

/// A process that reads a file to one place after the other, from the first harvest on. To each just
/// once, so that nothing makes good what was lost.
struct Process {
    memory: Arc<GuestMemory>,
    direct: Option<DirectWrites>,
    disk: Disk,
    /// Held while a read begins, and to its end where nobody is told of it.
    running: Mutex<bool>,
    reads: Mutex<Reads>,
    changed: Condvar,
}

#[derive(PartialEq, Eq)]
enum Reads {
    /// None is under way, and there will be one.
    Awaited,
    UnderWay,
    /// There will be none.
    Over,
}

/// Places to read to.
const PLACES: u64 = 64;

/// Migrations until one must have lost something. On CPUs with six busy loops 127 of 200 did; before harvests waited
/// for reads, 4 of 60.
const MIGRATIONS: usize = 20;

impl Process {
    fn new(disk: Disk, told: bool) -> Arc<Self> {
        let memory = anonymous(usize::try_from(PLACES).unwrap() * READ_BYTES);
        let direct = told.then(|| DirectWrites::new(&memory));
        Arc::new(Self {
            memory,
            direct,
            disk,
            running: Mutex::new(true),
            reads: Mutex::new(Reads::Awaited),
            changed: Condvar::new(),
        })
    }

    fn say(&self, reads: Reads) {
        *self.reads.lock().unwrap() = reads;
        self.changed.notify_all();
    }

    /// Returns when one is under way, if there is to be one.
    fn await_a_read(&self) {
        let reads = self.reads.lock().unwrap();
        drop(self.changed.wait_while(reads, |reads| *reads == Reads::Awaited).unwrap());
    }

    fn read_all(&self) {
        self.read_while_it_runs();
        self.say(Reads::Over);
    }

    fn read_while_it_runs(&self) {
        for place in 0..PLACES {
            let mut running = Some(self.running.lock().unwrap());
            if running.as_deref() == Some(&false) {
                return;
            }
            let write = self.direct.as_ref().map(|direct| {
                running = None;
                direct.begin(place * READ_BYTES as u64, READ_BYTES as u64).unwrap()
            });
            self.say(Reads::UnderWay);
            self.disk.read(&self.memory, place * u64::from(READ_PAGES), place);
            self.say(Reads::Awaited);
            drop((write, running));
        }
    }
}

/// A tracker that lets the process begin when it harvests first, and harvests while a read is under way.
struct IntoReads {
    tracker: PagemapScan,
    process: Arc<Process>,
    begin: Mutex<Option<mpsc::Sender<()>>>,
}

impl DirtySource for IntoReads {
    fn name(&self) -> &'static str {
        self.tracker.name()
    }

    fn start(&self) -> Result<(), DirtyError> {
        self.tracker.start()
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), DirtyError> {
        self.begin.lock().unwrap().take();
        self.process.await_a_read();
        self.tracker.harvest(into)
    }

    fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        self.tracker.rearm(region, first_page, words)
    }

    fn put_back(&self, pages: &DirtyBitmap) -> Result<(), DirtyError> {
        self.tracker.put_back(pages)
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.tracker.stop()
    }
}

/// At the destination there is none.
struct Vm(Option<Arc<Process>>);

impl Machine for Vm {
    fn pause(&mut self) -> Result<(), MachineError> {
        let process = self.0.as_ref().ok_or("no process")?;
        *process.running.lock().unwrap() = false;
        match &process.direct {
            Some(direct) => Ok(direct.wait(Duration::from_secs(60))?),
            None => Ok(()),
        }
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn save(&mut self, _: &mut Vec<u8>) -> Result<(), MachineError> {
        Ok(())
    }

    fn load(&mut self, _: &[u8]) -> Result<(), MachineError> {
        Ok(())
    }
}

/// Migrates such a process, with rounds for as long as it reads, and has memory compared.
fn migrate(disk: Disk, told: bool) -> Result<(), Error> {
    let process = Process::new(disk, told);
    let (begin, wait) = mpsc::channel();
    let tracker = IntoReads {
        tracker: PagemapScan::new(Arc::clone(&process.memory)),
        process: Arc::clone(&process),
        begin: Mutex::new(Some(begin)),
    };
    let mut sources: Vec<Box<dyn DirtySource>> = vec![Box::new(tracker)];
    let direct = process.direct.clone().map(|direct| -> Box<dyn DirtySource> { Box::new(direct) });
    sources.extend(direct);
    let there = anonymous(usize::try_from(PLACES).unwrap() * READ_BYTES);
    let (here_link, there_link) = memory_transport::pair();
    thread::scope(|scope| {
        let reading = Arc::clone(&process);
        scope.spawn(move || {
            assert!(wait.recv().is_err(), "just dropped");
            reading.read_all();
        });
        let receiving = scope.spawn(|| {
            let offer =
                Destination::new().negotiate(OneLink::destination(Box::new(there_link))).unwrap();
            offer.receive(Vm(None), &there).is_ok()
        });
        let migrated = Source::new()
            .verify(true)
            .downtime_limit(Duration::from_millis(1))
            .bound(Bound::BestEffort)
            .max_rounds(10_000)
            .migrate(
                Vm(Some(Arc::clone(&process))),
                &process.memory,
                DirtySources::new(sources),
                OneLink::source(Box::new(here_link)),
            );
        assert_eq!(receiving.join().unwrap(), migrated.is_ok());
        migrated.map(drop).map_err(|failed| failed.error)
    })
}

#[test]
fn a_process_with_direct_reads_is_migrated() {
    if let Err(error) = PagemapScan::supported() {
        return eprintln!("skipped, because pages cannot be tracked here: {error}");
    }
    for _ in 0..3 {
        let Some(disk) = Disk::new("told") else { return };
        migrate(disk, true).unwrap();
    }
    // And if nobody is told of them, verification finds what nobody saw.
    for _ in 0..MIGRATIONS {
        let Some(disk) = Disk::new("not-told") else { return };
        match migrate(disk, false) {
            Ok(()) => {}
            Err(Error::MemoryDiffers { .. }) => return,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the tracker sees reads with O_DIRECT by itself, after all: say so");
}
