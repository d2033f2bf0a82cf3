//! A whole transport over any byte streams that are connected already: Unix sockets, vsock, TLS,
//! pipes through a proxy.
//!
//! Speaks the stream codec ([`super::stream`]), with control frames behind a u32 of their length.
//! Page bytes are copied in user space on both sides, and counted as copied: where the kernel can
//! read and write guest memory itself, a transport of its own is faster.

mod frames;
mod half;
mod lanes;
mod pages;
#[cfg(all(test, not(loom)))]
mod tests;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::{
    Capabilities, ControlChannel, DestinationLink, Interrupt, Link, MAX_BATCH_RUNS, PageReceiver,
    PageSender, PageServer, ReadLane, Registration, SourceLink, Stages, TransportError,
};
use crate::pages::memory::GuestMemory;
use frames::{FrameReceiver, FrameSender};
use half::{Half, Stop};
use lanes::{Requests, Server};
use pages::Pages;

const CAPABILITIES: Capabilities = Capabilities {
    one_sided_write: false,
    one_sided_read: false,
    zero_copy: false,
    needs_registration: false,
    // Whatever it is.
    protects_pages: false,
    tells_landings: true,
    max_batch_bytes: 1 << 20,
    max_batch_runs: MAX_BATCH_RUNS,
};

/// A connected stream of bytes, both ways.
///
/// # Thread safety
///
/// One thread reads while another writes, and any thread may shut the stream down meanwhile.
pub trait ByteStream: Send + Sync + 'static {
    /// Waits for bytes, at most `timeout`, which is never zero (`None`: until there are some), and
    /// reads what there is. 0 is the end of the stream. [`WouldBlock`](io::ErrorKind::WouldBlock) or [`TimedOut`](io::ErrorKind::TimedOut) when
    /// the time is over, which may be later by what the system's clock ticks are apart.
    fn read(&self, into: &mut [u8], timeout: Option<Duration>) -> io::Result<usize>;

    /// Waits for room, at most `timeout` (`None`: until there is some), and writes bytes from the
    /// first on; how many. [`WouldBlock`](io::ErrorKind::WouldBlock) or [`TimedOut`](io::ErrorKind::TimedOut) when the time is
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
    stages: Stages<Arc<GuestMemory>>,
    data: Vec<Arc<S>>,
    stop: Arc<Stop<S>>,
}

impl<S: ByteStream> ByteStreamLink<S> {
    /// From streams that are connected to the other end's, `data[i]` there to `data[i]` here. A
    /// migration uses as many of `data` as it has channels, and then as many as it has lanes for reads.
    pub fn new(name: &'static str, control: S, data: Vec<S>) -> Self {
        let control = Arc::new(control);
        let data: Vec<Arc<S>> = data.into_iter().map(Arc::new).collect();
        let stop = Stop::of(data.iter().chain([&control]));
        let half = Half::new(control, &stop);
        let stages = Stages::new(ControlChannel {
            sender: Box::new(FrameSender::new(half.clone())),
            receiver: Box::new(FrameReceiver::new(half)),
        });
        Self { name, stages, data, stop }
    }

    fn take_data(&mut self, channels: u16) -> Result<Vec<Pages<S>>, TransportError> {
        if self.stop.is_stopped() {
            return Err(TransportError::Interrupted);
        }
        let memory = self.stages.registered()?;
        self.stages.check_closed()?;
        let halves = self.take(channels)?;
        self.stages.open();
        Ok(halves.into_iter().map(|half| Pages::new(half, Arc::clone(&memory))).collect())
    }

    /// Streams that nobody uses yet.
    fn take(&mut self, count: u16) -> Result<Vec<Half<S>>, TransportError> {
        if usize::from(count) > self.data.len() {
            let (size, limit) = (u64::from(count), self.data.len() as u64);
            return Err(TransportError::TooLarge { what: "number of data channels", size, limit });
        }
        let streams = self.data.drain(..usize::from(count));
        Ok(streams.map(|stream| Half::new(stream, &self.stop)).collect())
    }

    fn take_lanes(
        &mut self,
        lanes: u16,
    ) -> Result<(Vec<Half<S>>, Arc<GuestMemory>), TransportError> {
        if self.stop.is_stopped() {
            return Err(TransportError::Interrupted);
        }
        let memory = self.stages.open_reads()?;
        Ok((self.take(lanes)?, memory))
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
        self.stages.control()
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        self.stages.register(Arc::clone(memory));
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

    fn serve_reads(&mut self, lanes: u16) -> Result<Vec<Box<dyn PageServer>>, TransportError> {
        let (halves, memory) = self.take_lanes(lanes)?;
        let serve = |half| Box::new(Server::new(half, Arc::clone(&memory))) as Box<dyn PageServer>;
        Ok(halves.into_iter().map(serve).collect())
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

    fn open_readers(
        &mut self,
        lanes: u16,
        into: &Arc<GuestMemory>,
        _timeout: Duration,
    ) -> Result<Vec<ReadLane>, TransportError> {
        let (halves, _) = self.take_lanes(lanes)?;
        let lane = |half: Half<S>| ReadLane {
            requests: Box::new(Requests::new(half.clone(), Arc::clone(into))),
            landings: Box::new(Pages::of_lane(half, Arc::clone(into))),
        };
        Ok(halves.into_iter().map(lane).collect())
    }
}
