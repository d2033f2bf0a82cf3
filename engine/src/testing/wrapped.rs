//! Links and channels that do as others do, but for what a test wants otherwise.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::pages::memory::GuestMemory;
use crate::transport::{
    Capabilities, ChannelCounters, ControlChannel, DestinationLink, Interrupt, LandingWatch, Link,
    PageReceiver, PageSender, PageServer, ReadLane, Received, Registration, Run, SourceLink,
    Ticket, TransportError, Watermarks,
};

/// What a link is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkCall {
    /// Give its control channel.
    Control,
    /// Register guest memory.
    Register,
    /// Open its data channels.
    Open,
}

type BeforeLink = Box<dyn FnMut(LinkCall) -> Result<(), TransportError> + Send>;
type OfCapabilities = Box<dyn Fn(Capabilities) -> Capabilities + Send>;
type OnControl = Box<dyn FnMut(ControlChannel) -> ControlChannel + Send>;
type OnChannel<C> = Box<dyn FnMut(u16, Box<C>) -> Box<C> + Send>;

/// A link that does all as `L` does, until it is told otherwise; of its data channels, `C`, too.
pub struct WrappedLink<L: ?Sized, C: ?Sized> {
    inner: Box<L>,
    before: BeforeLink,
    control: OnControl,
    channels: OnChannel<C>,
    capabilities: OfCapabilities,
    interrupt: Option<Arc<dyn Interrupt>>,
}

/// A source's end.
pub type WrappedSource = WrappedLink<dyn SourceLink, dyn PageSender>;
/// A destination's end.
pub type WrappedDestination = WrappedLink<dyn DestinationLink, dyn PageReceiver>;

impl<L: Link + ?Sized, C: ?Sized> WrappedLink<L, C> {
    /// As `inner` in all.
    pub fn new(inner: Box<L>) -> Self {
        Self {
            inner,
            before: Box::new(|_| Ok(())),
            control: Box::new(|channel| channel),
            channels: Box::new(|_, channel| channel),
            capabilities: Box::new(|capabilities| capabilities),
            interrupt: None,
        }
    }

    /// That comes before each call, which fails if it does.
    #[must_use]
    pub fn before(
        mut self,
        before: impl FnMut(LinkCall) -> Result<(), TransportError> + Send + 'static,
    ) -> Self {
        self.before = Box::new(before);
        self
    }

    /// Makes another control channel of that of `inner`.
    #[must_use]
    pub fn control(
        mut self,
        control: impl FnMut(ControlChannel) -> ControlChannel + Send + 'static,
    ) -> Self {
        self.control = Box::new(control);
        self
    }

    /// Makes another data channel of each, by its number.
    #[must_use]
    pub fn channels(
        mut self,
        channels: impl FnMut(u16, Box<C>) -> Box<C> + Send + 'static,
    ) -> Self {
        self.channels = Box::new(channels);
        self
    }

    /// Makes others of the capabilities of `inner`.
    #[must_use]
    pub fn capabilities(
        mut self,
        capabilities: impl Fn(Capabilities) -> Capabilities + Send + 'static,
    ) -> Self {
        self.capabilities = Box::new(capabilities);
        self
    }

    /// Page bytes that a batch has at most, instead of what `inner` says.
    #[must_use]
    pub fn max_batch_bytes(self, max_batch_bytes: u64) -> Self {
        self.capabilities(move |inner| Capabilities { max_batch_bytes, ..inner })
    }

    /// What interrupts it is made of what interrupts `inner`.
    #[must_use]
    pub fn interrupted_by(
        mut self,
        interrupt: impl FnOnce(Arc<dyn Interrupt>) -> Arc<dyn Interrupt>,
    ) -> Self {
        self.interrupt = Some(interrupt(self.inner.interrupter()));
        self
    }

    fn wrap(&mut self, channels: Vec<Box<C>>) -> Vec<Box<C>> {
        (0..).zip(channels).map(|(number, channel)| (self.channels)(number, channel)).collect()
    }
}

impl<L: Link + ?Sized, C: ?Sized> fmt::Debug for WrappedLink<L, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WrappedLink").field("inner", &self.inner.name()).finish_non_exhaustive()
    }
}

