//! A sender thread: owns one data channel, and for each round its share of the ledger.
//!
//! For each dirty stripe: see that it is [re-armed](crate::pages::ahead), look at each dirty page, and put it
//! into a batch as data or as zero, or leave it out because the destination knows it to be zero.
//! Batches go out in order; what has not landed is remembered, so that it can be put back.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use crossbeam_utils::CachePadded;

use crate::control::pace::Pace;
use crate::error::Error;
use crate::host::caught;
use crate::migration::session::Input;
use crate::pages::ahead::Ahead;
use crate::pages::dirty::{DirtySources, STRIPE_WORDS, WORD_PAGES, runs};
use crate::pages::ledger::{Share, StripeBits};
use crate::pages::memory::{GuestMemory, PAGE_BYTES, PageRange};
use crate::pages::partition::Stripe;
use crate::pages::sums::PageSums;
use crate::progress::Shared;
use crate::stats::ChannelGauge;
use crate::threads::ThreadRole;
use crate::transport::{
    Capabilities, MAX_BATCH_RUNS, MAX_BATCH_ZERO_PAGES, PageCounts, PageSender, Run, RunKind,
    Ticket, TransportError,
};

/// Page bytes in a batch, unless the host says otherwise: enough that its fixed cost vanishes,
/// little enough that several are under way. Against 1 MiB it halves the system calls
/// (`pageferry-bench throughput --batch`).
pub(crate) const BATCH_BYTES: u64 = 4 << 20;

/// Bounds on what was sent and has not landed, a channel, beside its [pace](crate::control::pace). Zero
/// pages are little to remember and to send, but the destination writes them all: half a second of work
/// where its memory was never touched, and more than enough for a long way.
const IN_FLIGHT_ZERO_PAGES: u64 = 8 * MAX_BATCH_ZERO_PAGES;
const IN_FLIGHT_BATCHES: usize = 256;

/// Page bytes after which a busy sender asks what has landed. More often costs a system call
/// each time, and tells nothing: receivers acknowledge now and then.
const REAP_EVERY_BYTES: u64 = 4 << 20;

/// How often a waiting sender looks for commands and cancelling.
const GLANCE: Duration = Duration::from_micros(500);

/// What the driver tells a sender.
pub(crate) enum Command {
    /// Send what is dirty in your share, and drop it.
    Round {
        share: Share,
        /// Whether these stripes were never looked at. Only the first look finds large holes.
        first_look: bool,
        /// Report only when everything has landed.
        settle: bool,
    },
    /// Report when everything has landed: stripes are to change hands.
    Settle,
    /// End the channel in order, and the thread.
    Finish,
}

/// What a sender tells the driver.
pub(crate) enum SenderReport {
    /// The round's pages are sent (or landed, if it was to settle), or the share was asked back.
    /// The share is dropped.
    RoundDone { channel: u16, at: Instant },
    /// All that was sent has landed.
    Settled { channel: u16 },
    /// The channel ended in order, and the thread.
    Finished,
    /// The channel is broken; the thread has ended, its share is dropped.
    Failed { channel: u16, error: Error },
}

/// All that a sender thread needs.
pub(crate) struct SenderSetup {
    pub(crate) channel: u16,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) sources: Arc<DirtySources>,
    pub(crate) pages: Box<dyn PageSender>,
    pub(crate) capabilities: Capabilities,
    /// Page bytes to put into a batch, at most.
    pub(crate) batch_bytes: u64,
    /// Where checksums of what is sent are kept, if they are.
    pub(crate) sums: Option<Arc<PageSums>>,
    /// How long nothing may land before the link is given up.
    pub(crate) stall: Duration,
    pub(crate) gauges: Arc<Vec<CachePadded<ChannelGauge>>>,
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) commands: Receiver<Command>,
    pub(crate) feed: Sender<Input<SenderReport>>,
    /// Where runs go that were taken from the ledger and have not landed when the thread ends.
    pub(crate) leftovers: Sender<Vec<Run>>,
}

struct InFlight {
    ticket: Ticket,
    sent: Instant,
    pages: PageCounts,
    /// Page bytes that were under way then, with these.
    bytes_under_way: u64,
    runs: Vec<Run>,
}

struct SenderThread {
    setup: SenderSetup,
    ahead: Ahead,
    batch: Vec<Run>,
    batch_pages: PageCounts,
    max_batch_bytes: u64,
    max_batch_runs: usize,
    pace: Pace,
    in_flight: VecDeque<InFlight>,
    in_flight_pages: PageCounts,
    /// Emptied lists of runs, to be filled again, so that a round allocates nothing.
    spare: Vec<Vec<Run>>,
    /// Page bytes sent since the last look at what has landed.
    unreaped_bytes: u64,
    /// A page of which the checksum is taken.
    page: Vec<u8>,
}

