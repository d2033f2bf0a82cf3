//! Links that break where a test wants them to.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageferry::testing::WrappedDestination;
use pageferry::testing::faulty::{Faults, FaultySource};
use pageferry::testing::memory_transport::{self, MemoryDialler, MemoryRendezvous};
use pageferry::transport::{
    Connector, ControlChannel, ControlReceiver, ControlSender, DestinationLink, Interrupt,
    LinkPurpose, Rendezvous, SourceLink, TransportError,
};
use pageferry::{Event, Timeouts};

use crate::scene::Scene;

/// The number of a link, from 0.
pub(crate) fn number(purpose: LinkPurpose) -> u32 {
    match purpose {
        LinkPurpose::Begin => 0,
        LinkPurpose::Rejoin { epoch, .. } => epoch,
    }
}

/// As often as links are made, each with trouble of its own.
pub(crate) fn meeting(
    mut faults: impl FnMut(u32) -> Faults + Send + 'static,
) -> (MemoryDialler, MemoryRendezvous) {
    let (dialler, rendezvous) = memory_transport::meeting();
    let dialler = dialler.wrapped(move |purpose, link| -> Result<Box<dyn SourceLink>, _> {
        let number = number(purpose);
        Ok(Box::new(FaultySource::new(Box::new(link), faults(number), number.into())))
    });
    (dialler, rendezvous)
}

pub(crate) fn timeouts() -> Timeouts {
    let (stall, rejoin) = (Duration::from_secs(5), Duration::from_secs(20));
    Timeouts { stall, rejoin, ..Timeouts::default() }
}

/// Two sides with these limits.
pub(crate) fn scene_with(timeouts: Timeouts) -> Scene {
    let mut scene = Scene::new();
    scene.source = scene.source.timeouts(timeouts);
    scene.destination = scene.destination.timeouts(timeouts);
    scene
}

/// What is told of links.
#[derive(Clone, Default)]
pub(crate) struct Told(Arc<Mutex<Vec<String>>>);

impl Told {
    pub(crate) fn sink(&self) -> impl FnMut(&Event) + Send + 'static {
        let told = Arc::clone(&self.0);
        move |event| {
            let what = match event {
                Event::LinkLost { .. } => "lost".to_owned(),
                Event::Rejoined { epoch, .. } => format!("rejoined {epoch}"),
                Event::ChannelLost { channel } => format!("channel {channel} lost"),
                Event::ChannelsReopened { channels, epoch, .. } => {
                    format!("{channels} reopened by {epoch}")
                }
                Event::CalledOff { stage: None, .. } => "called off".to_owned(),
                Event::GuestRunsThere => "there".to_owned(),
                _ => return,
            };
            told.lock().unwrap().push(what);
        }
    }

    pub(crate) fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

/// A rendezvous whose first link breaks instead of sending a control message of that type.
pub(crate) struct BreakingRendezvous {
    inner: MemoryRendezvous,
    before: Option<u16>,
}

impl BreakingRendezvous {
    pub(crate) fn new(inner: MemoryRendezvous, before: u16) -> Self {
        Self { inner, before: Some(before) }
    }
}

impl Rendezvous for BreakingRendezvous {
    fn accept(
        &mut self,
        purpose: LinkPurpose,
        timeout: Option<Duration>,
    ) -> Result<Box<dyn DestinationLink>, TransportError> {
        let link = self.inner.accept(purpose, timeout)?;
        let Some(before) = self.before.take() else { return Ok(link) };
        let interrupt = link.interrupter();
        let link = WrappedDestination::new(link).control(move |channel| {
            let (sender, receiver) = (channel.sender, channel.receiver);
            let interrupt = Arc::clone(&interrupt);
            let sender: Box<dyn ControlSender> =
                Box::new(BreakingSender { sender, before, interrupt });
            let receiver: Box<dyn ControlReceiver> = receiver;
            ControlChannel { sender, receiver }
        });
        Ok(Box::new(link))
    }

    fn waits_again(&self) -> bool {
        true
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}

struct BreakingSender {
    sender: Box<dyn ControlSender>,
    before: u16,
    interrupt: Arc<dyn Interrupt>,
}

impl ControlSender for BreakingSender {
    fn send(&mut self, frame: &[u8], timeout: Duration) -> Result<(), TransportError> {
        if frame.starts_with(&self.before.to_le_bytes()) {
            self.interrupt.interrupt();
            let (operation, cause) = ("survive a test", std::io::ErrorKind::ConnectionReset.into());
            return Err(TransportError::Lost { operation, cause });
        }
        self.sender.send(frame, timeout)
    }
}

/// A source that has one link.
pub(crate) struct Once<C>(pub(crate) C);

impl<C: Connector> Connector for Once<C> {
    fn connect(&mut self, purpose: LinkPurpose) -> Result<Box<dyn SourceLink>, TransportError> {
        self.0.connect(purpose)
    }

    fn redials(&self) -> bool {
        false
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.0.interrupter()
    }
}
