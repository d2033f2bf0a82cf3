//! A guest made of threads, for tests of the engine: it writes to its memory and marks what it
//! wrote in a bitmap of its own.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pageferry::dirty::{DirtyBitmap, DirtyError, DirtySource};
use pageferry::memory::PAGE_BYTES;
use pageferry::testing::{Random, TestMemory};
use pageferry::{GuestAlarm, Machine, MachineError, Rehearsal};

/// Dirty bits that are forgotten when harvested, as a bitmap that is swapped out would.
pub(crate) struct SoftwareLog {
    bits: Mutex<DirtyBitmap>,
    /// How often the guest has written.
    pub(crate) marks: AtomicU64,
    pub(crate) tracking: AtomicBool,
    pub(crate) put_back: Mutex<DirtyBitmap>,
}

impl SoftwareLog {
    pub(crate) fn new(memory: &TestMemory) -> Arc<Self> {
        let clean = DirtyBitmap::new(memory.memory().layout());
        Arc::new(Self {
            bits: Mutex::new(clean.clone()),
            marks: AtomicU64::new(0),
            tracking: AtomicBool::new(false),
            put_back: Mutex::new(clean),
        })
    }

    pub(crate) fn mark(&self, region: u16, page: u64) {
        self.bits.lock().unwrap().set(region, page);
        self.marks.fetch_add(1, Ordering::SeqCst);
    }
}

/// The engine's view of a shared log.
pub(crate) struct SharedLog(pub(crate) Arc<SoftwareLog>);

impl DirtySource for SharedLog {
    fn name(&self) -> &'static str {
        "software log"
    }

    fn start(&self) -> Result<(), DirtyError> {
        assert!(!self.0.tracking.swap(true, Ordering::SeqCst), "started twice");
        Ok(())
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), DirtyError> {
        let mut bits = self.0.bits.lock().unwrap();
        into.merge(&bits);
        bits.clear();
        Ok(())
    }

    fn rearm(&self, _region: u16, _first_page: u64, _words: &[u64]) -> Result<(), DirtyError> {
        Ok(())
    }

    fn put_back(&self, pages: &DirtyBitmap) -> Result<(), DirtyError> {
        self.0.put_back.lock().unwrap().merge(pages);
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        assert!(self.0.tracking.swap(false, Ordering::SeqCst), "stopped without start");
        Ok(())
    }
}

#[derive(Default)]
struct Control {
    run: bool,
    parked: bool,
    quit: bool,
}

struct Inner {
    memory: TestMemory,
    log: Arc<SoftwareLog>,
    control: Mutex<Control>,
    changed: Condvar,
    writes: AtomicU64,
}

/// What test machines say of their state: one number.
pub(crate) const SCHEMA: &[u8] = b"writes: u64";

/// What a test wants a machine to refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refuse {
    Nothing,
    Schema,
    Rehearse,
    Pause,
    Save,
    Load,
    Release,
    /// Gives the lock up, and says that it failed.
    ReleaseHalfWay,
    Reacquire,
    /// Takes the lock, and says that it failed.
    ReacquireHalfWay,
    Resume,
    ResumeAndRelease,
}

/// What only one host may hold, such as the lock of a disk: which machine has it.
type Lock = Arc<Mutex<Option<usize>>>;

pub(crate) struct TestMachine {
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
    pub(crate) refuse: Refuse,
    /// Whether somebody has paused it and wants it to stay so.
    pub(crate) paused: bool,
    /// Whether it panics where it is to refuse.
    pub(crate) panics: bool,
    lock: Lock,
    /// What it was given to tell that the guest has ended.
    pub(crate) alarm: Arc<Mutex<Option<GuestAlarm>>>,
    /// Since when it stands still, and how long it did at most after it had run.
    stands_since: Option<Instant>,
    pub(crate) longest_standstill: Duration,
    pub(crate) resumed_at: Option<Instant>,
    /// How often it was let run.
    pub(crate) resumes: u32,
    pub(crate) loaded: Option<u64>,
    /// What a rehearsal says of the device state.
    pub(crate) state_bytes: u64,
}

impl TestMachine {
    /// A paused guest that, once resumed, rewrites random pages among the first `working_set`
    /// of region 0, and now and then makes one zero.
    pub(crate) fn new(
        memory: &TestMemory,
        log: &Arc<SoftwareLog>,
        working_set: u64,
        seed: u64,
    ) -> Self {
        let inner = Arc::new(Inner {
            memory: memory.clone(),
            log: Arc::clone(log),
            control: Mutex::default(),
            changed: Condvar::new(),
            writes: AtomicU64::new(0),
        });
        let theirs = Arc::clone(&inner);
        let thread = std::thread::spawn(move || write_pages(&theirs, working_set, seed));
        let lock = Arc::new(Mutex::new(Some(identity(&inner))));
        Self {
            inner,
            thread: Some(thread),
            refuse: Refuse::Nothing,
            paused: false,
            panics: false,
            lock,
            alarm: Arc::default(),
            stands_since: None,
            longest_standstill: Duration::ZERO,
            resumed_at: None,
            resumes: 0,
            loaded: None,
            state_bytes: 8,
        }
    }

    /// Contends from now on for the lock that the other one holds.
    pub(crate) fn contend_with(&mut self, other: &Self) {
        self.lock = Arc::clone(&other.lock);
    }

    pub(crate) fn holds_lock(&self) -> bool {
        *self.lock.lock().unwrap() == Some(identity(&self.inner))
    }

