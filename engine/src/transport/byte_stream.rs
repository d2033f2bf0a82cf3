//! A whole transport over any byte streams that are connected already: Unix sockets, vsock, TLS,
//! pipes through a proxy.
//!
//! Speaks the stream codec ([`super::stream`]), with control frames behind a u32 of their length.
//! Page bytes are copied in user space on both sides, and counted as copied: where the kernel can
//! read and write guest memory itself, a transport of its own is faster.

use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::stream::{self, ACK_BYTES, AckSchedule, HEADER_BYTES, Header, LEAD_BYTES, StreamError};
use super::{
    Capabilities, ChannelCounters, ControlChannel, ControlReceiver, ControlSender, DestinationLink,
    Interrupt, Link, MAX_BATCH_RUNS, MAX_FRAME_BYTES, PageReceiver, PageSender, Received,
    Registration, Run, RunKind, SourceLink, Ticket, TransportError, Watermarks,
};
use crate::pages::memory::{GuestMemory, PageRange};

const CAPABILITIES: Capabilities = Capabilities {
    one_sided_write: false,
    one_sided_read: false,
    zero_copy: false,
    needs_registration: false,
    max_batch_bytes: 1 << 20,
    max_batch_runs: MAX_BATCH_RUNS,
};

/// Page bytes are placed in pieces of so many pages, however long a run the other side announces:
/// what it can have this side allocate is a frame ([`MAX_FRAME_BYTES`]).
const PIECE_PAGES: u32 = 64;
/// Most bytes of a write that must end in time.
const TIMED_WRITE_BYTES: usize = 64 << 10;

/// Bytes of a control frame's length.
const LENGTH_BYTES: usize = 4;

/// A connected stream of bytes, both ways.
///
/// # Thread safety
///
/// One thread reads while another writes, and any thread may shut the stream down meanwhile.
pub trait ByteStream: Send + Sync + 'static {
    /// Waits for bytes, at most `timeout`, which is never zero (`None`: until there are some), and
    /// reads what there is. 0 is the end of the stream. [`ErrorKind::WouldBlock`] or [`ErrorKind::TimedOut`] when
    /// the time is over, which may be later by what the system's clock ticks are apart.
    fn read(&self, into: &mut [u8], timeout: Option<Duration>) -> io::Result<usize>;

    /// Waits for room, at most `timeout` (`None`: until there is some), and writes bytes from the
    /// first on; how many. [`ErrorKind::WouldBlock`] or [`ErrorKind::TimedOut`] when the time is
    /// over and none was written.
    fn write(&self, bytes: &[u8], timeout: Option<Duration>) -> io::Result<usize>;

    /// Ends both directions; whoever reads or writes wakes up.
    fn shut_down(&self);
}

/// One end of a link over byte streams.
///
/// # Resource cleanup
///
/// Streams are shut down and dropped with the link.
#[derive(Debug)]
pub struct ByteStreamLink<S: ByteStream> {
    name: &'static str,
    control: Option<Arc<S>>,
    data: Vec<Arc<S>>,
    opened: bool,
    memory: Option<Arc<GuestMemory>>,
    stop: Arc<Stop<S>>,
}

impl<S: ByteStream> ByteStreamLink<S> {
    /// From streams that are connected to the other end's, `data[i]` there to `data[i]` here. A
    /// migration uses as many of `data` as it has channels.
    pub fn new(name: &'static str, control: S, data: Vec<S>) -> Self {
        let control = Arc::new(control);
        let data: Vec<Arc<S>> = data.into_iter().map(Arc::new).collect();
        let stop = Stop::of(data.iter().chain([&control]));
        Self { name, control: Some(control), data, opened: false, memory: None, stop }
    }

    fn take_control(&mut self) -> Result<ControlChannel, TransportError> {
        let taken = TransportError::OutOfOrder("the control channel was taken");
        let stream = self.control.take().ok_or(taken)?;
        let half = Half::new(stream, &self.stop);
        Ok(ControlChannel {
            sender: Box::new(FrameSender { half: half.clone(), broken: false }),
            receiver: Box::new(FrameReceiver(half)),
        })
    }

