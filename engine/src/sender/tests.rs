use std::sync::Mutex;

use crossbeam_channel::unbounded;

use super::*;
use crate::ledger::Ledger;
use crate::partition::Partition;
use crate::testing::TestMemory;
use crate::transport::{ChannelCounters, Interrupt, Watermarks};

/// A channel that keeps what it is given, and has a batch land with each wait.
#[derive(Default)]
struct Recorder {
    log: Arc<Mutex<Log>>,
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

/// Sends a whole round on one channel; what it published.
fn send_round(memory: &TestMemory, ledger: Ledger, pages: Box<dyn PageSender>) -> ChannelGauge {
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
            max_batch_bytes: 1 << 20,
            max_batch_runs: MAX_BATCH_RUNS,
        },
        batch_bytes: BATCH_BYTES,
        gauges: Arc::clone(&gauges),
        stop: Arc::default(),
        shared: Shared::new(),
        commands: theirs,
        feed,
        leftovers,
    };
    let partition = Partition::new(memory.memory().layout(), 1);
    let (_loan, mut shares) = ledger.lend(&partition);
    let share = shares.remove(0);
    commands.send(Command::Round { share, first_look: false, settle: true }).unwrap();
    commands.send(Command::Finish).unwrap();
    run(setup);
    assert!(matches!(reports.try_recv(), Ok(Input::Report(SenderReport::RoundDone { .. }))));
    assert!(matches!(reports.try_recv(), Ok(Input::Report(SenderReport::Finished))));
    Arc::into_inner(gauges).unwrap().remove(0).into_inner()
}

/// Of a migration that has sent all pages as data, and is to send them all again.
fn all_sent_before(memory: &TestMemory) -> Ledger {
    let layout = memory.memory().layout();
    let (loan, mut shares) = Ledger::new(layout).lend(&Partition::new(layout, 1));
    while let Some((_, dirty)) = shares[0].next_dirty() {
        shares[0].done(dirty);
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
    let gauge = send_round(&memory, all_sent_before(&memory), Box::new(recorder));
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
    assert_eq!(gauge.landed_zero_pages.load(Ordering::Relaxed), pages);
}
