//! A transport inside one process. Page bytes are copied twice on the way, and counted as
//! copied: it is for tests, and the smallest complete example of the port.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{
    Receiver, Sender, TryRecvError, after, at, bounded, never, select, unbounded,
};

use crate::pages::memory::{GuestMemory, PageRange};
use crate::transport::reads::{answer, check_request};
use crate::transport::{
    Attempts, Capabilities, ChannelCounters, Connector, ControlChannel, ControlReceiver,
    ControlSender, DestinationLink, Interrupt, LandingWatch, Link, LinkPurpose, MAX_BATCH_RUNS,
    PageCounts, PageReceiver, PageRequests, PageSender, PageServer, ReadLane, Received,
    Registration, Rendezvous, Run, RunKind, SourceLink, Stages, Ticket, TransportError, Watermarks,
    check_frame,
};

/// Batches and frames that may wait on a channel before its sender does.
const DEPTH: usize = 16;
const MAX_BATCH_BYTES: u64 = 1 << 20;

const CAPABILITIES: Capabilities = Capabilities {
    one_sided_write: false,
    one_sided_read: false,
    zero_copy: false,
    needs_registration: false,
    protects_pages: true,
    tells_landings: true,
    max_batch_bytes: MAX_BATCH_BYTES,
    max_batch_runs: MAX_BATCH_RUNS,
};

/// Two ends of a link.
pub fn pair() -> (MemorySource, MemoryDestination) {
    let (to_destination, from_source) = bounded(DEPTH);
    let (to_source, from_destination) = bounded(DEPTH);
    let (lanes_out, lanes_in) = bounded(1);
    let (reads_out, reads_in) = bounded(1);
    let source = End::new(to_destination, from_destination);
    let destination = End::new(to_source, from_source);
    (
        MemorySource { end: source, lanes: lanes_out, reads: reads_out },
        MemoryDestination { end: destination, lanes: lanes_in, reads: reads_in },
    )
}

/// Where one source and one destination find each other, as often as they like.
pub fn meeting() -> (MemoryDialler, MemoryRendezvous) {
    let (there, links) = unbounded();
    let dial = Box::new(
        |_: LinkPurpose, here: MemorySource| -> Result<Box<dyn SourceLink>, TransportError> {
            Ok(Box::new(here))
        },
    );
    (
        MemoryDialler { there, dial, attempts: Arc::default() },
        MemoryRendezvous { links, stop: Stop::new() },
    )
}

type Dial =
    dyn FnMut(LinkPurpose, MemorySource) -> Result<Box<dyn SourceLink>, TransportError> + Send;

/// What a source dials by.
pub struct MemoryDialler {
    there: Sender<MemoryDestination>,
    dial: Box<Dial>,
    attempts: Arc<Attempts>,
}

impl MemoryDialler {
    /// Makes something else of each link, or an error: then the destination hears nothing of it.
    #[must_use]
    pub fn wrapped(
        mut self,
        dial: impl FnMut(LinkPurpose, MemorySource) -> Result<Box<dyn SourceLink>, TransportError>
        + Send
        + 'static,
    ) -> Self {
        self.dial = Box::new(dial);
        self
    }

    /// For somebody else who dials the same destination.
    pub fn of_another(&self) -> impl Fn() -> MemorySource + Send + 'static {
        let there = self.there.clone();
        move || {
            let (here, link) = pair();
            // A destination that is gone is of no matter to it.
            let _ = there.send(link);
            here
        }
    }
}

impl std::fmt::Debug for MemoryDialler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryDialler").finish_non_exhaustive()
    }
}

impl Connector for MemoryDialler {
    fn connect(&mut self, purpose: LinkPurpose) -> Result<Box<dyn SourceLink>, TransportError> {
        let (here, there) = pair();
        let link =
            self.attempts.make(Arc::new(Attempts::default()), || (self.dial)(purpose, here))?;
        self.there.send(there).map_err(|_| lost("reach the destination"))?;
        Ok(link)
    }

    fn redials(&self) -> bool {
        true
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.attempts) as Arc<dyn Interrupt>
    }
}

/// Where a destination waits.
#[derive(Debug)]
pub struct MemoryRendezvous {
    links: Receiver<MemoryDestination>,
    stop: Arc<Stop>,
}

