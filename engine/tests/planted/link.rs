//! Links and control channels with a fault.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pageferry::memory::GuestMemory;
use pageferry::testing::TestMemory;
use pageferry::testing::conformance::Pair;
use pageferry::testing::memory_transport;
use pageferry::transport::{
    Capabilities, ControlChannel, ControlReceiver, ControlSender, DestinationLink, Interrupt, Link,
    MAX_BATCH_RUNS, MAX_FRAME_BYTES, PageReceiver, PageSender, PageServer, ReadLane, Registration,
    SourceLink, TransportError,
};

use crate::channel::{PlantedReceiver, PlantedSender};
use crate::fault::Fault;
use crate::lane::{PlantedLandings, PlantedRequests};
use crate::plot::{Keeping, Plot, lost};

/// Plants a fault in a pair of links.
pub(crate) fn plant(plot: &Arc<Plot>, (source, destination): Pair) -> Pair {
    let plot = || Arc::clone(plot);
    (
        Box::new(Planted {
            inner: source,
            plot: plot(),
            at_source: true,
            memory: None,
            shadow: None,
            opened: false,
        }),
        Box::new(Planted {
            inner: destination,
            plot: plot(),
            at_source: false,
            memory: None,
            shadow: None,
            opened: false,
        }),
    )
}

struct Planted<L: ?Sized> {
    inner: Box<L>,
    plot: Arc<Plot>,
    at_source: bool,
    memory: Option<Arc<GuestMemory>>,
    shadow: Option<Arc<GuestMemory>>,
    opened: bool,
}

impl<L: Link + ?Sized> Planted<L> {
    fn wrap_control(&self, channel: ControlChannel) -> ControlChannel {
        let half = |held| (Arc::clone(&self.plot), self.at_source, held);
        let (plot, at_source, held) = half(None);
        let sender = PlantedFrames { inner: channel.sender, plot, at_source, held, count: 0 };
        let (plot, at_source, held) = half(None);
        let receiver = PlantedFrames { inner: channel.receiver, plot, at_source, held, count: 0 };
        ControlChannel { sender: Box::new(sender), receiver: Box::new(receiver) }
    }
}

impl<L: Link + ?Sized> Link for Planted<L> {
    fn name(&self) -> &'static str {
        "planted"
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = self.inner.capabilities();
        match self.plot.fault {
            Fault::NoRunsPerBatch => capabilities.max_batch_runs = 0,
            Fault::NoBytesPerBatch => capabilities.max_batch_bytes = 100,
            Fault::TooManyRunsPerBatch => capabilities.max_batch_runs = MAX_BATCH_RUNS + 1,
            Fault::CapabilitiesChange => capabilities.zero_copy = self.memory.is_some(),
            _ => {}
        }
        capabilities
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        let channel = self.inner.control();
        if channel.is_err() && self.plot.is(Fault::ControlTwice) {
            return memory_transport::pair().0.control();
        }
        Ok(self.wrap_control(channel?))
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        let mut registration = if self.plot.is(Fault::AcknowledgedBeforeWritten) && !self.at_source
        {
            let shadow = TestMemory::with_layout(memory.layout());
            self.shadow = Some(Arc::clone(shadow.memory()));
            self.inner.register(shadow.memory())?
        } else {
            self.inner.register(memory)?
        };
        self.memory = Some(Arc::clone(memory));
        match self.plot.fault {
            Fault::LinkKeepsMemory => self.plot.keep(memory),
            Fault::TooMuchRegistered => registration.registered_bytes = u64::MAX,
            _ => {}
        }
        Ok(registration)
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        let inner = self.inner.interrupter();
        if self.plot.is(Fault::InterrupterKeepsMemory) {
            return Arc::new(Keeping(inner, self.memory.clone()));
        }
        inner
    }
}

