//! A sender's work on the calling thread, for who counts what it costs: instructions, allocations,
//! system calls. With several threads such counts would differ from run to run.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crossbeam_channel::unbounded;

use crate::config::Timeouts;
use crate::migration::sender::{self, Command, SenderReport, SenderSetup};
use crate::migration::session::Input;
use crate::pages::dirty::{DirtyBitmap, DirtySources};
use crate::pages::ledger::Ledger;
use crate::pages::memory::GuestMemory;
use crate::pages::partition::Partition;
use crate::progress::Shared;
use crate::stats::ChannelGauge;
use crate::transport::{Capabilities, PageCounts, PageSender};

/// Sends what is dirty, as one round with one channel, and returns the pages that were looked at.
/// The sources are only asked to re-arm.
///
/// # Panics
///
/// If the channel breaks.
pub fn send_round(
    memory: &Arc<GuestMemory>,
    dirty: &DirtyBitmap,
    sources: DirtySources,
    pages: Box<dyn PageSender>,
    capabilities: Capabilities,
    batch_bytes: u64,
) -> PageCounts {
    let layout = memory.layout();
    let mut ledger = Ledger::new(layout);
    ledger.dirty.clear();
    ledger.dirty.merge(dirty);
    let (loan, mut shares) = ledger.lend(&Partition::new(layout, 1));
    let (commands_in, commands) = unbounded();
    for share in shares.drain(..) {
        let round = Command::Round { share, first_look: false, settle: true };
        assert!(commands_in.send(round).is_ok(), "the sender is below");
    }
    assert!(commands_in.send(Command::Finish).is_ok(), "the sender is below");
    let (feed, reports) = unbounded();
    let (leftovers, _left) = unbounded();
    let gauges = Arc::new(ChannelGauge::for_channels(1));
    sender::run(SenderSetup {
        channel: 0,
        memory: Arc::clone(memory),
        sources: Arc::new(sources),
        pages,
        capabilities,
        batch_bytes,
        sums: None,
        stall: Timeouts::default().stall,
        gauges: Arc::clone(&gauges),
        stop: Arc::new(AtomicBool::new(false)),
        shared: Shared::new(),
        commands,
        feed,
        leftovers,
    });
    for report in reports.try_iter() {
        if let Input::Report(SenderReport::Failed { error, .. }) = report {
            panic!("the channel broke: {}", error.chain());
        }
    }
    assert!(loan.take_back().is_ok(), "the sender has dropped its share");
    gauges[0].pages()
}
