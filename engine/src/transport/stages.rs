//! What one end of a link gives once, and what only after something else.

use super::{ControlChannel, TransportError};

/// The stages of one end of a link, with `M` for what is kept of guest memory once it is registered.
#[derive(Debug)]
pub struct Stages<M> {
    control: Option<ControlChannel>,
    registered: Option<M>,
    opened: bool,
    reads: bool,
}

impl<M: Clone> Stages<M> {
    /// Of a link that has just been made.
    pub fn new(control: ControlChannel) -> Self {
        Self { control: Some(control), registered: None, opened: false, reads: false }
    }

    /// The control channel, once ([`Link::control`](super::Link::control)).
    pub fn control(&mut self) -> Result<ControlChannel, TransportError> {
        self.control.take().ok_or(TransportError::OutOfOrder("the control channel was taken"))
    }

    /// Guest memory is registered.
    pub fn register(&mut self, memory: M) {
        self.registered = Some(memory);
    }

    /// What was registered.
    pub fn registered(&self) -> Result<M, TransportError> {
        let missing = TransportError::OutOfOrder("guest memory is not registered");
        self.registered.clone().ok_or(missing)
    }

    /// Fails where data channels are open: there is one set of them.
    pub fn check_closed(&self) -> Result<(), TransportError> {
        if self.opened {
            return Err(TransportError::OutOfOrder("data channels are open"));
        }
        Ok(())
    }

    /// Data channels are open.
    pub fn open(&mut self) {
        self.opened = true;
    }

    /// Lanes for reads are opened, once, for the memory that is registered.
    pub fn open_reads(&mut self) -> Result<M, TransportError> {
        let registered = self.registered()?;
        if std::mem::replace(&mut self.reads, true) {
            return Err(TransportError::OutOfOrder("lanes for reads are open"));
        }
        Ok(registered)
    }
}
