use std::sync::Mutex;

use crossbeam_channel::unbounded;

use super::*;
use crate::config::Timeouts;
use crate::pages::ledger::Ledger;
use crate::pages::partition::Partition;
use crate::testing::TestMemory;
use crate::transport::{ChannelCounters, Interrupt, Watermarks};

/// A channel that keeps what it is given, and has a batch land with each wait.
#[derive(Default)]
struct Recorder {
    log: Arc<Mutex<Log>>,
    /// The batch with which the channel is lost, from 0. The other side may have it all the same.
    lost_with: Option<usize>,
}

#[derive(Default)]
struct Log {
    batches: Vec<Vec<Run>>,
    landed: usize,
    /// Most zero pages that were under way.
    most_zero_pages: u64,
}

impl PageSender for Recorder {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        let mut log = self.log.lock().unwrap();
        log.batches.push(runs.to_vec());
        let under_way = log.batches[log.landed..].iter().map(|runs| PageCounts::of(runs).zero);
        log.most_zero_pages = log.most_zero_pages.max(under_way.sum());
        if self.lost_with == Some(log.batches.len() - 1) {
            let cause = std::io::ErrorKind::ConnectionReset.into();
            return Err(TransportError::Lost { operation: "send a batch", cause });
        }
        Ok(log.batches.len() as Ticket)
    }

    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
        let mut log = self.log.lock().unwrap();
        log.landed = (log.landed + usize::from(wait.is_some())).min(log.batches.len());
        Ok(Watermarks { released: log.batches.len() as Ticket, landed: log.landed as Ticket })
    }

    fn counters(&self) -> ChannelCounters {
        ChannelCounters::default()
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        Ok(())
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::new(Nobody)
    }
}

/// Nothing waits there.
struct Nobody;

impl Interrupt for Nobody {
    fn interrupt(&self) {}
}

/// What a round with one channel left.
struct Round {
    gauge: ChannelGauge,
    ledger: Ledger,
    error: Option<Error>,
}

fn send_round(
    memory: &TestMemory,
    ledger: Ledger,
    pages: Box<dyn PageSender>,
    first_look: bool,
) -> Round {
    let (commands, theirs) = unbounded();
    let (feed, reports) = unbounded();
    let (leftovers, _left) = unbounded();
    let gauges = Arc::new(ChannelGauge::for_channels(1));
    let setup = SenderSetup {
        channel: 0,
        memory: Arc::clone(memory.memory()),
        sources: Arc::new(DirtySources::new(Vec::new())),
        pages,
        capabilities: Capabilities {
            one_sided_write: false,
            one_sided_read: false,
            zero_copy: false,
            needs_registration: false,
            protects_pages: true,
            tells_landings: false,
            max_batch_bytes: 1 << 20,
            max_batch_runs: MAX_BATCH_RUNS,
        },
        batch_bytes: BATCH_BYTES,
        sums: None,
        stall: Timeouts::default().stall,
        gauges: Arc::clone(&gauges),
        stop: Arc::default(),
        shared: Shared::new(),
        commands: theirs,
        feed,
        leftovers,
    };
    let partition = Partition::new(memory.memory().layout(), 1);
    let (loan, mut shares) = ledger.lend(&partition);
    let share = shares.remove(0);
    commands.send(Command::Round { share, first_look, settle: true }).unwrap();
    commands.send(Command::Finish).unwrap();
    run(setup);
    let error = reports.try_iter().find_map(|report| match report {
        Input::Report(SenderReport::Failed { error, .. }) => Some(error),
        _ => None,
    });
    let gauge = Arc::into_inner(gauges).unwrap().remove(0).into_inner();
    Round { gauge, ledger: loan.take_back().unwrap(), error }
}

/// Of a migration that has sent all pages as data, and is to send them all again.
fn all_sent_before(memory: &TestMemory) -> Ledger {
    let layout = memory.memory().layout();
    let (loan, mut shares) = Ledger::new(layout).lend(&Partition::new(layout, 1));
    while let Some((_, dirty)) = shares[0].next_dirty() {
        shares[0].mark_sent(&dirty);
        shares[0].done();
    }
    drop(shares);
    let mut ledger = loan.take_back().unwrap();
    ledger.dirty.fill();
    ledger
}

