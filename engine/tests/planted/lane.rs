//! Lanes for reads with a fault.

use std::sync::Arc;
use std::time::Duration;

use pageferry::memory::PageRange;
use pageferry::transport::{
    ChannelCounters, Interrupt, LandingWatch, PageCounts, PageReceiver, PageRequests, Received,
    Ticket, TransportError,
};

use crate::fault::Fault;
use crate::plot::Plot;

/// Asks for pages.
pub(crate) struct PlantedRequests {
    inner: Box<dyn PageRequests>,
    plot: Arc<Plot>,
    asked: Ticket,
    held: Option<Vec<PageRange>>,
}

impl PlantedRequests {
    pub(crate) fn new(inner: Box<dyn PageRequests>, plot: Arc<Plot>) -> Self {
        Self { inner, plot, asked: 0, held: None }
    }
}

impl PageRequests for PlantedRequests {
    fn request(&mut self, ranges: &[PageRange]) -> Result<Ticket, TransportError> {
        self.asked += 1;
        match self.plot.fault {
            Fault::ReadsOnePageTooFar => {
                let mut far = ranges.to_vec();
                far[0].first_page += 1;
                return self.inner.request(&far);
            }
            // The third goes out after the fourth.
            Fault::ReadsSwapped if self.asked == 3 => {
                self.held = Some(ranges.to_vec());
                return Ok(3);
            }
            Fault::ReadsSwapped => {
                let asked = self.inner.request(ranges);
                if let Some(held) = self.held.take() {
                    self.inner.request(&held)?;
                }
                return asked.map(|_| self.asked);
            }
            _ => {}
        }
        match (self.inner.request(ranges), self.plot.fault) {
            (Ok(ticket), Fault::ReadsFromZero) => Ok(ticket - 1),
            (Err(TransportError::OutOfRange(_)), Fault::ReadOutsideTaken)
            | (Err(TransportError::TooLarge { .. }), Fault::TooLargeReadTaken) => Ok(self.asked),
            (Err(_), Fault::LostLaneNotNoticed) => Ok(self.asked),
            (asked, _) => asked,
        }
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        self.inner.finish()
    }

    fn counters(&self) -> ChannelCounters {
        self.inner.counters()
    }
}

/// Where pages land.
pub(crate) struct PlantedLandings {
    inner: Box<dyn PageReceiver>,
    plot: Arc<Plot>,
    lane: usize,
    /// What was said to have landed before it has.
    early: u64,
}

impl PlantedLandings {
    pub(crate) fn new(inner: Box<dyn PageReceiver>, plot: Arc<Plot>, lane: usize) -> Self {
        Self { inner, plot, lane, early: 0 }
    }
}

impl PageReceiver for PlantedLandings {
    fn receive(&mut self) -> Result<Received, TransportError> {
        if self.plot.is(Fault::ReadsLandedTooEarly) && self.early == 0 {
            self.early = 1;
            return Ok(Received::Batch(PageCounts::default()));
        }
        if self.plot.is(Fault::UrgentReadsWait) && self.lane == 1 {
            self.plot.idle(Duration::from_millis(250));
        }
        match (self.inner.receive(), self.plot.fault) {
            (Err(TransportError::Lost { .. }), Fault::LostLaneNotNoticed) => Ok(Received::End),
            (Err(TransportError::Interrupted), Fault::LaneNotWoken) => self.plot.hang(),
            (received, _) => received,
        }
    }

    fn watch_landings(&mut self, watch: LandingWatch) -> Result<(), TransportError> {
        self.inner.watch_landings(watch)
    }

    fn counters(&self) -> ChannelCounters {
        self.inner.counters()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}
