//! A sender's round over a link of a given speed, whose calls are noted.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::dirty::{DirtyBitmap, DirtyError, DirtySource, DirtySources};
use pageferry::memory::{GuestMemory, PAGE_BYTES};
use pageferry::testing::hot::send_round;
use pageferry::transport::{
    ChannelCounters, Interrupt, PageSender, Run, RunKind, Ticket, TransportError, Watermarks,
};

use crate::links::{NOWHERE, Nobody};

/// A call that re-armed.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) first_page: u64,
    pub(super) words: Vec<u64>,
    pub(super) took: Duration,
}

/// The calls of a round of one sender, and how long the round took.
pub(super) fn round(
    memory: &Arc<GuestMemory>,
    dirty: &DirtyBitmap,
    tracker: &Arc<DirtySources>,
    gigabits: f64,
) -> (Vec<Call>, Duration) {
    let calls = Arc::new(Mutex::new(Vec::new()));
    let noted = Noted { tracker: Arc::clone(tracker), calls: Arc::clone(&calls) };
    let paced = Paced { bytes_per_second: gigabits * 1e9 / 8.0, ticket: 0, due: None };
    let sources = DirtySources::new(vec![Box::new(noted)]);
    let began = Instant::now();
    send_round(memory, dirty, sources, Box::new(paced), NOWHERE, NOWHERE.max_batch_bytes);
    let took = began.elapsed();
    let calls = std::mem::take(&mut *calls.lock().unwrap_or_else(PoisonError::into_inner));
    (calls, took)
}

/// Passes re-arming on, and notes it.
struct Noted {
    tracker: Arc<DirtySources>,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl DirtySource for Noted {
    fn name(&self) -> &'static str {
        "noted"
    }

    fn start(&self) -> Result<(), DirtyError> {
        self.tracker.start()
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), DirtyError> {
        self.tracker.harvest(into)
    }

    fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        let began = Instant::now();
        self.tracker.rearm(region, first_page, words)?;
        let call = Call { first_page, words: words.to_vec(), took: began.elapsed() };
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).push(call);
        Ok(())
    }

    fn put_back(&self, pages: &DirtyBitmap) -> Result<(), DirtyError> {
        self.tracker.put_back(pages)
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.tracker.stop()
    }
}

/// Takes a batch when the one before has gone out.
#[derive(Debug)]
struct Paced {
    bytes_per_second: f64,
    ticket: Ticket,
    due: Option<Instant>,
}

impl PageSender for Paced {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        let data = runs.iter().filter(|run| run.kind == RunKind::Data);
        let pages = data.map(|run| u64::from(run.range.pages)).sum::<u64>();
        let takes = (pages * PAGE_BYTES) as f64 / self.bytes_per_second;
        let now = Instant::now();
        let due = self.due.unwrap_or(now);
        thread::sleep(due.saturating_duration_since(now));
        self.due = Some(due + Duration::from_secs_f64(takes));
        self.ticket += 1;
        Ok(self.ticket)
    }

    fn watermarks(&mut self, _: Option<Duration>) -> Result<Watermarks, TransportError> {
        Ok(Watermarks { released: self.ticket, landed: self.ticket })
    }

    fn counters(&self) -> ChannelCounters {
        ChannelCounters::default()
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        let due = self.due.unwrap_or_else(Instant::now);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        Ok(())
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::new(Nobody)
    }
}
