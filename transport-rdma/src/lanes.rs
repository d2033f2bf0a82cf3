//! Lanes for reads: the destination's NIC fetches pages of the source, whose CPU only waits for the end.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry::memory::PageRange;
use pageferry::transport::reads::check_request;
use pageferry::transport::{
    ChannelCounters, Interrupt, PageCounts, PageReceiver, PageRequests, PageServer, ReadLane,
    Received, Registration, Ticket, TransportError,
};

use crate::CAPABILITIES;
use crate::connection::{SPIN, Sleeper};
use crate::memory::{Registered, transfers};
use crate::pipe::{Inlet, KEEPALIVE, Outlet, Transfer};
use crate::table::RemoteTable;

/// How often somebody who waits for another thread looks by himself.
const GLANCE: Duration = Duration::from_millis(20);

/// The source's end: a queue pair that lets the other side read.
#[derive(Debug)]
pub(crate) struct RdmaPageServer {
    outlet: Outlet,
    /// After the queue pair: nothing is read any more when it goes.
    _registered: Arc<Registered>,
}

impl RdmaPageServer {
    pub(crate) fn new(outlet: Outlet, registered: Arc<Registered>) -> Self {
        Self { outlet, _registered: registered }
    }
}

impl PageServer for RdmaPageServer {
    fn serve(&mut self) -> Result<(), TransportError> {
        loop {
            self.outlet.check()?;
            if self.outlet.connection.has_left() {
                return Ok(());
            }
            let served = self
                .outlet
                .pump(Some(Instant::now() + KEEPALIVE))
                .and_then(|()| self.outlet.attend());
            match served {
                Err(TransportError::Lost { .. }) if self.outlet.connection.has_left() => {
                    return Ok(());
                }
                served => served?,
            }
        }
    }

    fn counters(&self) -> ChannelCounters {
        ChannelCounters {
            system_calls: self.outlet.system_calls(),
            work_requests: self.outlet.connection.work_requests(),
            ..ChannelCounters::default()
        }
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.outlet.connection.interrupter()
    }
}

/// Pages that are under way.
#[derive(Debug)]
struct UnderWay {
    /// The work request that is the last of it.
    last: u64,
    counts: PageCounts,
}

/// What both halves of the destination's end use.
#[derive(Debug)]
struct Lane {
    sleeper: Sleeper,
    reads: Mutex<Reads>,
    /// Some have landed, or the lane is over.
    changed: Condvar,
    slice_bytes: u64,
}

#[derive(Debug)]
struct Reads {
    inlet: Inlet,
    /// After the queue pair: nothing is written any more when it goes.
    here: Arc<Registered>,
    there: RemoteTable,
    under_way: VecDeque<UnderWay>,
    asked: Ticket,
    /// Nothing more is asked for.
    finished: bool,
    /// It failed, and whoever comes later is told so.
    broken: bool,
    registered: Registration,
    wire_bytes: u64,
}

/// The destination's end.
pub(crate) fn lane(
    inlet: Inlet,
    here: Arc<Registered>,
    there: RemoteTable,
    slice_bytes: u64,
) -> Result<ReadLane, TransportError> {
    let sleeper = inlet.connection.sleeper().map_err(|cause| TransportError::Io {
        operation: "share a channel of completions",
        cause,
    })?;
    let reads = Mutex::new(Reads {
        inlet,
        here,
        there,
        under_way: VecDeque::new(),
        asked: 0,
        finished: false,
        broken: false,
        registered: Registration::default(),
        wire_bytes: 0,
    });
    let lane = Arc::new(Lane { sleeper, reads, changed: Condvar::new(), slice_bytes });
    let requests = Box::new(RdmaPageRequests { lane: Arc::clone(&lane) });
    Ok(ReadLane { requests, landings: Box::new(RdmaPageLandings { lane }) })
}

impl Lane {
    fn reads(&self) -> MutexGuard<'_, Reads> {
        // A thread that panicked in there has left the queue pair as it is; what it counted stays true.
        self.reads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whatever fails ends the lane, for both halves.
    fn keep<T>(
        &self,
        reads: &mut Reads,
        result: Result<T, TransportError>,
    ) -> Result<T, TransportError> {
        if result.is_err() {
            reads.broken = true;
            reads.inlet.connection.id.disconnect();
            self.changed.notify_all();
        }
        result
    }

