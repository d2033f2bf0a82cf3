//! The case of zero runs that are long.

use std::thread;
use std::time::Duration;

use super::Trial;
use super::fixture::{Opened, run};
use crate::pages::memory::PageRange;
use crate::transport::{MAX_BATCH_ZERO_PAGES, Received, RunKind, TransportError};

/// Links that are tried: the thread that interrupts may get its turn too late.
const ATTEMPTS: usize = 50;

/// A receiver that has the most zero pages to write that a batch may have heeds an interrupt in the
/// middle of them.
pub(super) fn an_interrupt_ends_a_batch_of_zeroes(trial: &Trial) {
    let interrupted = (0..ATTEMPTS).any(|_| is_interrupted_in_the_middle(trial));
    assert!(interrupted, "{ATTEMPTS} batches were written to their end after an interrupt");
}

fn is_interrupted_in_the_middle(trial: &Trial) -> bool {
    let Opened {
        mut senders, mut receivers, control: _control, source, destination, there, ..
    } = trial.open_with(1, &[MAX_BATCH_ZERO_PAGES]);
    let pages = u32::try_from(MAX_BATCH_ZERO_PAGES).expect("a run can say it");
    let all = PageRange { region: 0, first_page: 0, pages };
    let ones = vec![1; usize::try_from(all.len_bytes()).expect("it fits into memory")];
    there.memory().copy_in(all, &ones).expect("all pages of this memory");
    let is_zero = |page| there.memory().is_zero(0, page).expect("a page of this memory");
    let interrupter = destination.interrupter();
    let (mut sender, mut receiver) = (senders.remove(0), receivers.remove(0));
    let outcome = trial.watch.together(|crew| {
        // Both own their ends: one that is left by the other is not to wait for it.
        let receiving = crew.spawn(move || {
            // The batch may come in pieces.
            let mut zeroed = 0;
            while zeroed < MAX_BATCH_ZERO_PAGES {
                match receiver.receive()? {
                    Received::Batch(counts) => zeroed += counts.zero,
                    Received::End => panic!("the channel ended after {zeroed} zero pages"),
                }
            }
            Ok(())
        });
        crew.spawn(move || {
            // The other side may be gone before all has landed, or is under way.
            let _ = sender.send(&[run(0, 0, pages, RunKind::Zero)]);
            let _ = sender.watermarks(Some(Duration::from_secs(1)));
        });
        while !is_zero(0) && !receiving.is_done() {
            thread::yield_now();
        }
        interrupter.interrupt();
        receiving.join_promptly("an interrupt ends a batch of zeroes")
    });
    drop((source, destination));
    if let Err(error) = &outcome {
        assert!(matches!(error, TransportError::Interrupted), "{error}");
    }
    outcome.is_err() && !is_zero(MAX_BATCH_ZERO_PAGES - 1)
}
