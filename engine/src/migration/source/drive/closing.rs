//! Closing data channels: those that are lost here, and those that move nothing though the link lives.
//!
//! What was sent on a channel may land on top of what another sends from then on, until the destination
//! says that the channel is closed there. It may not have noticed; so it is asked.

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Drive;
use crate::control::gathering::Gathering;
use crate::control::protocol::Message;
use crate::error::Error;
use crate::stats::ChannelGauge;
use crate::transport::TransportError;

/// What is known of the end of a channel at the destination. It only goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    /// Nothing.
    Open,
    /// The destination was asked to close it.
    Asked,
    /// It has: nothing of the channel lands any more.
    Closed,
}

/// What is known of the ends of channels.
pub(super) struct Closing(Vec<End>);

impl Closing {
    pub(super) fn new(channels: u16) -> Self {
        Self(vec![End::Open; usize::from(channels)])
    }

    pub(super) fn is_closed(&self, channel: u16) -> bool {
        self.0[usize::from(channel)] == End::Closed
    }

    fn is_open(&self, channel: u16) -> bool {
        self.0[usize::from(channel)] == End::Open
    }

    /// Why a channel ended: the interrupt alone does not say.
    pub(super) fn explain(&self, channel: u16, error: Error) -> Error {
        if !matches!(error, Error::Transport(TransportError::Interrupted)) {
            return error;
        }
        let (operation, cause) = match self.0[usize::from(channel)] {
            End::Open => return error,
            End::Asked => ("send on a channel that moves nothing", io::ErrorKind::TimedOut),
            End::Closed => {
                ("send on a channel that the destination has lost", io::ErrorKind::ConnectionReset)
            }
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
        if !self.closing.is_open(channel) {
            return Ok(());
        }
        self.closing.0[usize::from(channel)] = End::Asked;
        self.session.send(&Message::CloseChannel { channel })
    }

    /// Takes the destination's word that nothing more lands on a channel. Whether there is such a one.
    pub(super) fn note_closed(&mut self, channel: u16) -> bool {
        let Some(end) = self.closing.0.get_mut(usize::from(channel)) else { return false };
        *end = End::Closed;
        // Which may not have been noticed here.
        self.channels.interrupt(channel);
        true
    }

    /// Closes those channels that are due and have not moved for half of `stall`, where another one has
    /// or has done its work. Where the link stands still they all do, some a little earlier; so the
    /// destination is asked for a sign of life first, and what stood still with the link gets time to go on.
    pub(super) fn close_silent(
        &mut self,
        gathering: &Gathering,
        moved: &[Moved],
        stall: Duration,
    ) -> Result<(), Error> {
        let since = |channel: &u16| moved[usize::from(*channel)].at;
        let is_silent =
            |channel: &u16| gathering.is_due(*channel) && since(channel).elapsed() >= stall / 2;
        let live = (0..)
            .zip(self.channels.are_live())
            .filter_map(|(channel, live)| live.then_some(channel));
        let open = live.filter(|channel| self.closing.is_open(*channel));
        let (silent, others): (Vec<_>, Vec<_>) = open.partition(is_silent);
        let Some(last) = silent.iter().map(since).max() else { return Ok(()) };
        if others.is_empty() {
            return Ok(());
        }
        let silent_since = last + stall / 2;
        let Some(answered) = self.steering.answered.filter(|answered| *answered >= silent_since)
        else {
            return self.ping();
        };
        let alive = self.steering.answers_since.unwrap_or(answered).max(silent_since);
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
