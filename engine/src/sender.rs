//! A sender thread: owns its stripes of the bitmap and one data channel.
//!
//! For each dirty stripe: re-arm it, look at each dirty page, and put it into a batch as data or
//! as zero, or leave it out because the destination knows it to be zero. Batches go out in
//! order; what has not landed is remembered, so that it can be put back.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use crossbeam_utils::CachePadded;

use crate::dirty::{DirtyBitmap, DirtySources, WORD_PAGES};
use crate::error::Error;
use crate::memory::{GuestMemory, PAGE_BYTES, PageRange};
use crate::partition::{Partition, Stripe};
use crate::progress::Shared;
use crate::session::Input;
use crate::stats::ChannelGauge;
use crate::transport::{Capabilities, PageSender, Run, RunKind, Ticket, TransportError};

/// Page bytes in a batch: enough that its fixed cost vanishes, little enough that several are
/// under way. Against 1 MiB it halves the system calls (`pageferry-bench throughput`).
const BATCH_BYTES: u64 = 4 << 20;

/// Bounds on what was sent and has not landed, a channel: what must be remembered, and what the
/// last round may have to wait for.
const IN_FLIGHT_BYTES: u64 = 32 << 20;
const IN_FLIGHT_BATCHES: usize = 256;

/// Page bytes after which a busy sender asks what has landed. More often costs a system call
/// each time, and tells nothing: receivers acknowledge now and then.
const REAP_EVERY_BYTES: u64 = 4 << 20;

/// How often a waiting sender looks for commands and cancelling.
const GLANCE: Duration = Duration::from_micros(500);

/// Longest wait for a batch under the bandwidth limit, so that a limit near zero that is lifted
/// again does not hold a sender for good.
const LONGEST_TURN: Duration = Duration::from_secs(1);

/// What the driver tells a sender.
pub(crate) enum Command {
    /// Send what `dirty` says of your stripes.
    Round {
        dirty: Arc<DirtyBitmap>,
        /// Report only when everything has landed: the last round.
        settle: bool,
    },
    /// End the channel in order, and the thread.
    Finish,
}

/// What a sender tells the driver.
pub(crate) enum SenderReport {
    /// The round's pages are sent (or landed, if it was to settle).
    RoundDone { at: Instant },
    /// The channel ended in order, and the thread.
    Finished,
    /// The channel is broken; the thread has ended.
    Failed(Error),
}

/// All that a sender thread needs.
pub(crate) struct SenderSetup {
    pub(crate) channel: u16,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) sources: Arc<DirtySources>,
    pub(crate) partition: Partition,
    pub(crate) pages: Box<dyn PageSender>,
    pub(crate) capabilities: Capabilities,
    pub(crate) gauges: Arc<Vec<CachePadded<ChannelGauge>>>,
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) commands: Receiver<Command>,
    pub(crate) feed: Sender<Input<SenderReport>>,
    /// Where pages go that have not landed when the thread ends.
    pub(crate) leftovers: Sender<DirtyBitmap>,
}

struct InFlight {
    ticket: Ticket,
    bytes: u64,
    runs: Vec<Run>,
}

struct SenderThread {
    setup: SenderSetup,
    /// Dirty pages of my stripes that are in no batch yet; my stripes' words one after another.
    pending: Vec<u64>,
    /// Pages of my stripes that may hold data at the destination; laid out like `pending`.
    sent_data: Vec<u64>,
    /// Whether all my stripes were looked at once. Only the first look finds large holes.
    seen_all: bool,
    /// The run of pages that hold something that was found last, with its region.
    known_data: (u16, Range<u64>),
    batch: Vec<Run>,
    batch_bytes: u64,
    max_batch_bytes: u64,
    max_batch_runs: usize,
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: u64,
    /// Page bytes sent since the last look at what has landed.
    unreaped_bytes: u64,
    /// Whether the bandwidth limit applies.
    limited: bool,
}