impl Rendezvous for MemoryRendezvous {
    fn accept(
        &mut self,
        _: LinkPurpose,
        timeout: Option<Duration>,
    ) -> Result<Box<dyn DestinationLink>, TransportError> {
        self.stop.check()?;
        let deadline = timeout.map_or_else(never, after);
        select! {
            recv(self.links) -> link => match link {
                Ok(link) => Ok(Box::new(link)),
                Err(_) => Err(TransportError::Io {
                    operation: "wait for a source",
                    cause: io::Error::other("nobody is left who could dial"),
                }),
            },
            recv(self.stop.stopped) -> _ => Err(TransportError::Interrupted),
            recv(deadline) -> _ => Err(TransportError::TimedOut {
                operation: "wait for a source",
                after: timeout.unwrap_or_default(),
            }),
        }
    }

    fn waits_again(&self) -> bool {
        true
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.stop) as Arc<dyn Interrupt>
    }
}

/// The source's end.
#[derive(Debug)]
pub struct MemorySource {
    end: End,
    lanes: Sender<Vec<LaneOut>>,
    reads: Sender<Vec<ReadOut>>,
}

/// The destination's end.
#[derive(Debug)]
pub struct MemoryDestination {
    end: End,
    lanes: Receiver<Vec<LaneOut>>,
    reads: Receiver<Vec<ReadOut>>,
}

/// What both ends have.
#[derive(Debug)]
struct End {
    stages: Stages<Arc<GuestMemory>>,
    stop: Arc<Stop>,
}

impl End {
    fn new(frames_out: Sender<Vec<u8>>, frames_in: Receiver<Vec<u8>>) -> Self {
        let stop = Stop::new();
        let sender = FrameSender { frames: frames_out, stop: Arc::clone(&stop), broken: false };
        let sender = Box::new(sender);
        let receiver = Box::new(FrameReceiver { frames: frames_in, stop: Arc::clone(&stop) });
        Self { stages: Stages::new(ControlChannel { sender, receiver }), stop }
    }

    /// What data channels need, which are opened once.
    fn memory(&self) -> Result<Arc<GuestMemory>, TransportError> {
        self.stages.check_closed()?;
        self.stages.registered()
    }
}

/// Interrupts one end or one lane: the latch's sender is dropped, which wakes everyone who selects on it.
#[derive(Debug)]
struct Stop {
    hold: Mutex<Option<Sender<()>>>,
    stopped: Receiver<()>,
}

impl Stop {
    fn new() -> Arc<Self> {
        let (hold, stopped) = bounded(0);
        Arc::new(Self { hold: Mutex::new(Some(hold)), stopped })
    }

    /// For a lane, which is interrupted with its end or alone.
    fn with_own(self: &Arc<Self>) -> LaneStop {
        LaneStop { end: Arc::clone(self), own: Self::new() }
    }

    fn check(&self) -> Result<(), TransportError> {
        match self.stopped.try_recv() {
            Err(TryRecvError::Disconnected) => Err(TransportError::Interrupted),
            _ => Ok(()),
        }
    }
}

impl Interrupt for Stop {
    fn interrupt(&self) {
        *self.hold.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[derive(Debug, Clone)]
struct LaneStop {
    end: Arc<Stop>,
    own: Arc<Stop>,
}

impl LaneStop {
    fn check(&self) -> Result<(), TransportError> {
        self.end.check().and_then(|()| self.own.check())
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.own) as Arc<dyn Interrupt>
    }
}

fn lost(operation: &'static str) -> TransportError {
    TransportError::Lost { operation, cause: io::ErrorKind::BrokenPipe.into() }
}

impl Link for MemorySource {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn capabilities(&self) -> Capabilities {
        CAPABILITIES
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.end.stages.control()
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        self.end.stages.register(Arc::clone(memory));
        Ok(Registration::default())
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.end.stop) as Arc<dyn Interrupt>
    }
}

