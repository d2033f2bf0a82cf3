//! The source's end of a connection for pages: writes into the destination's memory.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::memory::PageRange;
use pageferry::transport::{
    Capabilities, ChannelCounters, Interrupt, PageSender, Registration, Run, RunKind, Ticket,
    TransportError, Watermarks,
};

use crate::after;
use crate::announce::Directory;
use crate::dial::LINGER;
use crate::memory::{Registered, transfers};
use crate::pipe::{Outlet, Transfer};
use crate::table::RemoteTable;
use crate::zeros::{self, END, RUNS_AT_ONCE, Zeroing};

/// Page bytes after which a mark tells what has landed, unasked.
const MARK_EVERY_BYTES: u64 = 8 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    Finished,
    Broken,
}

/// The source's end of a data channel.
#[derive(Debug)]
pub(crate) struct RdmaPageSender {
    outlet: Outlet,
    here: Arc<Registered>,
    /// This thread's copy of what the directory knows.
    there: RemoteTable,
    directory: Arc<Directory>,
    capabilities: Capabilities,
    slice_bytes: u64,
    phase: Phase,
    sent: Ticket,
    marks: Watermarks,
    /// For each batch that is not released: the request that is its last.
    last_requests: VecDeque<(Ticket, u64)>,
    /// For marks that are not taken: the batch up to which they tell, and their number.
    pending: VecDeque<(Ticket, u64)>,
    zeroing: Zeroing,
    unmarked_bytes: u64,
    wire_bytes: u64,
    /// What this thread registered of guest memory here.
    registered: Registration,
    /// The writes and mentions of a batch, kept so that they need not be allocated anew.
    writes: Vec<Transfer>,
    mentions: Vec<PageRange>,
}

impl RdmaPageSender {
    pub(crate) fn new(
        outlet: Outlet,
        here: Arc<Registered>,
        directory: Arc<Directory>,
        capabilities: Capabilities,
        slice_bytes: u64,
    ) -> Self {
        Self {
            outlet,
            there: RemoteTable::new(here.memory.layout()),
            here,
            directory,
            capabilities,
            slice_bytes,
            phase: Phase::Open,
            sent: 0,
            marks: Watermarks::default(),
            last_requests: VecDeque::new(),
            pending: VecDeque::new(),
            zeroing: Zeroing::default(),
            unmarked_bytes: 0,
            wire_bytes: 0,
            registered: Registration::default(),
            writes: Vec::new(),
            mentions: Vec::new(),
        }
    }

    fn check_open(&self) -> Result<(), TransportError> {
        self.outlet.check()?;
        match self.phase {
            Phase::Open => Ok(()),
            Phase::Finished => Err(TransportError::OutOfOrder("the data channel is finished")),
            Phase::Broken => Err(TransportError::Lost {
                operation: "send pages",
                cause: std::io::ErrorKind::NotConnected.into(),
            }),
        }
    }

    /// What fails once fails for good.
    fn guard<T>(
        &mut self,
        act: impl FnOnce(&mut Self) -> Result<T, TransportError>,
    ) -> Result<T, TransportError> {
        let result = act(self);
        if result.is_err() {
            self.phase = Phase::Broken;
        }
        result
    }

    fn put(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        self.directory.refresh(&mut self.there)?;
        let mut writes = std::mem::take(&mut self.writes);
        let mut mentions = std::mem::take(&mut self.mentions);
        writes.clear();
        mentions.clear();
        let mut last_page = None;
        let mut bytes = 0;
        for Run { range, kind } in runs {
            match kind {
                RunKind::Zero => mentions.push(*range),
                RunKind::Data => {
                    self.await_zeroed(range)?;
                    let last = range.first_page + u64::from(range.pages) - 1;
                    // Named in order: with the last page all of the run are known.
                    if self.there.piece(range.region, last).is_none() {
                        // What can go goes first.
                        self.outlet.write(&writes)?;
                        writes.clear();
                        let check = || self.outlet.check();
                        self.directory.await_page(&mut self.there, range.region, last, check)?;
                    }
                    last_page = Some((range.region, last));
                    let there = |region, page| self.there.known(region, page);
                    let (memory, cost) = (&self.here, &mut self.registered);
                    let here = |region, page| memory.piece(region, page, cost);
                    bytes += transfers(*range, here, there, self.slice_bytes, &mut writes)?;
                }
            }
        }
        self.outlet.write(&writes)?;
        for some in mentions.chunks(RUNS_AT_ONCE) {
            let message = zeros::encode(some);
            self.wire_bytes += message.len() as u64;
            let number = self.outlet.message(&message, None)?;
            self.zeroing.mention(some, number);
        }
        (self.writes, self.mentions) = (writes, mentions);
        self.wire_bytes += bytes;
        self.unmarked_bytes += bytes;
        self.sent += 1;
        self.last_requests.push_back((self.sent, self.outlet.posted()));
        if self.unmarked_bytes >= MARK_EVERY_BYTES {
            self.mark(None)?;
        }
        if let Some((region, page)) = last_page {
            // While the NIC is busy with what was posted.
            self.here.go_beyond(region, page, &mut self.registered)?;
        }
        Ok(self.sent)
    }