    fn take_data(&mut self, channels: u16) -> Result<Vec<Pages<S>>, TransportError> {
        if self.stop.is_stopped() {
            return Err(TransportError::Interrupted);
        }
        let unregistered = TransportError::OutOfOrder("guest memory is not registered");
        let memory = self.memory.as_ref().ok_or(unregistered)?;
        if self.opened {
            return Err(TransportError::OutOfOrder("data channels are open"));
        }
        if usize::from(channels) > self.data.len() {
            let (size, limit) = (u64::from(channels), self.data.len() as u64);
            return Err(TransportError::TooLarge { what: "number of data channels", size, limit });
        }
        self.opened = true;
        let streams = self.data.drain(..usize::from(channels));
        let pages = streams.map(|stream| Pages {
            half: Half::new(stream, &self.stop),
            memory: Arc::clone(memory),
            user_copied_bytes: 0,
            marks: Watermarks::default(),
            acks: AckSchedule::default(),
            scratch: Vec::new(),
        });
        Ok(pages.collect())
    }
}

impl<S: ByteStream> Link for ByteStreamLink<S> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn capabilities(&self) -> Capabilities {
        CAPABILITIES
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.take_control()
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        self.memory = Some(Arc::clone(memory));
        Ok(Registration::default())
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.stop) as Arc<dyn Interrupt>
    }
}

impl<S: ByteStream> SourceLink for ByteStreamLink<S> {
    fn open_senders(&mut self, channels: u16) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
        let pages = self.take_data(channels)?.into_iter();
        Ok(pages.map(|pages| Box::new(pages) as Box<dyn PageSender>).collect())
    }
}

impl<S: ByteStream> DestinationLink for ByteStreamLink<S> {
    fn open_receivers(
        &mut self,
        channels: u16,
        _timeout: Duration,
    ) -> Result<Vec<Box<dyn PageReceiver>>, TransportError> {
        let pages = self.take_data(channels)?.into_iter();
        Ok(pages.map(|pages| Box::new(pages) as Box<dyn PageReceiver>).collect())
    }
}

/// Whether this end, or one channel of it, was interrupted, and the streams to shut down then.
#[derive(Debug)]
struct Stop<S> {
    stopped: AtomicBool,
    streams: Vec<Weak<S>>,
}

impl<S> Stop<S> {
    fn of<'a>(streams: impl Iterator<Item = &'a Arc<S>>) -> Arc<Self>
    where
        S: 'a,
    {
        let streams = streams.map(Arc::downgrade).collect();
        Arc::new(Self { stopped: AtomicBool::new(false), streams })
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }
}

impl<S: ByteStream> Interrupt for Stop<S> {
    fn interrupt(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.streams.iter().filter_map(Weak::upgrade).for_each(|stream| stream.shut_down());
    }
}

/// Whether a call is to be made again, if there is time.
fn is_passing(error: &io::Error) -> bool {
    let passing = [ErrorKind::WouldBlock, ErrorKind::TimedOut, ErrorKind::Interrupted];
    passing.contains(&error.kind())
}

/// A stream, and what was read from it and not used yet.
#[derive(Debug)]
struct Half<S> {
    stream: Arc<S>,
    /// Of the whole end, and of this stream alone.
    link_stop: Arc<Stop<S>>,
    stop: Arc<Stop<S>>,
    /// Cleared once, where it grows; the first `filled` bytes are what was read.
    buffer: Vec<u8>,
    filled: usize,
    counters: ChannelCounters,
}

impl<S> Clone for Half<S> {
    fn clone(&self) -> Self {
        Self {
            stream: Arc::clone(&self.stream),
            link_stop: Arc::clone(&self.link_stop),
            stop: Arc::clone(&self.stop),
            buffer: Vec::new(),
            filled: 0,
            counters: ChannelCounters::default(),
        }
    }
}

impl<S: ByteStream> Half<S> {
    fn new(stream: Arc<S>, link_stop: &Arc<Stop<S>>) -> Self {
        let (link_stop, stop) = (Arc::clone(link_stop), Stop::of([&stream].into_iter()));
        let (buffer, counters) = (Vec::new(), ChannelCounters::default());
        Self { stream, link_stop, stop, buffer, filled: 0, counters }
    }

    /// Once interrupted every operation says so, whatever came of it.
    fn check<T>(
        &self,
        operation: &'static str,
        result: io::Result<T>,
    ) -> Result<T, TransportError> {
        if self.link_stop.is_stopped() || self.stop.is_stopped() {
            return Err(TransportError::Interrupted);
        }
        result.map_err(|cause| TransportError::Lost { operation, cause })
    }