impl<L: Link + ?Sized, C: ?Sized> Link for WrappedLink<L, C> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn capabilities(&self) -> Capabilities {
        (self.capabilities)(self.inner.capabilities())
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        (self.before)(LinkCall::Control)?;
        Ok((self.control)(self.inner.control()?))
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        (self.before)(LinkCall::Register)?;
        self.inner.register(memory)
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.interrupt.clone().unwrap_or_else(|| self.inner.interrupter())
    }
}

impl SourceLink for WrappedSource {
    fn open_senders(&mut self, channels: u16) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
        (self.before)(LinkCall::Open)?;
        let senders = self.inner.open_senders(channels)?;
        Ok(self.wrap(senders))
    }

    fn serve_reads(&mut self, lanes: u16) -> Result<Vec<Box<dyn PageServer>>, TransportError> {
        self.inner.serve_reads(lanes)
    }
}

impl DestinationLink for WrappedDestination {
    fn open_receivers(
        &mut self,
        channels: u16,
        timeout: Duration,
    ) -> Result<Vec<Box<dyn PageReceiver>>, TransportError> {
        (self.before)(LinkCall::Open)?;
        let receivers = self.inner.open_receivers(channels, timeout)?;
        Ok(self.wrap(receivers))
    }

    fn open_readers(
        &mut self,
        lanes: u16,
        into: &Arc<GuestMemory>,
        timeout: Duration,
    ) -> Result<Vec<ReadLane>, TransportError> {
        self.inner.open_readers(lanes, into, timeout)
    }
}

/// What a data channel is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelCall {
    /// Send a batch.
    Send,
    /// Say what has landed.
    Watermarks {
        /// Once there is news.
        waits: bool,
    },
    /// End the channel.
    Finish,
    /// Receive a batch, or the end.
    Receive,
}

type BeforeChannel = Box<dyn FnMut(ChannelCall) -> Result<(), TransportError> + Send>;
type AfterChannel = Box<dyn FnMut(ChannelCall) + Send>;

/// An end of a data channel that does all as `C` does, with something before and after it.
pub struct WrappedChannel<C: ?Sized> {
    inner: Box<C>,
    before: BeforeChannel,
    after: AfterChannel,
}

impl<C: ?Sized> WrappedChannel<C> {
    /// As `inner` in all.
    pub fn new(inner: Box<C>) -> Self {
        Self { inner, before: Box::new(|_| Ok(())), after: Box::new(|_| {}) }
    }

    /// That comes before each call, which fails if it does.
    #[must_use]
    pub fn before(
        mut self,
        before: impl FnMut(ChannelCall) -> Result<(), TransportError> + Send + 'static,
    ) -> Self {
        self.before = Box::new(before);
        self
    }

    /// That comes after each call that did not fail.
    #[must_use]
    pub fn after(mut self, after: impl FnMut(ChannelCall) + Send + 'static) -> Self {
        self.after = Box::new(after);
        self
    }

    /// From the moment on that `broken` is set: what is sent or asked then is *lost*.
    #[must_use]
    pub fn breaking(self, broken: Arc<AtomicBool>) -> Self {
        self.before(move |call| {
            if call != ChannelCall::Finish && broken.load(Ordering::SeqCst) {
                let cause = io::ErrorKind::ConnectionReset.into();
                return Err(TransportError::Lost { operation: "keep a channel", cause });
            }
            Ok(())
        })
    }

    fn around<T>(
        &mut self,
        call: ChannelCall,
        run: impl FnOnce(&mut C) -> Result<T, TransportError>,
    ) -> Result<T, TransportError> {
        (self.before)(call)?;
        let result = run(&mut self.inner)?;
        (self.after)(call);
        Ok(result)
    }
}

impl<C: ?Sized> fmt::Debug for WrappedChannel<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WrappedChannel").finish_non_exhaustive()
    }
}

impl PageSender for WrappedChannel<dyn PageSender> {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        self.around(ChannelCall::Send, |inner| inner.send(runs))
    }

    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
        let call = ChannelCall::Watermarks { waits: wait.is_some() };
        self.around(call, |inner| inner.watermarks(wait))
    }

    fn counters(&self) -> ChannelCounters {
        self.inner.counters()
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        self.around(ChannelCall::Finish, PageSender::finish)
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}

impl PageReceiver for WrappedChannel<dyn PageReceiver> {
    fn receive(&mut self) -> Result<Received, TransportError> {
        self.around(ChannelCall::Receive, PageReceiver::receive)
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