    /// Waits until the destination does not touch pages any more.
    fn await_zeroed(&mut self, range: &PageRange) -> Result<(), TransportError> {
        let Some(number) = self.zeroing.mentioned_by(range) else { return Ok(()) };
        // Messages are acknowledged now and then, marks at once.
        self.mark(None)?;
        while self.outlet.taken() < number {
            self.outlet.pump(Some(Instant::now() + LINGER))?;
        }
        self.advance();
        Ok(())
    }

    /// Waits for a credit, at most until `deadline`.
    fn mark(&mut self, deadline: Option<Instant>) -> Result<(), TransportError> {
        let number = self.outlet.mark(deadline)?;
        self.pending.push_back((self.sent, number));
        self.unmarked_bytes = 0;
        Ok(())
    }

    fn advance(&mut self) {
        let (done, taken) = (self.outlet.done(), self.outlet.taken());
        let covered = |queue: &mut VecDeque<(Ticket, u64)>, upto: u64| {
            let count = queue.partition_point(|(_, number)| *number <= upto);
            queue.drain(..count).next_back().map(|(ticket, _)| ticket)
        };
        let released = covered(&mut self.last_requests, done);
        let landed = covered(&mut self.pending, taken);
        self.marks.landed = landed.unwrap_or(self.marks.landed);
        self.marks.released = released.unwrap_or(self.marks.released).max(self.marks.landed);
        self.zeroing.forget(taken);
    }

    fn await_landing(&mut self, wait: Duration) -> Result<(), TransportError> {
        let before = self.marks.landed;
        let deadline = after(wait);
        if self.pending.back().is_none_or(|(ticket, _)| *ticket < self.sent) {
            match self.mark(Some(deadline)) {
                // Marks before this one are not answered, and there is no credit for it.
                Err(TransportError::TimedOut { .. }) => {}
                marked => marked?,
            }
        }
        self.advance();
        while self.marks.landed == before && Instant::now() < deadline {
            self.outlet.pump(Some(deadline))?;
            self.advance();
        }
        Ok(())
    }
}

impl PageSender for RdmaPageSender {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        self.check_open()?;
        self.capabilities.check(runs)?;
        runs.iter().try_for_each(|run| self.here.memory.span(run.range).map(drop))?;
        self.guard(|sender| sender.put(runs))
    }

    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
        self.outlet.check()?;
        if self.phase == Phase::Broken {
            self.check_open()?;
        }
        self.guard(|sender| {
            sender.outlet.attend()?;
            sender.advance();
            if let Some(wait) = wait
                && sender.marks.landed < sender.sent
                && sender.phase == Phase::Open
            {
                sender.await_landing(wait)?;
            }
            Ok(sender.marks)
        })
    }

    fn counters(&self) -> ChannelCounters {
        ChannelCounters {
            wire_bytes: self.wire_bytes,
            system_calls: self.outlet.system_calls(),
            work_requests: self.outlet.connection.work_requests(),
            registered: self.registered,
            ..ChannelCounters::default()
        }
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        self.check_open()?;
        self.guard(|sender| {
            sender.outlet.message(&[END], None)?;
            sender.outlet.flush(LINGER)
        })?;
        self.phase = Phase::Finished;
        Ok(())
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.outlet.connection.interrupter()
    }
}
