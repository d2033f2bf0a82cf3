//! The destination's part: it answers, and measures nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pageferry::Destination;
use pageferry::testing::IdleMachine;
use pageferry::transport::{DestinationLink, OneLink, Received, TransportError};
use pageferry_cli::outcome::{Failure, Outcome};
use pageferry_rust_vmm::guest_memory;
use pageferry_vmm::ram::{Backing, Ram};
use serde::{Deserialize, Serialize};

use crate::links::{Listener, Way};
use crate::sides::{self, answer};

/// For what answers at once where all is well.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a destination is to do for one source. Answered by `Listening`, and by `Served` when the source is
/// gone.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) enum Serve {
    /// Send every control frame back.
    Control { way: Way },
    /// Take pages in on one data channel.
    Pages { way: Way, memory_bytes: u64, backing: Backing },
    /// Take a guest in that is nothing but memory.
    Migration { way: Way, memory_bytes: u64, backing: Backing },
}

/// From a destination.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Listening(SocketAddr),
    Served,
}

/// A destination, as it is told. A source is not told anything: who measures is one.
pub(crate) fn serve() -> Result<Outcome, Failure> {
    sides::serve(obey)
}

fn obey(what: Serve) -> Result<(), Failure> {
    let (Serve::Control { way } | Serve::Pages { way, .. } | Serve::Migration { way, .. }) = what;
    let listener = Listener::bind(way)?;
    answer(&Answer::Listening(listener.address()))?;
    let mut link = listener.accept()?;
    match what {
        Serve::Control { .. } => echo(&mut *link)?,
        Serve::Pages { memory_bytes, backing, .. } => {
            let ram = Ram::allocate(&[(0, memory_bytes)], backing)?;
            link.register(&Arc::new(guest_memory(Arc::clone(ram.memory()))?))?;
            let mut receivers = link.open_receivers(1, PATIENCE)?;
            while let Received::Batch(_) = receivers[0].receive()? {}
        }
        Serve::Migration { memory_bytes, backing, .. } => {
            let ram = Ram::allocate(&[(0, memory_bytes)], backing)?;
            let memory = Arc::new(guest_memory(Arc::clone(ram.memory()))?);
            let offer = Destination::new().negotiate(OneLink::destination(link))?;
            offer.receive(IdleMachine, &memory).map_err(|failure| failure.error)?;
        }
    }
    answer(&Answer::Served)
}

fn echo(link: &mut dyn DestinationLink) -> Result<(), Failure> {
    let mut control = link.control()?;
    loop {
        match control.receiver.receive(None) {
            Ok(frame) => control.sender.send(&frame, PATIENCE)?,
            // The source has seen enough.
            Err(TransportError::Closed | TransportError::Lost { .. }) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
