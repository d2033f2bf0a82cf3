//! Waiting for senders, for as long as it takes or until the guest has stood still for too long.

use std::time::{Duration, Instant};

use super::Drive;
use super::closing::Moved;
use crate::control::handover::SourceState;
use crate::control::protocol::Message;
use crate::error::Error;
use crate::migration::sender::SenderReport;
use crate::migration::session::{Item, Patience, unexpected};
use crate::progress::Event;
use crate::transport::TransportError;

/// How often a waiting driver looks what has landed.
pub(super) const TICK: Duration = Duration::from_millis(10);

/// How long senders have to end their channels in order once nothing depends on it any more.
const FINISH: Duration = Duration::from_secs(1);

/// How long a guest may stand still for the destination's word that a lost channel is closed there. It
/// may be the link that is lost, so the guest goes on, whatever the bound, and the word is awaited then.
const CLOSING: Duration = Duration::from_millis(200);

/// What senders are to report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Awaited {
    /// That they dropped their shares.
    Shares,
    /// That all they sent has landed.
    Landings,
}

/// A wait for all senders, which may be taken up again.
pub(super) struct Waiting {
    awaited: Awaited,
    /// Channels that have not reported. One may report that it is done, and then fail with what it
    /// still had under way.
    missing: Vec<u16>,
    /// Channels that are lost here, and may still land there.
    unclosed: Vec<(u16, Error)>,
    /// When the last sender was done.
    last: Instant,
    /// Whether stripes are to change hands: shares were asked back, or a channel was lost.
    fenced: bool,
    /// Better weights, if there are some.
    weights: Option<Vec<u32>>,
    /// What each channel has done.
    moved: Vec<Moved>,
    /// When any of them moved last, or was lost.
    progressed: Instant,
}

/// Whether an error is one that another channel survives.
fn is_lost(error: &Error) -> bool {
    matches!(error, Error::Transport(TransportError::Lost { .. }))
}