/// The body of a sender thread.
pub(crate) fn run(setup: SenderSetup) {
    // A batch holds at least one page, whatever a transport or the host says.
    let max_batch_runs = setup.capabilities.max_batch_runs.clamp(1, MAX_BATCH_RUNS);
    let mut thread = SenderThread {
        ahead: Ahead::new(),
        batch: Vec::with_capacity(max_batch_runs),
        batch_pages: PageCounts::default(),
        max_batch_bytes: setup.capabilities.max_batch_bytes.min(setup.batch_bytes).max(PAGE_BYTES),
        max_batch_runs,
        pace: Pace::new(setup.stall),
        in_flight: VecDeque::new(),
        in_flight_pages: PageCounts::default(),
        spare: Vec::new(),
        unreaped_bytes: 0,
        page: Vec::new(),
        setup,
    };
    // Whatever happens, what has not landed is put back.
    let place = format!("the thread {}", ThreadRole::Sender(thread.setup.channel));
    let result = caught(place, || thread.serve()).flatten();
    thread.publish();
    let leftover = thread.leftover();
    if !leftover.is_empty() {
        // The driver may be gone already; then nobody wants it.
        let _ = thread.setup.leftovers.send(leftover);
    }
    let SenderThread { setup: SenderSetup { channel, feed, pages, commands, .. }, .. } = thread;
    // The other side is to see the end of a broken channel at once, and the driver no share that
    // is still held.
    drop((pages, commands));
    let report = match result {
        Ok(()) => SenderReport::Finished,
        Err(error) => SenderReport::Failed { channel, error },
    };
    let _ = feed.send(Input::Report(report));
}

