//! Closing data channels that the source has given up.

use std::io;
use std::sync::Arc;

use crate::error::Error;
use crate::transport::{Interrupt, TransportError};

/// How to end each channel here, and whether the source has asked for that.
#[derive(Default)]
pub(super) struct Closing(Vec<(Arc<dyn Interrupt>, bool)>);

impl Closing {
    /// Adds the next channel.
    pub(super) fn add(&mut self, interrupt: Arc<dyn Interrupt>) {
        self.0.push((interrupt, false));
    }

    /// Lets nothing more of a channel land. Its thread reports when it is through.
    pub(super) fn close(&mut self, channel: u16) {
        if let Some((interrupt, asked)) = self.0.get_mut(usize::from(channel)) {
            *asked = true;
            interrupt.interrupt();
        }
    }

    /// Why a channel ended: the interrupt alone does not say.
    pub(super) fn explain(&self, channel: u16, error: Error) -> Error {
        let asked = self.0.get(usize::from(channel)).is_some_and(|(_, asked)| *asked);
        if !asked || !matches!(error, Error::Transport(TransportError::Interrupted)) {
            return error;
        }
        let operation = "receive on a channel that the source gives up";
        let cause = io::ErrorKind::ConnectionReset.into();
        Error::Transport(TransportError::Lost { operation, cause })
    }
}