impl SourceLink for Planted<dyn SourceLink> {
    fn open_senders(&mut self, channels: u16) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
        match self.plot.fault {
            Fault::SendersTwice if self.opened => return Ok(Vec::new()),
            Fault::SendersWithoutRegistration if self.memory.is_none() => return Ok(Vec::new()),
            _ => {}
        }
        let mut senders = self.inner.open_senders(channels)?;
        self.opened = true;
        match self.plot.fault {
            Fault::ChannelsSwapped => senders.reverse(),
            Fault::OneSenderTooFew => drop(senders.pop()),
            _ => {}
        }
        let planted = |(channel, inner)| -> Box<dyn PageSender> {
            let (memory, link) = (self.memory.clone(), self.inner.interrupter());
            Box::new(PlantedSender::new(inner, Arc::clone(&self.plot), channel, memory, link))
        };
        Ok((0..).zip(senders).map(planted).collect())
    }

    fn serve_reads(&mut self, lanes: u16) -> Result<Vec<Box<dyn PageServer>>, TransportError> {
        let mut servers = self.inner.serve_reads(lanes)?;
        match self.plot.fault {
            Fault::LanesSwapped => servers.reverse(),
            Fault::OneLaneTooFew => drop(servers.pop()),
            _ => {}
        }
        Ok(servers)
    }
}

impl DestinationLink for Planted<dyn DestinationLink> {
    fn open_receivers(
        &mut self,
        channels: u16,
        timeout: Duration,
    ) -> Result<Vec<Box<dyn PageReceiver>>, TransportError> {
        let timeout = match self.plot.fault {
            Fault::ReceiversTwice if self.opened => return Ok(Vec::new()),
            Fault::ReceiversWithoutRegistration if self.memory.is_none() => return Ok(Vec::new()),
            Fault::ReceiversWaitForEver => Duration::from_secs(60 * 60),
            Fault::ReceiversGiveUpAtOnce => Duration::from_millis(1),
            _ => timeout,
        };
        let receivers = match self.inner.open_receivers(channels, timeout) {
            Err(TransportError::Interrupted) if self.plot.is(Fault::OpeningNotWoken) => {
                return self.plot.hang();
            }
            Err(TransportError::TimedOut { .. }) if self.plot.is(Fault::ReceiversGiveUpAsLost) => {
                return Err(lost());
            }
            receivers => receivers?,
        };
        self.opened = true;
        let planted = |(channel, inner)| -> Box<dyn PageReceiver> {
            let memory = self.memory.clone().expect("opened after registration");
            let (plot, shadow) = (Arc::clone(&self.plot), self.shadow.clone());
            Box::new(PlantedReceiver::new(inner, plot, channel, memory, shadow))
        };
        Ok((0..).zip(receivers).map(planted).collect())
    }

    fn open_readers(
        &mut self,
        lanes: u16,
        into: &Arc<GuestMemory>,
        timeout: Duration,
    ) -> Result<Vec<ReadLane>, TransportError> {
        let elsewhere = self.memory.clone().filter(|_| self.plot.is(Fault::ReadsLandElsewhere));
        let readers =
            self.inner.open_readers(lanes, elsewhere.as_ref().unwrap_or(into), timeout)?;
        let planted = |(lane, ReadLane { requests, landings })| {
            let plot = || Arc::clone(&self.plot);
            ReadLane {
                requests: Box::new(PlantedRequests::new(requests, plot())),
                landings: Box::new(PlantedLandings::new(landings, plot(), lane)),
            }
        };
        Ok((0..).zip(readers).map(planted).collect())
    }
}

/// A half of the control channel.
struct PlantedFrames<C: ?Sized> {
    inner: Box<C>,
    plot: Arc<Plot>,
    at_source: bool,
    held: Option<Vec<u8>>,
    /// Frames so far, or time-outs in a row.
    count: u64,
}