    /// Writes all bytes; false if the deadline comes first.
    fn write_until(
        &mut self,
        mut bytes: &[u8],
        deadline: Option<Instant>,
    ) -> Result<bool, TransportError> {
        while !bytes.is_empty() {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return self.check("", Ok(false));
            }
            // A kernel may count the time anew for each buffer that it fills.
            let most = if left.is_some() { TIMED_WRITE_BYTES } else { usize::MAX };
            self.counters.system_calls += 1;
            let written = match self.stream.write(&bytes[..bytes.len().min(most)], left) {
                Ok(0) => Err(ErrorKind::WriteZero.into()),
                Err(error) if is_passing(&error) => Ok(0),
                written => written,
            };
            let written = self.check("write to a byte stream", written)?;
            self.counters.wire_bytes += written as u64;
            bytes = &bytes[written..];
        }
        Ok(true)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), TransportError> {
        self.write_until(bytes, None).map(drop)
    }

    /// Reads until `buffer` holds `len` bytes; false if the deadline comes first.
    fn fill(&mut self, len: usize, deadline: Option<Instant>) -> Result<bool, TransportError> {
        if self.buffer.len() < len {
            self.buffer.resize(len, 0);
        }
        while self.filled < len {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return self.check("", Ok(false));
            }
            let read = self.stream.read(&mut self.buffer[self.filled..len], left);
            let more = *read.as_ref().unwrap_or(&0);
            self.filled += more;
            self.counters.wire_bytes += more as u64;
            self.counters.system_calls += 1;
            let result = match read {
                Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => Ok(()),
                Err(error) if is_passing(&error) => Ok(()),
                Err(error) => Err(error),
            };
            self.check("read from a byte stream", result)?;
        }
        Ok(true)
    }

    /// Takes the first `N` bytes that were read.
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.buffer[..N]);
        self.buffer.copy_within(N..self.filled, 0);
        self.filled -= N;
        bytes
    }

    /// What was read and not used.
    fn held(&self) -> &[u8] {
        &self.buffer[..self.filled]
    }

    /// All that was read is used.
    fn clear(&mut self) {
        self.filled = 0;
    }
}

struct FrameSender<S> {
    half: Half<S>,
    /// Part of a frame may be out.
    broken: bool,
}

impl<S: ByteStream> ControlSender for FrameSender<S> {
    fn send(&mut self, frame: &[u8], timeout: Duration) -> Result<(), TransportError> {
        let operation = "send a frame";
        let (size, limit) = (frame.len() as u64, MAX_FRAME_BYTES as u64);
        let length = u32::try_from(frame.len()).ok().filter(|_| (1..=limit).contains(&size));
        let Some(length) = length else {
            return Err(TransportError::TooLarge { what: "control frame", size, limit });
        };
        if self.broken {
            return self.half.check(operation, Err(ErrorKind::NotConnected.into()));
        }
        self.broken = true;
        let deadline = Instant::now().checked_add(timeout);
        let length = length.to_le_bytes();
        let half = &mut self.half;
        if !(half.write_until(&length, deadline)? && half.write_until(frame, deadline)?) {
            return Err(TransportError::TimedOut { operation, after: timeout });
        }
        self.broken = false;
        Ok(())
    }
}

struct FrameReceiver<S>(Half<S>);

impl<S: ByteStream> ControlReceiver for FrameReceiver<S> {
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Vec<u8>, TransportError> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        // What was read stays in the buffer until the frame is whole, so a timeout loses nothing.
        let mut whole = match self.0.fill(LENGTH_BYTES, deadline) {
            Err(TransportError::Lost { .. }) if self.0.held().is_empty() => {
                return Err(TransportError::Closed);
            }
            filled => filled?,
        };
        if whole {
            let mut length = [0; LENGTH_BYTES];
            length.copy_from_slice(&self.0.buffer[..LENGTH_BYTES]);
            let length = u32::from_le_bytes(length);
            let size = usize::try_from(length).unwrap_or(usize::MAX);
            if size == 0 || size > MAX_FRAME_BYTES {
                return Err(StreamError::FrameLength(length).into());
            }
            whole = self.0.fill(LENGTH_BYTES + size, deadline)?;
        }
        if !whole {
            let (operation, after) = ("receive a frame", timeout.unwrap_or_default());
            return Err(TransportError::TimedOut { operation, after });
        }
        let frame = self.0.held()[LENGTH_BYTES..].to_vec();
        self.0.clear();
        Ok(frame)
    }
}