/// A guest that frees all it has makes batches that a receiver is through with in no time, so that
/// no time limit is hit, and each counts as progress.
#[test]
fn what_a_guest_freed_goes_out_in_bounded_batches() {
    let pages = 20 * MAX_BATCH_ZERO_PAGES + 7;
    let memory = TestMemory::new(&[pages]);
    let recorder = Recorder::default();
    let log = Arc::clone(&recorder.log);
    let round = send_round(&memory, all_sent_before(&memory), Box::new(recorder), false);
    let log = log.lock().unwrap();
    assert!(log.batches.len() == 21, "{} batches", log.batches.len());
    let mut next = 0;
    for batch in &log.batches {
        assert!(PageCounts::of(batch).zero <= MAX_BATCH_ZERO_PAGES);
        for run in batch {
            assert_eq!((run.kind, run.range.first_page), (RunKind::Zero, next));
            next += u64::from(run.range.pages);
        }
    }
    assert_eq!(next, pages);
    assert!(log.most_zero_pages <= IN_FLIGHT_ZERO_PAGES + MAX_BATCH_ZERO_PAGES);
    assert_eq!(round.gauge.landed_zero_pages.load(Ordering::Relaxed), pages);
}

/// Wherever in a stripe a channel is lost, what it may have sent is marked, and what it has not sent
/// is dirty.
#[test]
fn what_may_have_gone_out_is_marked_whatever_fails() {
    // Three stripes, and more batches than these: one is full with 256 pages.
    let pages = 3 * 512;
    let memory = TestMemory::new(&[pages]);
    // Runs of seven pages, which batches cut.
    let holds_data = |page: &u64| !page.is_multiple_of(8);
    (0..pages).filter(holds_data).for_each(|page| memory.fill_page(0, page, page));
    let batches_of = |lost_with| {
        let recorder = Recorder { lost_with, ..Recorder::default() };
        let log = Arc::clone(&recorder.log);
        let layout = memory.memory().layout();
        let round = send_round(&memory, Ledger::new(layout), Box::new(recorder), true);
        assert_eq!(round.error.is_some(), lost_with.is_some());
        let batches = std::mem::take(&mut log.lock().unwrap().batches);
        let mut gone_out = vec![false; 3 * 512];
        for Run { range, .. } in batches.iter().flatten() {
            for page in range.first_page..range.first_page + u64::from(range.pages) {
                let marked = round.ledger.is_marked(0, page);
                assert!(marked, "page {page} went out unmarked, lost with {lost_with:?}");
                gone_out[usize::try_from(page).unwrap()] = true;
            }
        }
        for (page, gone_out) in (0..pages).zip(gone_out) {
            let is_left = round.ledger.dirty.get(0, page);
            assert!(gone_out || is_left || !holds_data(&page), "page {page} is forgotten");
        }
        batches.len()
    };
    let all = batches_of(None);
    assert!(all > 3, "{all} batches");
    (0..all).for_each(|batch| assert_eq!(batches_of(Some(batch)), batch + 1));
}

/// A page that may hold data at the destination is mentioned, also where a file has a hole.
#[test]
fn a_hole_is_left_out_only_where_nothing_was_sent() {
    let memory = TestMemory::of_memfds(&[600]);
    memory.fill_page(0, 7, 1);
    for (ledger, mentioned) in
        [(Ledger::new(memory.memory().layout()), 0), (all_sent_before(&memory), 599)]
    {
        let recorder = Recorder::default();
        let log = Arc::clone(&recorder.log);
        send_round(&memory, ledger, Box::new(recorder), true);
        let counts = PageCounts::of(&log.lock().unwrap().batches.concat());
        assert_eq!((counts.data, counts.zero), (1, mentioned));
    }
}