impl ControlSender for PlantedFrames<dyn ControlSender> {
    fn send(&mut self, frame: &[u8], timeout: Duration) -> Result<(), TransportError> {
        self.count += 1;
        if let Some(mut held) = self.held.take() {
            if self.plot.is(Fault::FramesMerged) {
                held.extend_from_slice(frame);
                return self.inner.send(&held, timeout);
            }
            self.inner.send(frame, timeout)?;
            return self.inner.send(&held, timeout);
        }
        let (mut frame, mut timeout) = (frame, timeout);
        match self.plot.fault {
            Fault::FramesOf600KbAreCut
                if frame.len() > 600_000 && frame.len() < MAX_FRAME_BYTES =>
            {
                frame = &frame[..600_000];
            }
            Fault::LargestFrameLosesItsLastByte if frame.len() == MAX_FRAME_BYTES => {
                frame = &frame[..MAX_FRAME_BYTES - 1];
            }
            Fault::FramesReordered | Fault::FramesMerged if self.count == 3 => {
                self.held = Some(frame.to_vec());
                return Ok(());
            }
            Fault::FrameTwice if self.count == 3 => self.inner.send(frame, timeout)?,
            Fault::FramesOneWayOnly if !self.at_source => return Ok(()),
            Fault::EmptyFrameTaken if frame.is_empty() => return Ok(()),
            Fault::LargeFrameTaken if frame.len() > MAX_FRAME_BYTES => return Ok(()),
            Fault::LargeFrameIsLost if frame.len() > MAX_FRAME_BYTES => return Err(lost()),
            Fault::SendOfFrameNeverTimesOut => timeout = Duration::from_secs(60 * 60),
            Fault::SendOfFrameTimesOutAtOnce => timeout = Duration::from_millis(1),
            Fault::FramesWaitForPages => {
                while self.plot.has_pages_under_way() {
                    self.plot.idle(Duration::from_millis(1));
                }
            }
            _ => {}
        }
        match (self.inner.send(frame, timeout), self.plot.fault) {
            (Err(TransportError::TimedOut { .. }), Fault::SendOfFrameTimesOutAsLost) => Err(lost()),
            (Err(TransportError::Lost { .. }), Fault::FrameAfterHalfAFrame) => Ok(()),
            (Err(TransportError::Interrupted), Fault::ControlSendNotWoken) => self.plot.hang(),
            (Err(TransportError::Interrupted), Fault::FrameAfterInterruptSucceeds) => Ok(()),
            (Err(_), Fault::LostControlNotNoticed) => Ok(()),
            (Err(error), _) => {
                self.plot.frames_are_lost.store(true, Ordering::SeqCst);
                Err(error)
            }
            (result, _) => result,
        }
    }
}

impl ControlReceiver for PlantedFrames<dyn ControlReceiver> {
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Vec<u8>, TransportError> {
        if self.plot.is(Fault::FramesAreLostWithTheLink)
            && self.plot.frames_are_lost.load(Ordering::SeqCst)
        {
            return Err(lost());
        }
        let wait = match (self.plot.fault, timeout) {
            (Fault::TimeoutAtOnce, Some(_)) => Some(Duration::ZERO),
            (Fault::TimeoutLate, Some(time)) => Some(time * 20),
            (Fault::TimeoutNever, Some(_)) => None,
            (_, timeout) => timeout,
        };
        let result = self.inner.receive(wait);
        let timed_out = matches!(result, Err(TransportError::TimedOut { .. }));
        let timeouts = if timed_out { self.count + 1 } else { 0 };
        let before = std::mem::replace(&mut self.count, timeouts);
        match (result, self.plot.fault) {
            (Ok(_), Fault::FrameLostAfterTimeout) if before > 0 => self.inner.receive(timeout),
            (Ok(frame), Fault::FrameLostAfterShortWaits) if before > 2 => Ok(frame[1..].to_vec()),
            (Ok(frame), Fault::FrameEmptied) if frame.len() == 100 => Ok(Vec::new()),
            (Err(TransportError::TimedOut { .. }), Fault::TimeoutIsLost) => Err(lost()),
            (Err(TransportError::Interrupted), fault) => match (fault, timeout) {
                (Fault::ControlWaitNotWoken, None) if self.at_source => self.plot.hang(),
                (Fault::ControlWaitWithTimeNotWoken, Some(_)) => self.plot.hang(),
                (Fault::DestinationsControlNotWoken, _) if !self.at_source => self.plot.hang(),
                _ => Err(TransportError::Interrupted),
            },
            (Err(TransportError::Closed), Fault::ControlEndIsLost) => Err(lost()),
            (Err(TransportError::Closed), Fault::LostControlNotNoticed) => self.plot.hang(),
            (result, _) => result,
        }
    }
}