impl SourceLink for MemorySource {
    fn open_senders(&mut self, channels: u16) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
        let memory = self.end.memory()?;
        let mut senders: Vec<Box<dyn PageSender>> = Vec::new();
        let mut theirs = Vec::new();
        for _ in 0..channels {
            let (records, their_records) = bounded(DEPTH);
            let (their_landings, landings) = unbounded();
            theirs.push(LaneOut { records: their_records, landings: their_landings });
            let stop = self.end.stop.with_own();
            senders.push(Box::new(LaneSender::new(records, landings, &memory, stop)));
        }
        self.end.stop.check()?;
        select! {
            send(self.lanes, theirs) -> sent => sent.map_err(|_| lost("open channels"))?,
            recv(self.end.stop.stopped) -> _ => return Err(TransportError::Interrupted),
        }
        self.end.stages.open();
        Ok(senders)
    }

    fn serve_reads(&mut self, lanes: u16) -> Result<Vec<Box<dyn PageServer>>, TransportError> {
        self.end.stop.check()?;
        let memory = self.end.stages.open_reads()?;
        let mut servers: Vec<Box<dyn PageServer>> = Vec::new();
        let mut theirs = Vec::new();
        for _ in 0..lanes {
            let (records, their_records) = bounded(DEPTH);
            let (their_landings, landings) = unbounded();
            let (their_requests, requests) = bounded(DEPTH);
            let lane = LaneOut { records: their_records, landings: their_landings };
            theirs.push(ReadOut { requests: their_requests, lane });
            let stop = self.end.stop.with_own();
            let answers = LaneSender::new(records, landings, &memory, stop);
            servers.push(Box::new(LaneServer { requests, answers }));
        }
        select! {
            send(self.reads, theirs) -> sent => sent.map_err(|_| lost("open lanes"))?,
            recv(self.end.stop.stopped) -> _ => return Err(TransportError::Interrupted),
        }
        Ok(servers)
    }
}

impl Link for MemoryDestination {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn capabilities(&self) -> Capabilities {
        CAPABILITIES
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.end.stages.control()
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        self.end.stages.register(Arc::clone(memory));
        Ok(Registration::default())
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.end.stop) as Arc<dyn Interrupt>
    }
}

impl DestinationLink for MemoryDestination {
    fn open_receivers(
        &mut self,
        channels: u16,
        timeout: Duration,
    ) -> Result<Vec<Box<dyn PageReceiver>>, TransportError> {
        let memory = self.end.memory()?;
        self.end.stop.check()?;
        let lanes = select! {
            recv(self.lanes) -> lanes => lanes.map_err(|_| lost("accept channels"))?,
            recv(self.end.stop.stopped) -> _ => return Err(TransportError::Interrupted),
            default(timeout) => {
                let operation = "accept channels";
                return Err(TransportError::TimedOut { operation, after: timeout });
            }
        };
        if lanes.len() != usize::from(channels) {
            return Err(TransportError::OutOfOrder("the two sides open different channels"));
        }
        self.end.stages.open();
        let receiver = |lane| -> Box<dyn PageReceiver> {
            Box::new(LaneReceiver::new(lane, &memory, self.end.stop.with_own()))
        };
        Ok(lanes.into_iter().map(receiver).collect())
    }

    fn open_readers(
        &mut self,
        lanes: u16,
        into: &Arc<GuestMemory>,
        timeout: Duration,
    ) -> Result<Vec<ReadLane>, TransportError> {
        self.end.stop.check()?;
        self.end.stages.open_reads()?;
        let came = select! {
            recv(self.reads) -> came => came.map_err(|_| lost("accept lanes"))?,
            recv(self.end.stop.stopped) -> _ => return Err(TransportError::Interrupted),
            default(timeout) => {
                let operation = "accept lanes";
                return Err(TransportError::TimedOut { operation, after: timeout });
            }
        };
        if came.len() != usize::from(lanes) {
            return Err(TransportError::OutOfOrder("the two sides open different lanes"));
        }
        let lane = |ReadOut { requests, lane }| {
            let stop = self.end.stop.with_own();
            let requests =
                LaneRequests { requests, memory: Arc::clone(into), stop: stop.clone(), asked: 0 };
            let landings = LaneReceiver::new(lane, into, stop);
            ReadLane { requests: Box::new(requests), landings: Box::new(landings) }
        };
        Ok(came.into_iter().map(lane).collect())
    }
}

struct FrameSender {
    frames: Sender<Vec<u8>>,
    stop: Arc<Stop>,
    /// A frame did not go out in time.
    broken: bool,
}

impl ControlSender for FrameSender {
    fn send(&mut self, frame: &[u8], timeout: Duration) -> Result<(), TransportError> {
        check_frame(frame)?;
        self.stop.check()?;
        let operation = "send a frame";
        if self.broken {
            return Err(lost(operation));
        }
        select! {
            send(self.frames, frame.to_vec()) -> sent => sent.map_err(|_| lost(operation)),
            recv(self.stop.stopped) -> _ => Err(TransportError::Interrupted),
            recv(after(timeout)) -> _ => {
                self.broken = true;
                Err(TransportError::TimedOut { operation, after: timeout })
            }
        }
    }
}