/// One end of a data channel.
struct Pages<S> {
    half: Half<S>,
    memory: Arc<GuestMemory>,
    user_copied_bytes: u64,
    /// At the source. At the destination `landed` counts what was placed, and `released` what was
    /// acknowledged.
    marks: Watermarks,
    /// At the source.
    acks: AckSchedule,
    scratch: Vec<u8>,
}

impl<S> Pages<S> {
    fn all_counters(&self) -> ChannelCounters {
        ChannelCounters { user_copied_bytes: self.user_copied_bytes, ..self.half.counters }
    }
}

impl<S: ByteStream> Pages<S> {
    /// At the destination: says what has landed, if that is news.
    fn acknowledge(&mut self) -> Result<(), TransportError> {
        if self.marks.released < self.marks.landed {
            self.marks.released = self.marks.landed;
            self.half.write(&self.marks.landed.to_le_bytes())?;
        }
        Ok(())
    }
}

impl<S: ByteStream> PageSender for Pages<S> {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        CAPABILITIES.check(runs)?;
        runs.iter().try_for_each(|run| self.memory.span(run.range).map(drop))?;
        let ticket = self.marks.released + 1;
        let ask = self.acks.flag_next(ticket, runs);
        stream::encode_batch(ticket, runs, ask, &mut self.scratch);
        self.half.write(&self.scratch)?;
        for run in runs.iter().filter(|run| run.kind == RunKind::Data) {
            self.memory.copy_out(run.range, &mut self.scratch)?;
            self.user_copied_bytes += run.payload_bytes();
            self.half.write(&self.scratch)?;
        }
        self.marks.released = ticket;
        Ok(ticket)
    }

    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
        let outstanding = self.marks.landed < self.marks.released;
        let Some(wait) = wait.filter(|_| outstanding) else {
            // A look without waiting is not in every stream's power: acknowledgements wait.
            return self.half.check("", Ok(self.marks));
        };
        if !self.acks.expects_more(self.marks.landed) {
            stream::encode_ack_request(&mut self.scratch);
            self.half.write(&self.scratch)?;
            self.acks.requested(self.marks.released);
        }
        if self.half.fill(ACK_BYTES, Instant::now().checked_add(wait))? {
            let ack = self.half.take();
            self.marks.landed = stream::decode_ack(ack, self.marks.released, self.marks.landed)?;
        }
        Ok(self.marks)
    }

    fn counters(&self) -> ChannelCounters {
        self.all_counters()
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        stream::encode_end(&mut self.scratch);
        self.half.write(&self.scratch)
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.half.stop) as Arc<dyn Interrupt>
    }
}

impl<S: ByteStream> PageReceiver for Pages<S> {
    fn receive(&mut self) -> Result<Received, TransportError> {
        let due = self.marks.landed + 1;
        let header = loop {
            self.half.fill(LEAD_BYTES, None)?;
            let mut lead = [0; LEAD_BYTES];
            lead.copy_from_slice(self.half.held());
            match stream::decode_header(&lead, due)? {
                Header::Batch(header) => break header,
                Header::End => return Ok(Received::End),
                Header::AckRequest => {
                    self.half.clear();
                    self.acknowledge()?;
                }
            }
        };
        self.half.fill(HEADER_BYTES + header.table_bytes(), None)?;
        let mut runs = Vec::new();
        let table = &self.half.held()[HEADER_BYTES..];
        let counts = stream::decode_table(&header, table, self.memory.layout(), &mut runs)?;
        self.half.clear();
        for run in runs {
            if run.kind == RunKind::Zero {
                let half = &self.half;
                self.memory.fill_zero_while(run.range, || half.check("", Ok(())))?;
                continue;
            }
            let mut rest = run.range;
            while rest.pages > 0 {
                let piece = PageRange { pages: rest.pages.min(PIECE_PAGES), ..rest };
                self.half.fill(self.memory.span(piece)?.len_bytes, None)?;
                self.memory.copy_in(piece, self.half.held())?;
                self.half.clear();
                rest.first_page += u64::from(piece.pages);
                rest.pages -= piece.pages;
            }
        }
        self.user_copied_bytes += header.payload_bytes;
        self.marks.landed = due;
        if header.ack {
            self.acknowledge()?;
        }
        Ok(Received::Batch(counts))
    }

    fn counters(&self) -> ChannelCounters {
        self.all_counters()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.half.stop) as Arc<dyn Interrupt>
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
