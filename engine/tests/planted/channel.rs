//! Data channels with a fault.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pageferry::memory::{GuestMemory, PAGE_BYTES, PageRange};
use pageferry::transport::{
    ChannelCounters, Interrupt, LandingWatch, PageCounts, PageReceiver, PageSender, Received, Run,
    RunKind, Ticket, TransportError, Watermarks,
};

use crate::fault::Fault;
use crate::plot::{Deaf, Keeping, Plot, lost};

pub(crate) struct PlantedSender {
    inner: Box<dyn PageSender>,
    plot: Arc<Plot>,
    channel: usize,
    memory: Option<Arc<GuestMemory>>,
    link: Arc<dyn Interrupt>,
    /// For each batch that was taken: the last of the inner channel's that are of it.
    tickets: Vec<Option<Ticket>>,
    last_inner: Ticket,
    held: Option<(usize, Vec<Run>)>,
    calls: AtomicU64,
    told: Watermarks,
    finished: bool,
    interrupted: bool,
}

impl PlantedSender {
    pub(crate) fn new(
        inner: Box<dyn PageSender>,
        plot: Arc<Plot>,
        channel: usize,
        memory: Option<Arc<GuestMemory>>,
        link: Arc<dyn Interrupt>,
    ) -> Self {
        let (tickets, held, calls) = (Vec::new(), None, AtomicU64::new(0));
        let (told, last_inner) = (Watermarks::default(), 0);
        let (finished, interrupted) = (false, false);
        Self {
            inner,
            plot,
            channel,
            memory,
            link,
            tickets,
            last_inner,
            held,
            calls,
            told,
            finished,
            interrupted,
        }
    }

    /// What goes out instead of a batch.
    fn twisted(&self, runs: &[Run]) -> Vec<Run> {
        let pages_of = |region: u16| {
            let memory = self.memory.as_ref().expect("registered");
            let region = memory.layout().regions().get(usize::from(region));
            region.map_or(0, |region| region.len_bytes / PAGE_BYTES)
        };
        let end = |range: PageRange| range.first_page.saturating_add(u64::from(range.pages));
        let mut runs = runs.to_vec();
        let is_zero = |run: &Run| run.kind == RunKind::Zero;
        match self.plot.fault {
            Fault::RunsBeyond400Dropped => runs.truncate(400),
            Fault::LastRegionDropped => runs.retain(|run| run.range.region != 2),
            Fault::ZeroRunsIgnored => runs.retain(|run| !is_zero(run)),
            _ => {}
        }
        for run in &mut runs {
            let zero = is_zero(run);
            let has_next = end(run.range) < pages_of(run.range.region);
            let range = &mut run.range;
            match self.plot.fault {
                Fault::PagesOneTooFar if !zero && has_next => range.first_page += 1,
                Fault::LastPageOfRunDropped if range.pages > 1 => range.pages -= 1,
                Fault::LargeBatchesInPart if !zero => range.pages = range.pages.min(250),
                Fault::ZeroRunsBeyond16PagesInPart if zero => range.pages = range.pages.min(16),
                Fault::ZeroRunsOneTooMany if zero && has_next => range.pages += 1,
                Fault::ZeroRunsAsData if zero => run.kind = RunKind::Data,
                _ => {}
            }
        }
        runs
    }

    fn go_out(&mut self, index: usize, runs: &[Run]) -> Result<(), TransportError> {
        let runs = self.twisted(runs);
        if !runs.is_empty() {
            self.plot.goes_out(self.channel, &runs);
            let sent = self.inner.send(&runs);
            self.last_inner = sent.inspect_err(|_| self.plot.went_back(self.channel))?;
        }
        self.tickets[index] = Some(self.last_inner);
        Ok(())
    }

    fn let_go(&mut self) -> Result<(), TransportError> {
        self.held.take().map_or(Ok(()), |(index, runs)| self.go_out(index, &runs))
    }

    fn upto(&self, mark: Ticket) -> Ticket {
        let gone = |ticket: &&Option<Ticket>| ticket.is_some_and(|ticket| ticket <= mark);
        self.tickets.iter().take_while(gone).count() as u64
    }