impl Drive<'_> {
    /// A wait for a round that was lent.
    pub(super) fn waiting_for_round(&self) -> Waiting {
        self.waiting_for(Awaited::Shares)
    }

    fn waiting_for(&self, awaited: Awaited) -> Waiting {
        Waiting {
            awaited,
            missing: self.channels.all_live(),
            unclosed: Vec::new(),
            last: Instant::now(),
            fenced: false,
            weights: None,
            moved: self.channels.gauges.iter().map(|gauge| Moved::new(gauge)).collect(),
            progressed: Instant::now(),
        }
    }

    /// Waits until all that was lent is sent, and landed if it is to `settle`. Returns when the last
    /// sender was done; `None` if that was not the case `until` then. The wait may be taken up again.
    ///
    /// What a lost or a lagging channel leaves is dealt out again: a new epoch.
    pub(super) fn await_round(
        &mut self,
        waiting: &mut Waiting,
        settle: bool,
        until: Option<Instant>,
    ) -> Result<Option<Instant>, Error> {
        loop {
            if !self.await_senders(waiting, until)? {
                return Ok(None);
            }
            if waiting.fenced && waiting.awaited == Awaited::Shares {
                // Also by those that had sent all of their share.
                self.channels.settle();
                let weights = waiting.weights.take();
                let last = waiting.last;
                *waiting =
                    Waiting { fenced: true, weights, last, ..self.waiting_for(Awaited::Landings) };
                continue;
            }
            self.channels.take_back()?;
            if !waiting.fenced {
                return Ok(Some(waiting.last));
            }
            let (weights, most) = (waiting.weights.take(), self.source.shared.channels());
            let rebalanced = weights.is_some();
            self.channels.deal(weights, most)?;
            if rebalanced {
                self.emit(&Event::Rebalanced { weights: self.channels.weights().to_vec() })?;
                self.statistics.rebalances += 1;
            }
            if self.channels.dirty()?.is_empty() {
                return Ok(Some(waiting.last));
            }
            self.channels.lend(settle)?;
            *waiting = self.waiting_for_round();
        }
    }

    /// Waits, between rounds, until all that was sent has landed.
    pub(super) fn await_landings(&mut self) -> Result<(), Error> {
        self.channels.settle();
        let mut waiting = self.waiting_for(Awaited::Landings);
        self.await_senders(&mut waiting, None)?;
        // What a channel that was lost meanwhile had under way is dirty again.
        self.channels.take_back()?;
        if waiting.fenced {
            self.channels.deal(None, self.source.shared.channels())?;
        }
        Ok(())
    }

    /// Waits until all senders have reported it. Whether they have, or it is later than `until`.
    fn await_senders(
        &mut self,
        waiting: &mut Waiting,
        until: Option<Instant>,
    ) -> Result<bool, Error> {
        let stall = self.source.common.timeouts.stall;
        while !waiting.missing.is_empty() || !waiting.unclosed.is_empty() {
            match self.next_item(until) {
                Ok(Item::Report(report)) => self.take_report(waiting, report)?,
                Ok(Item::Message(message)) => self.note_message(&message, "sending pages")?,
                Err(Error::TimedOut { .. }) => {}
                Err(error) => return Err(error),
            }
            // Whatever is heard: a peer that talks and lands nothing makes no progress.
            let seen = waiting.moved.iter_mut().zip(&*self.channels.gauges);
            if seen.map(|(moved, gauge)| moved.look(gauge)).fold(false, |any, moved| any | moved) {
                waiting.progressed = Instant::now();
            } else if waiting.progressed.elapsed() >= stall {
                return Err(Error::TimedOut { what: "pages to land", after: stall });
            }
            self.close_silent(&waiting.missing, &waiting.moved, stall)?;
            let (now, landed) = (self.now(), self.channels.landed());
            self.convergence.set_bandwidth_limit(self.source.shared.bandwidth_limit());
            self.convergence.landed(now, &landed);
            if waiting.awaited == Awaited::Shares && !waiting.missing.is_empty() && !waiting.fenced
            {
                let most = self.source.shared.channels();
                waiting.weights =
                    self.channels.restricted_to(most).or_else(|| self.channels.lagging());
                waiting.fenced = waiting.weights.is_some();
                if waiting.fenced {
                    self.channels.ask_back();
                }
            }
            waiting.unclosed.retain(|(channel, _)| !self.closing.is_done(*channel));
            // Until the destination says so, what the lost channel sent may land on top of what
            // another sends from now on.
            if waiting.missing.is_empty()
                && waiting.progressed.elapsed() >= self.source.common.timeouts.handshake
                && let Some((_, error)) = waiting.unclosed.pop()
            {
                return Err(error);
            }
            let over = until.is_some_and(|until| Instant::now() >= until)
                || (self.handover.state() == SourceState::Stopped
                    && !waiting.unclosed.is_empty()
                    && waiting.progressed.elapsed() >= CLOSING);
            if over && (!waiting.missing.is_empty() || !waiting.unclosed.is_empty()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn next_item(&mut self, until: Option<Instant>) -> Result<Item<SenderReport>, Error> {
        if let Some(report) = self.late.pop_front() {
            return Ok(Item::Report(report));
        }
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        self.session.next(Patience::now("pages to land", left.unwrap_or(TICK).min(TICK)))
    }

    fn take_report(&mut self, waiting: &mut Waiting, report: SenderReport) -> Result<(), Error> {
        match report {
            SenderReport::RoundDone { channel, at } => {
                if waiting.awaited == Awaited::Shares {
                    waiting.missing.retain(|other| *other != channel);
                    waiting.last = waiting.last.max(at);
                }
            }
            SenderReport::Settled { channel } => {
                if waiting.awaited == Awaited::Landings {
                    waiting.missing.retain(|other| *other != channel);
                }
            }
            SenderReport::Failed { channel, error } => {
                let error = self.closing.explain(channel, error);
                if !is_lost(&error) || self.channels.live() < 2 {
                    return Err(error);
                }
                tracing::warn!(channel, error = %error.chain(), "a data channel is lost");
                waiting.missing.retain(|other| *other != channel);
                waiting.fenced = true;
                self.channels.lose(channel);
                self.statistics.lost_channels += 1;
                self.emit(&Event::ChannelLost { channel })?;
                waiting.unclosed.push((channel, error));
                waiting.progressed = Instant::now();
                self.close_channel(channel)?;
            }
            SenderReport::Finished => {}
        }
        Ok(())
    }

    /// Takes a message that may come at any time while pages are being sent.
    pub(super) fn note_message(
        &mut self,
        message: &Message,
        state: &'static str,
    ) -> Result<(), Error> {
        match message {
            Message::ChannelClosed { channel } if self.note_closed(*channel) => {}
            Message::Pong { number } => self.take_pong(*number),
            // Of a switchover that was called off: too late, and still good to know.
            Message::Prepared(prepared) if self.was_called_off(prepared.attempt) => {
                self.loads_no_more(prepared.attempt);
                self.convergence.learn_load(Duration::from_nanos(prepared.load_ns));
            }
            _ => return Err(unexpected(message, state)),
        }
        Ok(())
    }

    /// Waits a little for the senders to end their channels.
    pub(super) fn await_finish(&mut self, channels: usize) {
        let patience = Patience::now("channels to end", FINISH);
        let mut missing = channels;
        while missing > 0 {
            match self.session.next_committed(patience) {
                Ok(Item::Report(SenderReport::Finished | SenderReport::Failed { .. })) => {
                    missing -= 1;
                }
                Err(Error::TimedOut { .. }) => return,
                _ => {}
            }
        }
    }
}
