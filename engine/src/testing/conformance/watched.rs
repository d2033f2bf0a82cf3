//! A link of which every operation has a name while it is under way.

use std::sync::Arc;
use std::time::Duration;

use super::Pair;
use super::watch::Watch;
use crate::pages::memory::{GuestMemory, PageRange};
use crate::transport::{
    Capabilities, ChannelCounters, ControlChannel, ControlReceiver, ControlSender, DestinationLink,
    Interrupt, LandingWatch, Link, PageReceiver, PageRequests, PageSender, PageServer, ReadLane,
    Received, Registration, Run, SourceLink, Ticket, TransportError, Watermarks,
};

pub(super) fn watched((source, destination): Pair, watch: &Arc<Watch>) -> Pair {
    watch.add([source.interrupter(), destination.interrupter()]);
    let as_source = Name { of: "the source", watch: Arc::clone(watch) };
    let as_destination = Name { of: "the destination", watch: Arc::clone(watch) };
    (
        Box::new(Watched { inner: source, name: as_source }),
        Box::new(Watched { inner: destination, name: as_destination }),
    )
}

/// Who does something.
#[derive(Clone)]
struct Name {
    of: &'static str,
    watch: Arc<Watch>,
}

impl Name {
    fn on_link<T>(&self, operation: &str, run: impl FnOnce() -> T) -> T {
        self.watch.operation(|| format!("{}'s {operation}", self.of), run)
    }

    fn on_channel<T>(&self, channel: usize, operation: &str, run: impl FnOnce() -> T) -> T {
        let of = self.of;
        self.watch.operation(|| format!("{of}'s {operation} on channel {channel}"), run)
    }
}

struct Watched<L: ?Sized> {
    inner: Box<L>,
    name: Name,
}

impl<L: Link + ?Sized> Link for Watched<L> {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        let ControlChannel { sender, receiver } =
            self.name.on_link("control", || self.inner.control())?;
        let name = &self.name;
        Ok(ControlChannel {
            sender: Box::new(WatchedControl { inner: sender, name: name.clone() }),
            receiver: Box::new(WatchedControl { inner: receiver, name: name.clone() }),
        })
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        self.name.on_link("register", || self.inner.register(memory))
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}

impl SourceLink for Watched<dyn SourceLink> {
    fn open_senders(&mut self, channels: u16) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
        let senders = self.name.on_link("open_senders", || self.inner.open_senders(channels))?;
        Ok((0..)
            .zip(senders)
            .map(|(channel, inner)| -> Box<dyn PageSender> {
                Box::new(WatchedChannel { inner, channel, name: self.name.clone() })
            })
            .collect())
    }

    fn serve_reads(&mut self, lanes: u16) -> Result<Vec<Box<dyn PageServer>>, TransportError> {
        let servers = self.name.on_link("serve_reads", || self.inner.serve_reads(lanes))?;
        let server = |(lane, inner)| -> Box<dyn PageServer> {
            Box::new(WatchedChannel { inner, channel: lane, name: self.name.clone() })
        };
        Ok((0..).zip(servers).map(server).collect())
    }
}

impl DestinationLink for Watched<dyn DestinationLink> {
    fn open_receivers(
        &mut self,
        channels: u16,
        timeout: Duration,
    ) -> Result<Vec<Box<dyn PageReceiver>>, TransportError> {
        let Self { inner, name } = self;
        let receivers =
            name.on_link("open_receivers", || inner.open_receivers(channels, timeout))?;
        Ok((0..)
            .zip(receivers)
            .map(|(channel, inner)| -> Box<dyn PageReceiver> {
                Box::new(WatchedChannel { inner, channel, name: name.clone() })
            })
            .collect())
    }

    fn open_readers(
        &mut self,
        lanes: u16,
        into: &Arc<GuestMemory>,
        timeout: Duration,
    ) -> Result<Vec<ReadLane>, TransportError> {
        let Self { inner, name } = self;
        let readers = name.on_link("open_readers", || inner.open_readers(lanes, into, timeout))?;
        let reader = |(channel, ReadLane { requests, landings })| ReadLane {
            requests: Box::new(WatchedChannel { inner: requests, channel, name: name.clone() }),
            landings: Box::new(WatchedChannel { inner: landings, channel, name: name.clone() }),
        };
        Ok((0..).zip(readers).map(reader).collect())
    }
}

/// A half of the control channel.
struct WatchedControl<C: ?Sized> {
    inner: Box<C>,
    name: Name,
}

impl ControlSender for WatchedControl<dyn ControlSender> {
    fn send(&mut self, frame: &[u8], timeout: Duration) -> Result<(), TransportError> {
        self.name.on_link("send of a frame", || self.inner.send(frame, timeout))
    }
}

impl ControlReceiver for WatchedControl<dyn ControlReceiver> {
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Vec<u8>, TransportError> {
        self.name.on_link("receive of a frame", || self.inner.receive(timeout))
    }
}

/// An end of a data channel, or of a lane for reads.
struct WatchedChannel<C: ?Sized> {
    inner: Box<C>,
    channel: usize,
    name: Name,
}

impl PageSender for WatchedChannel<dyn PageSender> {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        self.name.on_channel(self.channel, "send", || self.inner.send(runs))
    }

    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
        self.name.on_channel(self.channel, "watermarks", || self.inner.watermarks(wait))
    }

    fn counters(&self) -> ChannelCounters {
        self.inner.counters()
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        self.name.on_channel(self.channel, "finish", || self.inner.finish())
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}

impl PageReceiver for WatchedChannel<dyn PageReceiver> {
    fn receive(&mut self) -> Result<Received, TransportError> {
        self.name.on_channel(self.channel, "receive", || self.inner.receive())
    }

    fn watch_landings(&mut self, watch: LandingWatch) -> Result<(), TransportError> {
        self.name.on_channel(self.channel, "watch_landings", || self.inner.watch_landings(watch))
    }

    fn counters(&self) -> ChannelCounters {
        self.inner.counters()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}

impl PageRequests for WatchedChannel<dyn PageRequests> {
    fn request(&mut self, ranges: &[PageRange]) -> Result<Ticket, TransportError> {
        self.name.on_channel(self.channel, "request", || self.inner.request(ranges))
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        self.name.on_channel(self.channel, "finish", || self.inner.finish())
    }

    fn counters(&self) -> ChannelCounters {
        self.inner.counters()
    }
}

impl PageServer for WatchedChannel<dyn PageServer> {
    fn serve(&mut self) -> Result<(), TransportError> {
        self.name.on_channel(self.channel, "serve", || self.inner.serve())
    }

    fn counters(&self) -> ChannelCounters {
        self.inner.counters()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}