    fn try_send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        // What must be refused is refused before it is held.
        self.tickets.push(None);
        let index = self.tickets.len() - 1;
        let is_held = match self.plot.fault {
            Fault::BatchesSwappedInMidChannel => index % 50 == 46,
            Fault::ReleasedTooEarly | Fault::FinishDropsLastBatch => true,
            _ => false,
        };
        let before = self.held.take();
        if is_held {
            self.held = Some((index, runs.to_vec()));
        } else {
            self.go_out(index, runs)?;
        }
        if let Some((index, runs)) = before {
            self.go_out(index, &runs)?;
        }
        Ok(self.tickets.len() as u64)
    }

    /// As a failed call looks to its caller.
    fn twist<T>(
        &mut self,
        result: Result<T, TransportError>,
        otherwise: T,
    ) -> Result<T, TransportError> {
        let again = self.interrupted;
        match (result, self.plot.fault) {
            (Err(TransportError::Interrupted), fault) => {
                self.interrupted = true;
                match fault {
                    Fault::OnlyFirstSenderWoken if self.channel > 0 => self.plot.hang(),
                    Fault::InterruptedIsLost => Err(lost()),
                    Fault::ChannelInterruptIsForgotten if again => Ok(otherwise),
                    _ => Err(TransportError::Interrupted),
                }
            }
            (Err(TransportError::Lost { .. }), Fault::LostDestinationIsClosed) => {
                Err(TransportError::Closed)
            }
            (Err(TransportError::Lost { .. }), Fault::LostDestinationNotNoticed) => Ok(otherwise),
            (result, _) => result,
        }
    }
}

impl PageSender for PlantedSender {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        let result = self.try_send(runs);
        let ticket = self.tickets.len() as u64;
        let all = |kind| runs.iter().all(|run| run.kind == kind);
        let result = match (result, self.plot.fault) {
            (Ok(ticket), Fault::TicketsFromZero) => Ok(ticket - 1),
            (Ok(ticket), Fault::TicketsWithGaps) => Ok(ticket + ticket / 64),
            (Ok(_), Fault::ZeroRunsWithoutTickets) if all(RunKind::Zero) => {
                self.tickets.pop();
                Ok(ticket - 1)
            }
            (Err(TransportError::TooLarge { .. }), Fault::TooManyRunsTaken) if runs.len() > 2 => {
                Ok(ticket)
            }
            (Err(TransportError::TooLarge { .. }), Fault::TooManyBytesTaken) if runs.len() <= 2 => {
                Ok(ticket)
            }
            (Err(TransportError::TooLarge { .. }), Fault::TooLargeIsOutOfRange) => Err(lost()),
            (Err(TransportError::OutOfRange(_)), Fault::DataOutsideTaken) if all(RunKind::Data) => {
                Ok(ticket)
            }
            (Err(TransportError::OutOfRange(_)), Fault::ZeroOutsideTaken) if all(RunKind::Zero) => {
                Ok(ticket)
            }
            (Err(TransportError::OutOfRange(_)), Fault::OutsideIsTooLarge) => {
                Err(TransportError::TooLarge { what: "run", size: 1, limit: 0 })
            }
            (Err(error), Fault::GoodRunsSentBeforeRefusal) if runs.len() > 1 => {
                self.inner.send(&runs[..1])?;
                Err(error)
            }
            (Err(TransportError::Interrupted), Fault::SendAfterInterruptSucceeds) => Ok(ticket),
            (result, _) => result,
        };
        self.twist(result, ticket)
    }

    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
        let calls = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let sent = self.tickets.len() as u64;
        let has_all = self.told.landed == sent;
        if wait.is_some() {
            let result = self.let_go();
            self.twist(result, ())?;
        }
        let wait = match (self.plot.fault, wait) {
            (Fault::LookWaits, None) => {
                self.plot.idle(Duration::from_millis(15));
                None
            }
            (Fault::LookWaitsForEver, None) if !has_all => return self.plot.hang(),
            (Fault::WaitsReturnAtOnce, _) => None,
            (Fault::WaitsForEver, Some(_)) => Some(Duration::from_secs(60 * 60)),
            (Fault::WaitsMuchTooLong, Some(time)) => Some(time.saturating_mul(20)),
            (Fault::WaitsTheirTimeOut, Some(time)) => {
                self.plot.idle(time);
                None
            }
            (Fault::WaitsWhenAllHasLanded, Some(time)) if has_all => {
                self.plot.idle(time);
                None
            }
            (_, wait) => wait,
        };
        let result = self.inner.watermarks(wait);
        let interrupted = matches!(result, Err(TransportError::Interrupted));
        if interrupted && self.plot.is(Fault::LookAfterInterruptSucceeds) {
            return Ok(self.told);
        }
        let inner = result.map(|marks| Watermarks {
            released: self.upto(marks.released),
            landed: self.upto(marks.landed),
        });
        let mut marks = self.twist(inner, self.told)?;
        self.told = marks;
        match self.plot.fault {
            Fault::LandedWhenSent => marks = Watermarks { released: sent, landed: sent },
            Fault::ReleasedTooEarly => marks.released = sent,
            Fault::NeverReleased => marks.released = 0,
            Fault::WatermarksGoBackEveryFourthCall if calls.is_multiple_of(4) => {
                marks.landed = marks.landed.saturating_sub(1);
            }
            Fault::WatermarksBeyondWhatWasSent if marks.landed > 100 => {
                marks = Watermarks { released: sent + 1, landed: sent + 1 };
            }
            Fault::LandedBeforeReleased => marks.released = marks.landed.saturating_sub(1),
            Fault::LastBatchNotAcknowledged => marks.landed = marks.landed.min(sent.max(1) - 1),
            _ => {}
        }
        Ok(marks)
    }

    fn counters(&self) -> ChannelCounters {
        let mut counters = self.inner.counters();
        match self.plot.fault {
            Fault::SenderCountsNothing => counters = ChannelCounters::default(),
            Fault::CountersGoBack => {
                let calls = self.calls.fetch_add(1, Ordering::SeqCst);
                counters.wire_bytes /= 1 + calls % 7;
            }
            _ => {}
        }
        counters
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        self.finished = true;
        match self.plot.fault {
            Fault::FinishDropsLastBatch => self.held = None,
            Fault::FinishWithoutEnd => return Ok(()),
            _ => self.let_go()?,
        }
        let result = self.inner.finish();
        match (result, self.plot.fault) {
            (Err(_), Fault::FinishAfterInterruptSucceeds) => Ok(()),
            (result, _) => self.twist(result, ()),
        }
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        match self.plot.fault {
            Fault::ChannelInterruptWakesAll => Arc::clone(&self.link),
            Fault::ChannelInterruptWakesNone => Arc::new(Deaf),
            Fault::ChannelInterrupterKeepsMemory => {
                Arc::new(Keeping(self.inner.interrupter(), self.memory.clone()))
            }
            _ => self.inner.interrupter(),
        }
    }
}