    pub(crate) fn writes(&self) -> u64 {
        self.inner.writes.load(Ordering::SeqCst)
    }

    pub(crate) fn is_running(&self) -> bool {
        self.inner.control.lock().unwrap().run
    }

    /// Waits until the guest has written more: it really runs.
    pub(crate) fn await_writes(&self) {
        let before = self.writes();
        while self.writes() < before + 10 {
            std::thread::yield_now();
        }
    }

    fn refuse(&self, what: Refuse) -> Result<(), MachineError> {
        if self.refuse == what {
            assert!(!self.panics, "{what:?} panics as the test wants");
            Err(format!("{what:?} refused by the test").into())
        } else {
            Ok(())
        }
    }

    fn set_running(&self, run: bool) {
        let mut control = self.inner.control.lock().unwrap();
        control.run = run;
        self.inner.changed.notify_all();
        while !run && !control.parked {
            control = self.inner.changed.wait(control).unwrap();
        }
    }
}

fn identity(inner: &Arc<Inner>) -> usize {
    Arc::as_ptr(inner).addr()
}

fn write_pages(inner: &Inner, working_set: u64, seed: u64) {
    let mut random = Random::new(seed);
    loop {
        {
            let mut control = inner.control.lock().unwrap();
            while !control.run && !control.quit {
                control.parked = true;
                inner.changed.notify_all();
                control = inner.changed.wait(control).unwrap();
            }
            control.parked = false;
            if control.quit {
                return;
            }
        }
        let page = random.below(working_set);
        if random.below(8) == 0 {
            inner.memory.write(0, page, &vec![0; usize::try_from(PAGE_BYTES).unwrap()]);
        } else {
            inner.memory.fill_page(0, page, random.next_u64());
        }
        // Marked after the write, as a CPU does: who harvests before the mark reads again.
        inner.log.mark(0, page);
        inner.writes.fetch_add(1, Ordering::SeqCst);
    }
}

impl Machine for TestMachine {
    fn pause(&mut self) -> Result<(), MachineError> {
        self.refuse(Refuse::Pause)?;
        self.set_running(false);
        self.stands_since = Some(Instant::now());
        Ok(())
    }

    fn is_paused(&self) -> bool {
        self.paused
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.refuse(Refuse::Resume)?;
        self.refuse(Refuse::ResumeAndRelease)?;
        self.resumes += 1;
        assert!(self.holds_lock(), "resumed without the lock");
        self.set_running(true);
        self.resumed_at = Some(Instant::now());
        let stood = self.stands_since.take().map(|since| since.elapsed()).unwrap_or_default();
        self.longest_standstill = self.longest_standstill.max(stood);
        Ok(())
    }

    fn save(&mut self, state: &mut Vec<u8>) -> Result<(), MachineError> {
        self.refuse(Refuse::Save)?;
        // Saving dirties memory, as real devices do.
        let last = self.inner.memory.memory().layout().regions()[0].pages() - 1;
        self.inner.memory.fill_page(0, last, self.writes());
        self.inner.log.mark(0, last);
        state.extend_from_slice(&self.writes().to_le_bytes());
        Ok(())
    }

    fn state_schema(&self) -> Result<Vec<u8>, MachineError> {
        self.refuse(Refuse::Schema)?;
        Ok(SCHEMA.to_vec())
    }

    fn check_state_schema(&self, source: &[u8]) -> Result<(), MachineError> {
        self.refuse(Refuse::Schema)?;
        if source == SCHEMA { Ok(()) } else { Err(format!("{source:?} came").into()) }
    }

    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        self.refuse(Refuse::Load)?;
        assert_eq!(self.loaded, None, "loaded again, and not unloaded before");
        self.loaded = Some(u64::from_le_bytes(state.try_into()?));
        Ok(())
    }

    fn unload(&mut self) -> Result<(), MachineError> {
        self.loaded.take().map(drop).ok_or_else(|| "unloaded, and not loaded before".into())
    }

    fn set_alarm(&mut self, alarm: GuestAlarm) {
        *self.alarm.lock().unwrap() = Some(alarm);
    }

    fn rehearse(&mut self) -> Result<Option<Rehearsal>, MachineError> {
        assert!(self.is_running(), "a rehearsal of a guest that stands still");
        self.refuse(Refuse::Rehearse)?;
        let state_bytes = self.state_bytes;
        Ok(Some(Rehearsal { state_bytes, save: Duration::from_millis(1), ..Rehearsal::default() }))
    }

    fn release_resources(&mut self) -> Result<(), MachineError> {
        self.refuse(Refuse::Release)?;
        self.refuse(Refuse::ResumeAndRelease)?;
        if self.holds_lock() {
            *self.lock.lock().unwrap() = None;
        }
        self.refuse(Refuse::ReleaseHalfWay)
    }

    fn reacquire_resources(&mut self) -> Result<(), MachineError> {
        self.refuse(Refuse::Reacquire)?;
        let mut holder = self.lock.lock().unwrap();
        if holder.is_some_and(|holder| holder != identity(&self.inner)) {
            return Err("the other host holds the lock".into());
        }
        *holder = Some(identity(&self.inner));
        drop(holder);
        self.refuse(Refuse::ReacquireHalfWay)
    }
}

impl std::fmt::Debug for TestMachine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TestMachine").field("running", &self.is_running()).finish()
    }
}

impl Drop for TestMachine {
    fn drop(&mut self) {
        self.inner.control.lock().unwrap().quit = true;
        self.inner.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