/// The body of a sender thread.
pub(crate) fn run(setup: SenderSetup) {
    let words = setup.partition.words(setup.channel);
    let mut thread = SenderThread {
        pending: vec![0; words],
        sent_data: vec![0; words],
        seen_all: false,
        known_data: (0, 0..0),
        batch: Vec::new(),
        batch_bytes: 0,
        // A batch holds at least one page, whatever a transport says.
        max_batch_bytes: setup.capabilities.max_batch_bytes.clamp(PAGE_BYTES, BATCH_BYTES),
        max_batch_runs: setup.capabilities.max_batch_runs.max(1),
        in_flight: VecDeque::new(),
        in_flight_bytes: 0,
        unreaped_bytes: 0,
        limited: true,
        setup,
    };
    let result = thread.serve();
    thread.publish();
    // Rounds that were given and never begun are left over too.
    while let Ok(command) = thread.setup.commands.try_recv() {
        if let Command::Round { dirty, .. } = command {
            thread.take_up(&dirty);
        }
    }
    let leftover = thread.leftover();
    if !leftover.is_empty() {
        // The driver may be gone already; then nobody wants it.
        let _ = thread.setup.leftovers.send(leftover);
    }
    let report = result.map_or_else(SenderReport::Failed, |()| SenderReport::Finished);
    let _ = thread.setup.feed.send(Input::Report(report));
}