impl Drop for PlantedSender {
    fn drop(&mut self) {
        if self.plot.is(Fault::LostChannelTakesAll) && !self.finished {
            self.link.interrupt();
        }
    }
}

pub(crate) struct PlantedReceiver {
    inner: Box<dyn PageReceiver>,
    plot: Arc<Plot>,
    channel: usize,
    memory: Arc<GuestMemory>,
    /// Where the inner channel writes, if not there.
    shadow: Option<Arc<GuestMemory>>,
    batches: u64,
    /// Told when it should have been before.
    late: LandingWatch,
    /// Earlier bytes of pages.
    history: HashMap<(u16, u64), Vec<u8>>,
}

impl PlantedReceiver {
    pub(crate) fn new(
        inner: Box<dyn PageReceiver>,
        plot: Arc<Plot>,
        channel: usize,
        memory: Arc<GuestMemory>,
        shadow: Option<Arc<GuestMemory>>,
    ) -> Self {
        let (late, history) = (LandingWatch::default(), HashMap::new());
        Self { inner, plot, channel, memory, shadow, batches: 0, late, history }
    }

    fn page(&self, range: PageRange) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.memory.copy_out(range, &mut bytes).expect("inside memory");
        bytes
    }

    fn put(&self, range: PageRange, bytes: &[u8]) {
        self.memory.copy_in(range, bytes).expect("inside memory");
    }

    /// Does harm to memory after a batch came in.
    fn harm(&mut self, runs: &[Run]) {
        let region_pages = |region: u16| {
            self.memory.layout().regions()[usize::from(region)].len_bytes / PAGE_BYTES
        };
        for Run { range, kind } in runs {
            let end = range.first_page + u64::from(range.pages);
            let last = PageRange { first_page: end - 1, pages: 1, ..*range };
            let mut page = self.page(last);
            match self.plot.fault {
                Fault::BitFlipped if self.batches % 5 == 2 => {
                    page[2000] ^= 4;
                    self.put(last, &page);
                }
                Fault::LastWordOfPageMissing => {
                    page[4088..].fill(0);
                    self.put(last, &page);
                }
                Fault::PageBeyondTheRunTouched if end < region_pages(range.region) => {
                    let next = PageRange { first_page: end, ..last };
                    page = self.page(next);
                    page[17] = 1;
                    self.put(next, &page);
                }
                Fault::OldBytesKept if *kind == RunKind::Data && range.pages == 1 => {
                    let key = (range.region, range.first_page);
                    let before = self.history.insert(key, page);
                    if let Some(before) = before.filter(|_| self.batches.is_multiple_of(40)) {
                        self.put(last, &before);
                    }
                }
                _ => {}
            }
        }
    }
}

