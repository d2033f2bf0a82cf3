//! Data connections that wait for their link.

use std::collections::BTreeMap;

use pageferry::transport::Warnings;

use crate::MAX_CHANNELS;
use crate::incoming::{Incoming, Unwanted};
use crate::preamble::Status;

/// Of one migration: those that wait for their link.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) channels: DataChannels,
    pub(crate) lanes: DataChannels,
}

impl Default for Joined {
    fn default() -> Self {
        Self { channels: DataChannels::of("data channel"), lanes: DataChannels::of("lane") }
    }
}

/// Data channels, or lanes, which are joined alike.
#[derive(Debug)]
pub(crate) struct DataChannels {
    /// What one is.
    kind: &'static str,
    /// How many there will be; [`MAX_CHANNELS`] until it is known.
    channels: u16,
    came: BTreeMap<u16, DataChannel>,
}

#[derive(Debug)]
enum DataChannel {
    Waiting(Incoming),
    Taken,
}

impl DataChannels {
    fn of(kind: &'static str) -> Self {
        Self { kind, channels: MAX_CHANNELS, came: BTreeMap::new() }
    }

    /// Takes a connection, and says so to its other side; or gives it back.
    pub(crate) fn join(
        &mut self,
        channel: u16,
        mut incoming: Incoming,
        warnings: &Warnings,
    ) -> Result<(), Unwanted> {
        if channel >= self.channels {
            let reason = format!("{} {channel} of only {}", self.kind, self.channels);
            return Err(Unwanted { incoming, status: Status::ChannelOutOfRange, reason });
        }
        if self.came.contains_key(&channel) {
            let reason = format!("{} {channel} is connected already", self.kind);
            return Err(Unwanted { incoming, status: Status::ChannelTaken, reason });
        }
        let peer = incoming.peer;
        match incoming.wire.socket().set_nonblocking(false).and_then(|()| incoming.let_in()) {
            Ok(()) => {
                tracing::debug!(%peer, channel, "connected");
                self.came.insert(channel, DataChannel::Waiting(incoming));
            }
            Err(error) => warnings.warn(peer, format_args!("closed a data connection: {error}")),
        }
        Ok(())
    }

    /// From here on there are so many.
    pub(crate) fn set(&mut self, channels: u16) {
        self.channels = channels;
        for (channel, _) in self.came.split_off(&channels) {
            tracing::warn!("closed {} {channel}: there are only {channels}", self.kind);
        }
    }

    /// Takes all of them, once all are there; in order.
    pub(crate) fn take_all(&mut self) -> Option<Vec<Incoming>> {
        let waits = |channel| matches!(self.came.get(&channel), Some(DataChannel::Waiting(_)));
        if !(0..self.channels).all(waits) {
            return None;
        }
        let take = |slot: &mut DataChannel| match std::mem::replace(slot, DataChannel::Taken) {
            DataChannel::Waiting(incoming) => Some(incoming),
            DataChannel::Taken => None,
        };
        Some(self.came.values_mut().filter_map(take).collect())
    }
}
