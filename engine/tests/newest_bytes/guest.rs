//! The guest: a script, the model of what its pages hold, and a tracker that forgives nothing.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use pageferry::dirty::{DirtyBitmap, DirtyError, DirtySource};
use pageferry::memory::PageRange;
use pageferry::testing::TestMemory;
use pageferry::{Machine, MachineError};

/// Small enough that pages are written many times, in several stripes and two regions.
pub(crate) const REGION_PAGES: [u64; 2] = [1100, 70];

/// Pages that the script writes: on both sides of every bound of words, stripes and regions.
pub(crate) const PAGES: [(u16, u64); 10] = [
    (0, 0),
    (0, 63),
    (0, 64),
    (0, 511),
    (0, 512),
    (0, 1023),
    (0, 1024),
    (0, 1099),
    (1, 0),
    (1, 69),
];

/// One write of the script: which of [`PAGES`], and whether it makes it zero.
pub(crate) type Write = (usize, bool);

/// What makes a switchover take too long, so that it is called off and the guest writes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stall {
    /// The last pages do not get through, and do later.
    Pages,
    /// The machine takes its time to release what it holds, right before the commit.
    Release,
}

/// The downtime limit where there are stalls. Without, a limit that no guest meets which still has
/// something to write.
pub(crate) const LIMIT: Duration = Duration::from_millis(60);

pub(crate) struct Guest {
    pub(crate) memory: TestMemory,
    pub(crate) state: Mutex<State>,
}

pub(crate) struct State {
    /// What comes at the next steps, the last first.
    pub(crate) script: Vec<Vec<Write>>,
    /// Of the switchovers to come, the last first.
    pub(crate) stalls: Vec<Stall>,
    pub(crate) paused: bool,
    pub(crate) version: u64,
    /// The model: the version that each page holds, 0 for zero.
    pub(crate) newest: [u64; PAGES.len()],
    /// The tracker.
    pub(crate) armed: DirtyBitmap,
    pub(crate) dirty: DirtyBitmap,
}

impl Guest {
    pub(crate) fn new(script: Vec<Vec<Write>>, stalls: Vec<Stall>) -> Arc<Self> {
        let memory = TestMemory::new(&REGION_PAGES);
        let layout = memory.memory().layout().clone();
        let state = State {
            script,
            stalls,
            paused: false,
            version: 0,
            newest: [0; PAGES.len()],
            // Nothing is known of writes before the first re-arm, and nothing needs to be.
            armed: DirtyBitmap::new(&layout),
            dirty: DirtyBitmap::new(&layout),
        };
        Arc::new(Self { memory, state: Mutex::new(state) })
    }

    /// The engine is about to do something, or has done it: the guest writes.
    pub(crate) fn step(&self) {
        let mut state = self.state.lock().unwrap();
        if state.paused {
            return;
        }
        for (index, zero) in state.script.pop().unwrap_or_default() {
            let (region, page) = PAGES[index];
            state.version += 1;
            let version = if zero { 0 } else { state.version };
            write(&self.memory, index, version);
            state.newest[index] = version;
            if state.armed.get(region, page) {
                clear(&mut state.armed, region, page);
                state.dirty.set(region, page);
            }
        }
    }

    /// Takes too long if this is what the paused guest is to be held up by.
    pub(crate) fn stall(&self, stall: Stall) {
        let mut state = self.state.lock().unwrap();
        if state.paused && state.stalls.last() == Some(&stall) {
            state.stalls.pop();
            drop(state);
            thread::sleep(LIMIT);
        }
    }
}

/// Every byte of a page says its version, as far as a byte can.
pub(crate) fn write(memory: &TestMemory, index: usize, version: u64) {
    let (region, page) = PAGES[index];
    memory.write(region, page, &version.to_le_bytes().repeat(512));
}

pub(crate) fn clear(bitmap: &mut DirtyBitmap, region: u16, page: u64) {
    let word = usize::try_from(page / 64).unwrap();
    bitmap.region_words_mut(region)[word] &= !(1 << (page % 64));
}

pub(crate) struct Tracker(pub(crate) Arc<Guest>);

impl DirtySource for Tracker {
    fn name(&self) -> &'static str {
        "unforgiving"
    }

    fn start(&self) -> Result<(), DirtyError> {
        // Writes from here on are reported: the engine sends every page once anyway, and re-arms
        // it before.
        self.0.state.lock().unwrap().armed.fill();
        Ok(())
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), DirtyError> {
        self.0.step();
        into.merge(&self.0.state.lock().unwrap().dirty);
        self.0.step();
        Ok(())
    }

    fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        self.0.step();
        {
            let state = &mut *self.0.state.lock().unwrap();
            state.armed.merge_words(region, first_page, words);
            let first = usize::try_from(first_page / 64).unwrap();
            let dirty = &mut state.dirty.region_words_mut(region)[first..];
            dirty.iter_mut().zip(words).for_each(|(dirty, word)| *dirty &= !word);
        }
        self.0.step();
        Ok(())
    }

    fn put_back(&self, pages: &DirtyBitmap) -> Result<(), DirtyError> {
        self.0.state.lock().unwrap().dirty.merge(pages);
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

/// Pages that a load writes at the destination: two of the script's, one that stays as it is and one that is zero.
const LOADED: [(u16, u64); 4] = [(0, 64), (1, 69), (0, 300), (1, 33)];

/// Where the guest arrives: loading writes pages, which have what was there before again once the guest runs. So what
/// is found there in the end of an earlier load was not sent again.
#[derive(Debug)]
pub(crate) struct Arriving {
    memory: TestMemory,
    before: Vec<Vec<u8>>,
}

impl Arriving {
    pub(crate) fn new(memory: &TestMemory) -> Self {
        Self { memory: memory.clone(), before: Vec::new() }
    }
}

impl Machine for Arriving {
    fn pause(&mut self) -> Result<(), MachineError> {
        Err("it has not run".into())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        for ((region, page), before) in LOADED.into_iter().zip(&self.before) {
            self.memory.write(region, page, before);
        }
        Ok(())
    }

    fn save(&mut self, _state: &mut Vec<u8>) -> Result<(), MachineError> {
        Err("it has not run".into())
    }

    fn load(&mut self, _state: &[u8]) -> Result<(), MachineError> {
        self.before = LOADED.map(|(region, page)| self.memory.read(region, page)).to_vec();
        for (region, page) in LOADED {
            self.memory.fill_page(region, page, u64::MAX);
        }
        Ok(())
    }

    fn written_by_load(&mut self) -> Result<Vec<PageRange>, MachineError> {
        let range = |(region, first_page)| PageRange { region, first_page, pages: 1 };
        Ok(LOADED.map(range).to_vec())
    }
}

/// Pauses the script; has no state but its memory.
pub(crate) struct Scripted(pub(crate) Arc<Guest>);

impl std::fmt::Debug for Scripted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scripted")
    }
}

impl Machine for Scripted {
    fn pause(&mut self) -> Result<(), MachineError> {
        self.0.step();
        self.0.state.lock().unwrap().paused = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.0.state.lock().unwrap().paused = false;
        self.0.step();
        Ok(())
    }

    fn save(&mut self, _state: &mut Vec<u8>) -> Result<(), MachineError> {
        Ok(())
    }

    fn load(&mut self, _state: &[u8]) -> Result<(), MachineError> {
        Err("it is where it was".into())
    }

    fn release_resources(&mut self) -> Result<(), MachineError> {
        self.0.stall(Stall::Release);
        Ok(())
    }

    fn reacquire_resources(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
}