impl PageReceiver for PlantedReceiver {
    fn receive(&mut self) -> Result<Received, TransportError> {
        let result = self.inner.receive();
        let runs = match &result {
            Ok(Received::Batch(_)) => self.plot.came_in(self.channel),
            Err(TransportError::Interrupted) => self.plot.came_in(self.channel),
            _ => Vec::new(),
        };
        match (result, self.plot.fault) {
            (Ok(Received::Batch(counts)), fault) => {
                self.batches += 1;
                if fault == Fault::AcknowledgedBeforeWritten {
                    let shadow = self.shadow.as_ref().expect("registered");
                    write_late(&self.plot, shadow, &self.memory, &runs);
                }
                self.harm(&runs);
                if self.late.is_set() {
                    self.plot.idle(Duration::from_millis(2));
                    self.late.landed(&runs);
                }
                match fault {
                    Fault::EndBeforeLastBatch if self.batches == 3 => Ok(Received::End),
                    Fault::CountsOfReceiverWrong => {
                        let data = counts.data + 1;
                        Ok(Received::Batch(PageCounts { data, ..counts }))
                    }
                    Fault::ZeroesCountedAsData => {
                        let data = counts.data + counts.zero;
                        Ok(Received::Batch(PageCounts { data, ..PageCounts::default() }))
                    }
                    _ => Ok(Received::Batch(counts)),
                }
            }
            (Ok(Received::End), Fault::EndNeverSeen) => self.plot.hang(),
            (Err(TransportError::Interrupted), fault) => {
                match fault {
                    Fault::OnlyFirstReceiverWoken if self.channel > 0 => return self.plot.hang(),
                    Fault::ZeroesWrittenAfterInterrupt => {
                        let zero = runs.iter().filter(|run| run.kind == RunKind::Zero);
                        zero.for_each(|run| {
                            self.memory.fill_zero(run.range).expect("inside memory");
                        });
                    }
                    _ => {}
                }
                Err(TransportError::Interrupted)
            }
            (Err(TransportError::Lost { .. }), Fault::LossIsClosed) => Err(TransportError::Closed),
            (Err(TransportError::Lost { .. }), Fault::LossIsEnd) => Ok(Received::End),
            (Err(TransportError::Lost { .. }), Fault::LostSourceNotNoticed) => self.plot.hang(),
            (result, _) => result,
        }
    }

    fn watch_landings(&mut self, mut watch: LandingWatch) -> Result<(), TransportError> {
        match self.plot.fault {
            Fault::LandingsUntold => Ok(()),
            Fault::LandingsToldLate => {
                self.late = watch;
                Ok(())
            }
            Fault::LandingsOfZeroesUntold => {
                self.inner.watch_landings(LandingWatch::new(move |runs| {
                    let data = |run: &&Run| run.kind == RunKind::Data;
                    watch.landed(&runs.iter().filter(data).copied().collect::<Vec<_>>());
                }))
            }
            Fault::LandingsInNameOnly => {
                Err(TransportError::Unsupported("word of what has landed"))
            }
            _ => self.inner.watch_landings(watch),
        }
    }

    fn counters(&self) -> ChannelCounters {
        if self.plot.is(Fault::ReceiverCountsNothing) {
            return ChannelCounters::default();
        }
        self.inner.counters()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        if self.plot.is(Fault::ChannelInterruptOfReceiverWakesNone) {
            return Arc::new(Deaf);
        }
        self.inner.interrupter()
    }
}

/// Writes to memory what was said to be there already.
fn write_late(plot: &Plot, shadow: &GuestMemory, memory: &GuestMemory, runs: &[Run]) {
    plot.idle(Duration::from_millis(2));
    let mut bytes = Vec::new();
    for run in runs {
        shadow.copy_out(run.range, &mut bytes).expect("inside memory");
        memory.copy_in(run.range, &bytes).expect("inside memory");
    }
}
