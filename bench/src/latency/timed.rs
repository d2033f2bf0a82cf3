//! Measures a sender from outside: a dirty source that notes when stripes are re-armed, and a link
//! whose senders note when what they sent has landed. Both are called by the same thread.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use pageferry::dirty::{DirtyBitmap, DirtyError, DirtySource, WORD_PAGES};
use pageferry::testing::WrappedSource;
use pageferry::transport::{
    ChannelCounters, Interrupt, PageSender, Run, SourceLink, Ticket, TransportError, Watermarks,
};
use pageferry_report::latency::Latencies;

/// Pages that were re-armed together.
#[derive(Debug, Clone, Copy)]
struct Rearmed {
    region: u16,
    first_page: u64,
    pages: u64,
    at: Instant,
}

thread_local! {
    /// Those whose pages may not have been sent yet, in the order of their re-arm.
    static REARMED: RefCell<VecDeque<Rearmed>> = const { RefCell::new(VecDeque::new()) };
}

/// When the first page of a batch was re-armed. What was re-armed before has been sent.
fn rearm_of(first: &Run) -> Option<Instant> {
    let holds = |rearmed: &Rearmed| {
        let pages = rearmed.first_page..rearmed.first_page + rearmed.pages;
        rearmed.region == first.range.region && pages.contains(&first.range.first_page)
    };
    REARMED.with_borrow_mut(|all| {
        let index = all.iter().position(holds)?;
        all.drain(..index);
        all.front().map(|rearmed| rearmed.at)
    })
}

/// A tracker of memory that nobody writes to.
#[derive(Debug)]
pub(super) struct Rearms;

impl DirtySource for Rearms {
    fn name(&self) -> &'static str {
        "re-arms"
    }

    fn start(&self) -> Result<(), DirtyError> {
        Ok(())
    }

    fn harvest(&self, _: &mut DirtyBitmap) -> Result<(), DirtyError> {
        Ok(())
    }

    fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        let pages = words.len() as u64 * WORD_PAGES;
        let rearmed = Rearmed { region, first_page, pages, at: Instant::now() };
        REARMED.with_borrow_mut(|all| all.push_back(rearmed));
        Ok(())
    }

    fn put_back(&self, _: &DirtyBitmap) -> Result<(), DirtyError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

/// A link with senders that measure. What each measured goes to `done` when it ends.
pub(super) fn timed(link: Box<dyn SourceLink>, done: Sender<Latencies>) -> WrappedSource {
    WrappedSource::new(link).channels(move |_, sender| {
        Box::new(TimedSender {
            sender,
            under_way: VecDeque::new(),
            latencies: Latencies::new(),
            done: done.clone(),
        })
    })
}

struct TimedSender {
    sender: Box<dyn PageSender>,
    /// Batches, and when their first pages were re-armed.
    under_way: VecDeque<(Ticket, Instant)>,
    latencies: Latencies,
    done: Sender<Latencies>,
}

impl PageSender for TimedSender {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        let rearmed = runs.first().and_then(rearm_of).unwrap_or_else(Instant::now);
        let ticket = self.sender.send(runs)?;
        self.under_way.push_back((ticket, rearmed));
        Ok(ticket)
    }

    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
        let watermarks = self.sender.watermarks(wait)?;
        while let Some((ticket, rearmed)) = self.under_way.front()
            && *ticket <= watermarks.landed
        {
            self.latencies.record(rearmed.elapsed());
            self.under_way.pop_front();
        }
        Ok(watermarks)
    }

    fn counters(&self) -> ChannelCounters {
        self.sender.counters()
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        self.sender.finish()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.sender.interrupter()
    }
}

impl Drop for TimedSender {
    fn drop(&mut self) {
        let latencies = std::mem::take(&mut self.latencies);
        // Whoever does not wait for it any more has given up.
        let _ = self.done.send(latencies);
    }
}

#[cfg(test)]
mod tests {
    use pageferry::memory::PageRange;
    use pageferry::transport::RunKind;

    use super::*;

    #[test]
    fn a_batch_counts_from_the_re_arm_of_its_first_page() {
        let at = |first_page| {
            let range = PageRange { region: 0, first_page, pages: 1 };
            rearm_of(&Run { range, kind: RunKind::Data })
        };
        let words = [u64::MAX; 8];
        assert_eq!(at(0), None);
        Rearms.rearm(0, 0, &words).unwrap();
        Rearms.rearm(0, 512, &words).unwrap();
        let first = at(3).expect("it was re-armed");
        // The rest of a stripe goes with a later batch.
        assert_eq!(at(511), Some(first));
        assert!(at(512).expect("it was re-armed") > first);
        assert_eq!(at(3), None, "what was before is forgotten");
    }
}
