//! Closing data channels: those that are lost here, and those that move nothing though the link lives.
//!
//! What was sent on a channel may land on top of what another sends from then on, until the destination
//! says that the channel is closed there. It may not have noticed; so it is asked.

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Drive;
use crate::control::protocol::Message;
use crate::error::Error;
use crate::stats::ChannelGauge;
use crate::transport::TransportError;

/// What is known of the ends of channels.
pub(super) struct Closing {
    /// Channels that the destination was asked to close.
    asked: Vec<bool>,
    /// Channels that it has closed: nothing of them lands any more.
    done: Vec<bool>,
}

impl Closing {
    pub(super) fn new(channels: u16) -> Self {
        let none = vec![false; usize::from(channels)];
        Self { asked: none.clone(), done: none }
    }

    pub(super) fn is_done(&self, channel: u16) -> bool {
        self.done[usize::from(channel)]
    }

    /// Why a channel ended: the interrupt alone does not say.
    pub(super) fn explain(&self, channel: u16, error: Error) -> Error {
        let index = usize::from(channel);
        let (operation, cause) = match error {
            Error::Transport(TransportError::Interrupted) if self.done[index] => {
                ("send on a channel that the destination has lost", io::ErrorKind::ConnectionReset)
            }
            Error::Transport(TransportError::Interrupted) if self.asked[index] => {
                ("send on a channel that moves nothing", io::ErrorKind::TimedOut)
            }
            error => return error,
        };
        Error::Transport(TransportError::Lost { operation, cause: cause.into() })
    }
}

/// How far a channel has come, and since when.
pub(super) struct Moved {
    mark: u64,
    at: Instant,
}

impl Moved {
    pub(super) fn new(gauge: &ChannelGauge) -> Self {
        Self { mark: mark(gauge), at: Instant::now() }
    }

    /// Takes note of how far it is now. Whether it has moved.
    pub(super) fn look(&mut self, gauge: &ChannelGauge) -> bool {
        let mark = mark(gauge);
        let moved = mark != self.mark;
        if moved {
            *self = Self { mark, at: Instant::now() };
        }
        moved
    }
}

/// Changes whenever the sender of a channel gets anywhere.
fn mark(gauge: &ChannelGauge) -> u64 {
    let landed_bytes = gauge.landed_bytes.load(Ordering::Relaxed);
    let landed_zero_pages = gauge.landed_zero_pages.load(Ordering::Relaxed);
    let held_back = gauge.held_back.load(Ordering::Relaxed);
    let looked_at = gauge.pages().total();
    [looked_at, landed_bytes, landed_zero_pages, held_back].into_iter().fold(0, u64::wrapping_add)
}

impl Drive<'_> {
    /// Has a channel end on both sides.
    pub(super) fn close_channel(&mut self, channel: u16) -> Result<(), Error> {
        self.channels.interrupt(channel);
        let asked = &mut self.closing.asked[usize::from(channel)];
        if std::mem::replace(asked, true) || self.closing.is_done(channel) {
            return Ok(());
        }
        self.session.send(&Message::CloseChannel { channel })
    }

    /// Takes the destination's word that nothing more lands on a channel. Whether there is such a one.
    pub(super) fn note_closed(&mut self, channel: u16) -> bool {
        let Some(done) = self.closing.done.get_mut(usize::from(channel)) else { return false };
        *done = true;
        // Which may not have been noticed here.
        self.channels.interrupt(channel);
        true
    }

    /// Closes those of the `missing` channels that have not moved for half of `stall`, where another one has
    /// or has done its work. Where the link stands still they all do, some a little earlier; so the
    /// destination is asked for a sign of life first, and what stood still with the link gets time to go on.
    pub(super) fn close_silent(
        &mut self,
        missing: &[u16],
        moved: &[Moved],
        stall: Duration,
    ) -> Result<(), Error> {
        let since = |channel: &u16| moved[usize::from(*channel)].at;
        let is_silent =
            |channel: &u16| missing.contains(channel) && since(channel).elapsed() >= stall / 2;
        let mut channels = self.channels.all_live();
        channels.retain(|channel| !self.closing.asked[usize::from(*channel)]);
        let (silent, others): (Vec<_>, Vec<_>) = channels.into_iter().partition(is_silent);
        let Some(last) = silent.iter().map(since).max() else { return Ok(()) };
        if others.is_empty() {
            return Ok(());
        }
        let Some(alive) = self.steering.answered.filter(|answered| *answered >= last + stall / 2)
        else {
            return self.ping();
        };
        if alive.elapsed() < stall / 8 {
            return Ok(());
        }
        for channel in silent {
            tracing::warn!(channel, "a data channel moves nothing, and the destination answers");
            self.close_channel(channel)?;
        }
        Ok(())
    }
}