impl SenderThread {
    fn serve(&mut self) -> Result<(), Error> {
        loop {
            match self.next_command()? {
                None => return Ok(()),
                Some(Command::Finish) => return Ok(self.setup.pages.finish()?),
                Some(Command::Round { dirty, settle }) => {
                    self.take_up(&dirty);
                    // The last round is sent with the guest standing still.
                    self.limited = !settle;
                    // Given back before the report, so that the driver can reuse it.
                    drop(dirty);
                    self.scan()?;
                    if settle {
                        self.settle()?;
                    }
                    self.publish();
                    let report = SenderReport::RoundDone { at: Instant::now() };
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

    /// Adds the harvest's words of my stripes to what is pending.
    fn take_up(&mut self, dirty: &DirtyBitmap) {
        let mut mine = 0;
        for stripe in self.setup.partition.stripes(self.setup.channel) {
            let words = &dirty.region_words(stripe.region)[stripe.first_word..][..stripe.words];
            let pending = &mut self.pending[mine..][..stripe.words];
            pending.iter_mut().zip(words).for_each(|(pending, word)| *pending |= word);
            mine += stripe.words;
        }
    }

    /// Sends all that is pending.
    fn scan(&mut self) -> Result<(), Error> {
        let partition = self.setup.partition.clone();
        let mut mine = 0;
        for stripe in partition.stripes(self.setup.channel) {
            let words = mine..mine + stripe.words;
            mine = words.end;
            if self.pending[words.clone()].iter().all(|word| *word == 0) {
                continue;
            }
            // Re-arm, then read: a write from here on shows in the next harvest.
            self.setup.sources.rearm(
                stripe.region,
                stripe.first_page(),
                &self.pending[words.clone()],
            )?;
            if !self.seen_all {
                self.skip_holes(stripe, words.start);
            }
            self.scan_stripe(stripe, words.start)?;
        }
        self.seen_all = true;
        self.send_batch()
    }

    /// Counts pages of a stripe that were never written as zero, without reading them: reading
    /// would allocate them. After the re-arm: who writes from now on is in the next harvest.
    ///
    /// Only runs of data are remembered from one stripe to the next, never holes: a hole seen
    /// before this stripe's re-arm may have been written since.
    fn skip_holes(&mut self, stripe: Stripe, mine: usize) {
        let begin = stripe.first_page();
        let end = begin + stripe.words as u64 * WORD_PAGES;
        let mut page = begin;
        while page < end {
            let (region, data) = &self.known_data;
            if *region == stripe.region && data.contains(&page) {
                page = data.end;
                continue;
            }
            let data = self.setup.memory.next_data(stripe.region, page, end);
            let hole_end = data.as_ref().map_or(end, |data| data.start);
            for hole in page..hole_end {
                let word = &mut self.pending[mine + word_index(hole - begin)];
                let mask = 1 << (hole % WORD_PAGES);
                if *word & mask != 0 {
                    *word &= !mask;
                    let gauge = &self.setup.gauges[usize::from(self.setup.channel)];
                    gauge.zero_pages.fetch_add(1, Ordering::Relaxed);
                }
            }
            page = hole_end;
            if let Some(data) = data {
                self.known_data = (stripe.region, data);
            }
        }
    }

    fn scan_stripe(&mut self, stripe: Stripe, mine: usize) -> Result<(), Error> {
        for word in 0..stripe.words {
            while self.pending[mine + word] != 0 {
                let bit = self.pending[mine + word].trailing_zeros();
                let page = stripe.first_page() + word as u64 * WORD_PAGES + u64::from(bit);
                let mask = 1 << bit;
                let gauge = &self.setup.gauges[usize::from(self.setup.channel)];
                let kind = if self.setup.memory.is_zero(stripe.region, page)? {
                    gauge.zero_pages.fetch_add(1, Ordering::Relaxed);
                    RunKind::Zero
                } else {
                    gauge.data_pages.fetch_add(1, Ordering::Relaxed);
                    RunKind::Data
                };
                let known_zero = self.sent_data[mine + word] & mask == 0;
                if kind == RunKind::Data {
                    self.sent_data[mine + word] |= mask;
                } else {
                    self.sent_data[mine + word] &= !mask;
                }
                if kind == RunKind::Data || !known_zero {
                    self.append(stripe.region, page, kind)?;
                }
                self.pending[mine + word] &= !mask;
            }
        }
        Ok(())
    }

    /// Adds a page to the batch, to its last run if it continues that one.
    fn append(&mut self, region: u16, page: u64, kind: RunKind) -> Result<(), Error> {
        let bytes = if kind == RunKind::Data { PAGE_BYTES } else { 0 };
        let mut most_bytes = self.max_batch_bytes;
        if self.limited {
            most_bytes = most_bytes.min(self.setup.shared.bandwidth_at_a_time());
        }
        if self.batch_bytes > 0 && self.batch_bytes + bytes > most_bytes {
            self.send_batch()?;
        }
        let continues = |run: &&mut Run| {
            run.kind == kind
                && run.range.region == region
                && run.range.first_page + u64::from(run.range.pages) == page
                && run.range.pages < u32::MAX
        };
        if let Some(run) = self.batch.last_mut().filter(continues) {
            run.range.pages += 1;
        } else {
            if self.batch.len() == self.max_batch_runs {
                self.send_batch()?;
            }
            let range = PageRange { region, first_page: page, pages: 1 };
            self.batch.push(Run { range, kind });
        }
        self.batch_bytes += bytes;
        Ok(())
    }

    fn send_batch(&mut self) -> Result<(), Error> {
        self.check_stop()?;
        if self.batch.is_empty() {
            return Ok(());
        }
        while self.in_flight_bytes > IN_FLIGHT_BYTES || self.in_flight.len() >= IN_FLIGHT_BATCHES {
            self.reap(Some(GLANCE))?;
        }
        if self.limited {
            self.wait_for_bandwidth()?;
        }
        let ticket = self.setup.pages.send(&self.batch)?;
        let runs = std::mem::take(&mut self.batch);
        let bytes = std::mem::take(&mut self.batch_bytes);
        self.in_flight.push_back(InFlight { ticket, bytes, runs });
        self.in_flight_bytes += bytes;
        self.unreaped_bytes += bytes;
        if self.unreaped_bytes < REAP_EVERY_BYTES && self.in_flight.len() < IN_FLIGHT_BATCHES / 2 {
            return Ok(());
        }
        self.reap(None)
    }

    /// Waits for the batch's turn under the bandwidth limit.
    fn wait_for_bandwidth(&mut self) -> Result<(), Error> {
        let wait = self.setup.shared.take_bandwidth(self.batch_bytes);
        let turn = Instant::now() + wait.min(LONGEST_TURN);
        while let Some(wait) = turn.checked_duration_since(Instant::now()) {
            if wait.is_zero() {
                break;
            }
            std::thread::sleep(wait.min(GLANCE));
            self.reap(None)?;
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
            let Some(batch) = self.in_flight.pop_front() else { break };
            self.in_flight_bytes -= batch.bytes;
            let gauge = &self.setup.gauges[usize::from(self.setup.channel)];
            gauge.landed_bytes.fetch_add(batch.bytes, Ordering::Relaxed);
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
        let gauge = &self.setup.gauges[usize::from(self.setup.channel)];
        gauge.publish_counters(&self.setup.pages.counters());
    }

    /// All pages of mine that are dirty and have not landed.
    fn leftover(&self) -> DirtyBitmap {
        let mut leftover = DirtyBitmap::new(self.setup.memory.layout());
        let mut mine = 0;
        for stripe in self.setup.partition.stripes(self.setup.channel) {
            let words = &self.pending[mine..][..stripe.words];
            leftover.merge_words(stripe.region, stripe.first_page(), words);
            mine += stripe.words;
        }
        let under_way = self.in_flight.iter().flat_map(|batch| &batch.runs);
        for Run { range, .. } in under_way.chain(&self.batch) {
            for page in range.first_page..range.first_page + u64::from(range.pages) {
                leftover.set(range.region, page);
            }
        }
        leftover
    }
}

/// The word of a page, counted from the first page of the first word.
fn word_index(page: u64) -> usize {
    usize::try_from(page / WORD_PAGES).unwrap_or(usize::MAX)
}