struct FrameReceiver {
    frames: Receiver<Vec<u8>>,
    stop: Arc<Stop>,
}

impl ControlReceiver for FrameReceiver {
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Vec<u8>, TransportError> {
        self.stop.check()?;
        let deadline = timeout.map_or_else(never, after);
        select! {
            recv(self.frames) -> frame => frame.map_err(|_| TransportError::Closed),
            recv(self.stop.stopped) -> _ => Err(TransportError::Interrupted),
            recv(deadline) -> _ => Err(TransportError::TimedOut {
                operation: "receive a frame",
                after: timeout.unwrap_or_default(),
            }),
        }
    }
}

/// One record on a data channel.
enum Record {
    Batch { runs: Vec<Run>, payload: Vec<u8> },
    End,
}

/// The receiver's end of a lane.
struct LaneOut {
    records: Receiver<Record>,
    landings: Sender<Ticket>,
}

struct LaneSender {
    records: Sender<Record>,
    landings: Receiver<Ticket>,
    memory: Arc<GuestMemory>,
    stop: LaneStop,
    marks: Watermarks,
    counters: ChannelCounters,
}

impl LaneSender {
    fn new(
        records: Sender<Record>,
        landings: Receiver<Ticket>,
        memory: &Arc<GuestMemory>,
        stop: LaneStop,
    ) -> Self {
        let (memory, marks) = (Arc::clone(memory), Watermarks::default());
        Self { records, landings, memory, stop, marks, counters: ChannelCounters::default() }
    }

    fn put(&mut self, record: Record) -> Result<(), TransportError> {
        self.stop.check()?;
        select! {
            send(self.records, record) -> sent => sent.map_err(|_| lost("send a batch")),
            recv(self.stop.end.stopped) -> _ => Err(TransportError::Interrupted),
            recv(self.stop.own.stopped) -> _ => Err(TransportError::Interrupted),
        }
    }
}

impl PageSender for LaneSender {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        CAPABILITIES.check(runs)?;
        let mut payload = Vec::new();
        let mut bytes_of_run = Vec::new();
        for run in runs {
            // Zero runs are looked up too: they must lie inside guest memory.
            self.memory.span(run.range)?;
            if run.kind == RunKind::Data {
                self.memory.copy_out(run.range, &mut bytes_of_run)?;
                payload.extend_from_slice(&bytes_of_run);
            }
        }
        self.counters.user_copied_bytes += payload.len() as u64;
        self.counters.wire_bytes += payload.len() as u64;
        self.put(Record::Batch { runs: runs.to_vec(), payload })?;
        self.marks.released += 1;
        Ok(self.marks.released)
    }

    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
        self.stop.check()?;
        let before = self.marks.landed;
        // `None`: do not wait. A time that no clock can count to never ends.
        let deadline = wait.map(|wait| Instant::now().checked_add(wait).map_or_else(never, at));
        loop {
            match self.landings.try_recv() {
                Ok(ticket) => self.marks.landed = ticket,
                Err(TryRecvError::Disconnected) if self.marks.landed < self.marks.released => {
                    return Err(lost("wait for batches to land"));
                }
                Err(_) => {
                    let Some(deadline) = &deadline else { return Ok(self.marks) };
                    if self.marks.landed > before || self.marks.landed == self.marks.released {
                        return Ok(self.marks);
                    }
                    select! {
                        recv(self.landings) -> ticket => match ticket {
                            Ok(ticket) => self.marks.landed = ticket,
                            Err(_) => return Err(lost("wait for batches to land")),
                        },
                        recv(self.stop.end.stopped) -> _ => return Err(TransportError::Interrupted),
                        recv(self.stop.own.stopped) -> _ => return Err(TransportError::Interrupted),
                        recv(deadline) -> _ => return Ok(self.marks),
                    }
                }
            }
        }
    }

    fn counters(&self) -> ChannelCounters {
        self.counters
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        self.put(Record::End)
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.stop.interrupter()
    }
}