impl SenderThread {
    fn serve(&mut self) -> Result<(), Error> {
        loop {
            match self.next_command()? {
                None => return Ok(()),
                Some(Command::Settle) => {
                    self.settle()?;
                    let report = SenderReport::Settled { channel: self.setup.channel };
                    if self.setup.feed.send(Input::Report(report)).is_err() {
                        return Ok(());
                    }
                }
                Some(Command::Finish) => return Ok(self.setup.pages.finish()?),
                Some(Command::Round { mut share, first_look, settle }) => {
                    self.scan(&mut share, first_look)?;
                    if settle {
                        self.settle()?;
                    }
                    self.publish();
                    // Gone before the report, so that the driver can take the ledger back.
                    drop(share);
                    let channel = self.setup.channel;
                    let report = SenderReport::RoundDone { channel, at: Instant::now() };
                    if self.setup.feed.send(Input::Report(report)).is_err() {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Waits for a command, and for batches to land meanwhile.
    fn next_command(&mut self) -> Result<Option<Command>, Error> {
        while !self.in_flight.is_empty() {
            match self.setup.commands.try_recv() {
                Ok(command) => return Ok(Some(command)),
                Err(TryRecvError::Disconnected) => return Ok(None),
                Err(TryRecvError::Empty) => self.reap(Some(GLANCE))?,
            }
        }
        Ok(self.setup.commands.recv().ok())
    }

    /// Sends all that is dirty in the share, or as much until it is asked back.
    fn scan(&mut self, share: &mut Share, first_look: bool) -> Result<(), Error> {
        self.ahead.begin();
        while !share.is_asked_back()
            && let Some((stripe, mut dirty)) = share.next_dirty()
        {
            // Re-arm, then read: a write from here on shows in the next harvest.
            self.ahead.rearm(stripe, share, &self.setup.sources)?;
            if first_look {
                self.skip_holes(stripe, &mut dirty[..stripe.words], &share.sent());
            }
            // Until it is done the whole stripe stays dirty: what fails in the middle is sent
            // once more, by whoever gets it.
            self.send_stripe(stripe, &dirty, share)?;
            share.done();
            let (done, given) = share.progress();
            self.gauge().stripes_done.store(done as u64, Ordering::Relaxed);
            self.gauge().stripes_given.store(given as u64, Ordering::Relaxed);
        }
        self.send_batch()
    }

    fn gauge(&self) -> &ChannelGauge {
        &self.setup.gauges[usize::from(self.setup.channel)]
    }

    /// Counts pages of a stripe that were never written as zero, without reading them: reading
    /// would allocate them. After the re-arm: who writes from now on is in the next harvest. So a hole
    /// is not remembered from one stripe to the next, since it may have been written before that one's.
    /// And a page that may hold data at the destination is never left out.
    fn skip_holes(&mut self, stripe: Stripe, dirty: &mut [u64], sent: &StripeBits) {
        // So there is nothing to ask where all was sent before, as in the last rounds mostly.
        if dirty.iter().zip(sent.iter()).all(|(dirty, sent)| dirty & !sent == 0) {
            return;
        }
        let begin = stripe.first_page();
        let end = begin + dirty.len() as u64 * WORD_PAGES;
        let mut page = begin;
        while page < end {
            let data = self.setup.memory.next_data(stripe.region, page, end).unwrap_or(end..end);
            let mut holes = 0;
            for hole in page..data.start {
                let index = word_index(hole - begin);
                let word = &mut dirty[index];
                let mask = (1 << (hole % WORD_PAGES)) & !sent[index];
                holes += u64::from(*word & mask != 0);
                *word &= !mask;
            }
            self.gauge().zero_pages.fetch_add(holes, Ordering::Relaxed);
            page = data.end;
        }
    }

    /// Puts the dirty pages of a stripe into batches, the one that the share gave last.
    fn send_stripe(
        &mut self,
        stripe: Stripe,
        dirty: &StripeBits,
        share: &mut Share,
    ) -> Result<(), Error> {
        for run in runs(dirty) {
            let mut bit = run.start;
            while bit < run.end {
                let page = stripe.first_page() + bit;
                let most = run.end - bit;
                let (pages, zero) = self.setup.memory.alike(stripe.region, page, most)?;
                let these = bits_of(bit..bit + pages);
                if zero {
                    self.gauge().zero_pages.fetch_add(pages, Ordering::Relaxed);
                    // Only pages that may hold data there are mentioned. They stay marked: a mention
                    // may be lost with its channel.
                    let sent = share.sent();
                    let mentioned =
                        std::array::from_fn::<_, STRIPE_WORDS, _>(|i| sent[i] & these[i]);
                    for run in runs(&mentioned) {
                        let first_page = stripe.first_page() + run.start;
                        let pages = run.end - run.start;
                        self.append(stripe.region, first_page, pages, RunKind::Zero)?;
                    }
                } else {
                    self.gauge().data_pages.fetch_add(pages, Ordering::Relaxed);
                    // Before: part of the run may be out when what follows fails.
                    share.mark_sent(&these);
                    self.append(stripe.region, page, pages, RunKind::Data)?;
                }
                bit += pages;
            }
        }
        Ok(())
    }

    /// Adds pages to the batch, to its last run if they continue that one. Sends batches as they
    /// fill up.
    fn append(
        &mut self,
        region: u16,
        mut first_page: u64,
        mut pages: u64,
        kind: RunKind,
    ) -> Result<(), Error> {
        while pages > 0 {
            let room = match kind {
                RunKind::Data => self.room_bytes() / PAGE_BYTES,
                RunKind::Zero => MAX_BATCH_ZERO_PAGES.saturating_sub(self.batch_pages.zero),
            };
            if room == 0 {
                self.send_batch()?;
                continue;
            }
            let piece = u32::try_from(pages.min(room)).unwrap_or(u32::MAX >> 1);
            let continues = |run: &&mut Run| {
                run.kind == kind
                    && run.range.region == region
                    && run.range.first_page + u64::from(run.range.pages) == first_page
                    && run.range.pages <= u32::MAX >> 1
            };
            if let Some(run) = self.batch.last_mut().filter(continues) {
                run.range.pages += piece;
            } else {
                if self.batch.len() == self.max_batch_runs {
                    self.send_batch()?;
                    continue;
                }
                let range = PageRange { region, first_page, pages: piece };
                self.batch.push(Run { range, kind });
            }
            match kind {
                RunKind::Data => self.batch_pages.data += u64::from(piece),
                RunKind::Zero => self.batch_pages.zero += u64::from(piece),
            }
            first_page += u64::from(piece);
            pages -= u64::from(piece);
        }
        Ok(())
    }

    /// Page bytes that the batch may still take; an empty batch takes a page, whatever the limit.
    fn room_bytes(&self) -> u64 {
        let at_a_time = self.setup.shared.bandwidth_at_a_time().min(self.pace.batch_bytes());
        let most_bytes = self.max_batch_bytes.min(at_a_time);
        let least_bytes = if self.batch_pages.data == 0 { PAGE_BYTES } else { 0 };
        most_bytes.saturating_sub(self.batch_pages.data_bytes()).max(least_bytes)
    }

    fn send_batch(&mut self) -> Result<(), Error> {
        self.check_stop()?;
        if self.batch.is_empty() {
            return Ok(());
        }
        while self.in_flight_pages.data_bytes() > self.pace.window()
            || self.in_flight_pages.zero > IN_FLIGHT_ZERO_PAGES
            || self.in_flight.len() >= IN_FLIGHT_BATCHES
        {
            self.reap(Some(GLANCE))?;
        }
        self.wait_for_bandwidth()?;
        self.note_sums()?;
        // Handing it over may take as long as most of it takes to land.
        let sent = Instant::now();
        let ticket = self.setup.pages.send(&self.batch)?;
        // As long as any batch can be: none grows in the middle of a round.
        let most_runs = self.max_batch_runs;
        let empty = self.spare.pop().unwrap_or_else(|| Vec::with_capacity(most_runs));
        let runs = std::mem::replace(&mut self.batch, empty);
        let pages = std::mem::take(&mut self.batch_pages);
        self.in_flight_pages.add(&pages);
        let bytes_under_way = self.in_flight_pages.data_bytes();
        self.in_flight.push_back(InFlight { ticket, sent, pages, bytes_under_way, runs });
        self.unreaped_bytes += pages.data_bytes();
        if self.unreaped_bytes < REAP_EVERY_BYTES && self.in_flight.len() < IN_FLIGHT_BATCHES / 2 {
            return Ok(());
        }
        self.reap(None)
    }

    /// Takes the checksums of what goes out. What is written from here on is dirty, and goes out again.
    fn note_sums(&mut self) -> Result<(), Error> {
        let Some(sums) = &self.setup.sums else { return Ok(()) };
        for run in &self.batch {
            match run.kind {
                RunKind::Data => sums.note_data(&self.setup.memory, run.range, &mut self.page)?,
                RunKind::Zero => sums.note_zero(run.range),
            }
        }
        Ok(())
    }

    /// Waits for the batch's turn under the bandwidth limit, and looks often: the limit may be raised
    /// or lifted meanwhile.
    fn wait_for_bandwidth(&mut self) -> Result<(), Error> {
        let bytes = self.batch_pages.data_bytes();
        while let Err(wait) = self.setup.shared.take_bandwidth(bytes) {
            let wait = wait.min(GLANCE);
            if self.in_flight.is_empty() {
                // It is the host that wants it so slow, not the other side that stalls.
                self.gauge().held_back.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(wait);
                self.check_stop()?;
            } else {
                self.reap(Some(wait))?;
            }
        }
        Ok(())
    }

    /// Waits until everything sent has landed.
    fn settle(&mut self) -> Result<(), Error> {
        while !self.in_flight.is_empty() {
            self.reap(Some(GLANCE))?;
        }
        Ok(())
    }

    /// Forgets what has landed.
    fn reap(&mut self, wait: Option<Duration>) -> Result<(), Error> {
        self.check_stop()?;
        self.unreaped_bytes = 0;
        let landed = self.setup.pages.watermarks(wait)?.landed;
        while self.in_flight.front().is_some_and(|batch| batch.ticket <= landed) {
            let Some(mut batch) = self.in_flight.pop_front() else { break };
            self.in_flight_pages.data -= batch.pages.data;
            self.in_flight_pages.zero -= batch.pages.zero;
            self.pace.landed(batch.bytes_under_way, batch.sent.elapsed());
            let gauge = self.gauge();
            gauge.landed_bytes.fetch_add(batch.pages.data_bytes(), Ordering::Relaxed);
            gauge.landed_zero_pages.fetch_add(batch.pages.zero, Ordering::Relaxed);
            batch.runs.clear();
            self.spare.push(batch.runs);
        }
        self.publish();
        Ok(())
    }

    fn check_stop(&self) -> Result<(), Error> {
        if self.setup.stop.load(Ordering::Relaxed) {
            return Err(Error::Transport(TransportError::Interrupted));
        }
        Ok(())
    }

    fn publish(&self) {
        self.gauge().publish_counters(&self.setup.pages.counters());
    }

    /// What was taken from the ledger and has not landed.
    fn leftover(&mut self) -> Vec<Run> {
        let under_way = self.in_flight.drain(..).flat_map(|batch| batch.runs);
        under_way.chain(self.batch.drain(..)).collect()
    }
}

/// The word of a page, counted from the first page of the first word.
fn word_index(page: u64) -> usize {
    usize::try_from(page / WORD_PAGES).unwrap_or(usize::MAX)
}

/// A stripe's words with the bits of a range set.
fn bits_of(range: Range<u64>) -> StripeBits {
    std::array::from_fn(|word| {
        let begin = word as u64 * WORD_PAGES;
        let from = range.start.clamp(begin, begin + WORD_PAGES) - begin;
        let to = range.end.clamp(begin, begin + WORD_PAGES) - begin;
        if from < to { (u64::MAX >> (WORD_PAGES - (to - from))) << from } else { 0 }
    })
}

#[cfg(all(test, not(loom)))]
mod tests;