    /// Asks for pages; waits for room.
    fn request(&self, ranges: &[PageRange]) -> Result<Ticket, TransportError> {
        let mut reads = self.reads();
        reads.check(&self.sleeper)?;
        if reads.finished {
            return Err(TransportError::OutOfOrder("the lane is finished"));
        }
        let runs = check_request(&CAPABILITIES, &reads.here.memory, ranges)?;
        let (transfers, bytes) = reads.transfers(ranges, self.slice_bytes)?;
        let mut left = &transfers[..];
        while !left.is_empty() {
            let posted = reads.inlet.post_reads(left);
            let posted = self.keep(&mut reads, posted)?;
            left = &left[posted..];
            if left.is_empty() {
                break;
            }
            // Whoever takes the landings makes room, or nobody does.
            let waited = self.changed.wait_timeout(reads, GLANCE);
            reads = waited.unwrap_or_else(PoisonError::into_inner).0;
            reads.check(&self.sleeper)?;
        }
        reads.asked += 1;
        reads.wire_bytes += bytes;
        let last = reads.inlet.posted();
        reads.under_way.push_back(UnderWay { last, counts: PageCounts::of(&runs) });
        Ok(reads.asked)
    }

    /// What has landed, in order; `None` if that is nothing yet, which ends the next sleep.
    fn next(&self) -> Result<Option<Received>, TransportError> {
        let mut reads = self.reads();
        let until = Instant::now() + SPIN;
        loop {
            reads.check(&self.sleeper)?;
            let pumped = reads.inlet.take_completions();
            self.keep(&mut reads, pumped)?;
            self.changed.notify_all();
            if let Some(landed) = reads.take_landed() {
                return Ok(Some(landed));
            }
            if reads.finished && reads.under_way.is_empty() {
                // The source waits for that.
                reads.inlet.connection.id.disconnect();
                return Ok(Some(Received::End));
            }
            if Instant::now() >= until {
                break;
            }
            drop(reads);
            std::thread::yield_now();
            reads = self.reads();
        }
        let asked = reads.inlet.ask_if_silent();
        self.keep(&mut reads, asked)?;
        reads.inlet.connection.wake()?;
        // One that came just before does not wake anybody.
        let pumped = reads.inlet.take_completions();
        self.keep(&mut reads, pumped)?;
        Ok(reads.take_landed())
    }

    fn counters(&self) -> ChannelCounters {
        let reads = self.reads();
        ChannelCounters {
            wire_bytes: reads.wire_bytes,
            system_calls: reads.inlet.system_calls(),
            work_requests: reads.inlet.connection.work_requests(),
            registered: reads.registered,
            ..ChannelCounters::default()
        }
    }
}

impl Reads {
    fn check(&self, sleeper: &Sleeper) -> Result<(), TransportError> {
        sleeper.state().check()?;
        if self.broken {
            let cause = io::ErrorKind::BrokenPipe.into();
            return Err(TransportError::Lost { operation: "read pages", cause });
        }
        Ok(())
    }

    /// The first request, if it has landed.
    fn take_landed(&mut self) -> Option<Received> {
        let is_done = self.under_way.front().is_some_and(|first| first.last <= self.inlet.done());
        let landed = if is_done { self.under_way.pop_front() } else { None };
        landed.map(|landed| Received::Batch(landed.counts))
    }

    fn transfers(
        &mut self,
        ranges: &[PageRange],
        slice_bytes: u64,
    ) -> Result<(Vec<Transfer>, u64), TransportError> {
        let (mut reads, mut bytes) = (Vec::new(), 0);
        for range in ranges {
            let there = |region, page| self.there.known(region, page);
            let (memory, cost) = (&self.here, &mut self.registered);
            let here = |region, page| memory.piece(region, page, cost);
            bytes += transfers(*range, here, there, slice_bytes, &mut reads)?;
        }
        Ok((reads, bytes))
    }
}

/// The half that asks.
#[derive(Debug)]
struct RdmaPageRequests {
    lane: Arc<Lane>,
}

impl PageRequests for RdmaPageRequests {
    fn request(&mut self, ranges: &[PageRange]) -> Result<Ticket, TransportError> {
        self.lane.request(ranges)
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        let mut reads = self.lane.reads();
        reads.check(&self.lane.sleeper)?;
        reads.finished = true;
        // Its completion wakes who takes the landings.
        let said = reads.inlet.acknowledge_anew();
        self.lane.keep(&mut reads, said)
    }

    fn counters(&self) -> ChannelCounters {
        ChannelCounters::default()
    }
}

impl Drop for RdmaPageRequests {
    fn drop(&mut self) {
        let mut reads = self.lane.reads();
        if !reads.finished {
            reads.broken = true;
            reads.inlet.connection.id.disconnect();
        }
    }
}

/// The half where pages land.
#[derive(Debug)]
struct RdmaPageLandings {
    lane: Arc<Lane>,
}

impl PageReceiver for RdmaPageLandings {
    fn receive(&mut self) -> Result<Received, TransportError> {
        loop {
            if let Some(received) = self.lane.next()? {
                return Ok(received);
            }
            self.lane.sleeper.sleep(KEEPALIVE)?;
        }
    }

    fn counters(&self) -> ChannelCounters {
        self.lane.counters()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.lane.reads().inlet.connection.interrupter()
    }
}