struct LaneReceiver {
    lane: LaneOut,
    memory: Arc<GuestMemory>,
    stop: LaneStop,
    landed: Ticket,
    watch: LandingWatch,
    counters: ChannelCounters,
}

impl LaneReceiver {
    fn new(lane: LaneOut, memory: &Arc<GuestMemory>, stop: LaneStop) -> Self {
        let (memory, watch) = (Arc::clone(memory), LandingWatch::default());
        Self { lane, memory, stop, landed: 0, watch, counters: ChannelCounters::default() }
    }
}

impl PageReceiver for LaneReceiver {
    fn receive(&mut self) -> Result<Received, TransportError> {
        self.stop.check()?;
        let record = select! {
            recv(self.lane.records) -> record => record.map_err(|_| lost("receive a batch"))?,
            recv(self.stop.end.stopped) -> _ => return Err(TransportError::Interrupted),
            recv(self.stop.own.stopped) -> _ => return Err(TransportError::Interrupted),
        };
        let Record::Batch { runs, payload } = record else { return Ok(Received::End) };
        for run in &runs {
            self.memory.span(run.range)?;
        }
        let mut rest = payload.as_slice();
        for run in &runs {
            match run.kind {
                RunKind::Zero => self.memory.fill_zero_while(run.range, || self.stop.check())?,
                RunKind::Data => {
                    // Cut by the same runs that it was put together by.
                    let (bytes, more) = rest.split_at(rest.len().min(payload_len(run)));
                    self.memory.copy_in(run.range, bytes)?;
                    rest = more;
                }
            }
        }
        self.counters.user_copied_bytes += payload.len() as u64;
        self.counters.wire_bytes += payload.len() as u64;
        self.watch.landed(&runs);
        self.landed += 1;
        // A sender that is gone does not wait for landings.
        let _ = self.lane.landings.send(self.landed);
        Ok(Received::Batch(PageCounts::of(&runs)))
    }

    fn watch_landings(&mut self, watch: LandingWatch) -> Result<(), TransportError> {
        self.watch = watch;
        Ok(())
    }

    fn counters(&self) -> ChannelCounters {
        self.counters
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.stop.interrupter()
    }
}

fn payload_len(run: &Run) -> usize {
    usize::try_from(run.payload_bytes()).unwrap_or(usize::MAX)
}

/// What is asked for; `None`, that nothing more is.
type Asked = Option<Vec<Run>>;

/// The reader's end of a lane for reads.
struct ReadOut {
    requests: Sender<Asked>,
    lane: LaneOut,
}

struct LaneRequests {
    requests: Sender<Asked>,
    memory: Arc<GuestMemory>,
    stop: LaneStop,
    asked: Ticket,
}

impl LaneRequests {
    fn put(&mut self, asked: Asked) -> Result<(), TransportError> {
        self.stop.check()?;
        select! {
            send(self.requests, asked) -> sent => sent.map_err(|_| lost("ask for pages")),
            recv(self.stop.end.stopped) -> _ => Err(TransportError::Interrupted),
            recv(self.stop.own.stopped) -> _ => Err(TransportError::Interrupted),
        }
    }
}

impl PageRequests for LaneRequests {
    fn request(&mut self, ranges: &[PageRange]) -> Result<Ticket, TransportError> {
        let runs = check_request(&CAPABILITIES, &self.memory, ranges)?;
        self.put(Some(runs))?;
        self.asked += 1;
        Ok(self.asked)
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        self.put(None)
    }

    fn counters(&self) -> ChannelCounters {
        ChannelCounters::default()
    }
}

struct LaneServer {
    requests: Receiver<Asked>,
    answers: LaneSender,
}

impl PageServer for LaneServer {
    fn serve(&mut self) -> Result<(), TransportError> {
        loop {
            self.answers.stop.check()?;
            let asked = select! {
                recv(self.requests) -> asked => asked.map_err(|_| lost("serve reads"))?,
                recv(self.answers.stop.end.stopped) -> _ => return Err(TransportError::Interrupted),
                recv(self.answers.stop.own.stopped) -> _ => return Err(TransportError::Interrupted),
            };
            let Some(asked) = asked else { return self.answers.finish() };
            let runs = answer(&self.answers.memory, &asked, CAPABILITIES.max_batch_runs)?;
            self.answers.send(&runs)?;
        }
    }

    fn counters(&self) -> ChannelCounters {
        self.answers.counters
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.answers.stop.interrupter()
    }
}
