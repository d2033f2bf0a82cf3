//! Waiting for senders, for as long as it takes or until the guest has stood still for too long.

use std::time::{Duration, Instant};

use super::Drive;
use super::closing::Moved;
use crate::control::gathering::{Gathering, Next, Report};
use crate::control::handover::SourceState;
use crate::control::protocol::Message;
use crate::error::Error;
use crate::migration::sender::SenderReport;
use crate::migration::session::{Item, LANDINGS, Patience, unexpected};
use crate::progress::Event;
use crate::transport::TransportError;

/// How often a waiting driver looks what has landed.
pub(super) const TICK: Duration = Duration::from_millis(10);

/// How long senders have to end their channels in order once nothing depends on it any more.
const FINISH: Duration = Duration::from_secs(1);

/// How long a guest may stand still for the destination's word that a lost channel is closed there. It
/// may be the link that is lost, so the guest goes on, whatever the bound, and the word is awaited then.
const CLOSING: Duration = Duration::from_millis(200);

/// A wait for all senders, which may be taken up again: [`Gathering`], with what the driver needs besides.
pub(super) struct Waiting {
    gathering: Gathering,
    /// When the last sender was done.
    last: Instant,
    /// Better weights, if there are some.
    weights: Option<Vec<u32>>,
    /// Why the last of the channels that were lost was.
    loss: Option<Error>,
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
        self.waiting(Gathering::of_round(self.channels.are_live()))
    }

    fn waiting(&self, gathering: Gathering) -> Waiting {
        Waiting {
            gathering,
            last: Instant::now(),
            weights: None,
            loss: None,
            moved: self.channels.gauges.iter().map(|gauge| Moved::new(gauge)).collect(),
            progressed: Instant::now(),
        }
    }

    /// Waits until all that was lent is sent, and landed if it is to `settle`. Returns when the last
    /// sender was done; `None` if that was not the case `until` then. The wait may be taken up again.
    ///
    /// What a lost or a lagging channel leaves is dealt out again: a new epoch. Channels that are lost are
    /// [reopened](Self::reopen_channels) then.
    pub(super) fn await_round(
        &mut self,
        waiting: &mut Waiting,
        settle: bool,
        until: Option<Instant>,
    ) -> Result<Option<Instant>, Error> {
        loop {
            match self.gather(waiting, until)? {
                Next::Wait => return Ok(None),
                Next::Settle => {
                    // Also by those that had sent all of their share.
                    self.channels.settle();
                    let (gathering, weights) = (waiting.gathering.clone(), waiting.weights.take());
                    *waiting = Waiting { weights, last: waiting.last, ..self.waiting(gathering) };
                }
                Next::Home => {
                    self.channels.take_back()?;
                    return Ok(Some(waiting.last));
                }
                Next::Deal => {
                    self.deal(waiting)?;
                    return Ok(Some(waiting.last));
                }
                Next::Lend => {
                    self.deal(waiting)?;
                    if self.channels.dirty()?.is_empty() {
                        return Ok(Some(waiting.last));
                    }
                    if self.lacks_channels() {
                        if self.reopen_channels()? {
                            self.announce_round()?;
                        }
                        // Nothing was sent meanwhile.
                        let (now, landed) = (self.now(), self.channels.landed());
                        self.convergence.stood_still(now, &landed);
                    }
                    self.channels.lend(settle)?;
                    *waiting = self.waiting_for_round();
                }
            }
        }
    }

    /// Waits, between rounds, until all that was sent has landed. What a channel that is lost meanwhile had
    /// under way is dirty again.
    pub(super) fn await_landings(&mut self) -> Result<(), Error> {
        self.channels.settle();
        let mut waiting = self.waiting(Gathering::of_landings(self.channels.are_live()));
        self.await_round(&mut waiting, true, None)?;
        Ok(())
    }

    /// Takes the ledger back and deals the stripes out anew.
    fn deal(&mut self, waiting: &mut Waiting) -> Result<(), Error> {
        self.channels.take_back()?;
        let (weights, most) = (waiting.weights.take(), self.source.shared.channels());
        let rebalanced = weights.is_some();
        self.channels.deal(weights, most)?;
        if rebalanced {
            self.emit(&Event::Rebalanced { weights: self.channels.weights().to_vec() })?;
            self.statistics.rebalances += 1;
        }
        Ok(())
    }

    /// Waits until there is something else to do than to wait, or it is later than `until`.
    fn gather(&mut self, waiting: &mut Waiting, until: Option<Instant>) -> Result<Next, Error> {
        let stall = self.source.common.timeouts.stall;
        loop {
            let next = waiting.gathering.next();
            if next != Next::Wait {
                return Ok(next);
            }
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
                return Err(Error::TimedOut { what: LANDINGS, after: stall });
            }
            self.keep_in_touch()?;
            self.check_answer()?;
            self.close_silent(&waiting.gathering, &waiting.moved, stall)?;
            let (now, landed) = (self.now(), self.channels.landed());
            self.convergence.set_bandwidth_limit(self.source.shared.bandwidth_limit());
            self.convergence.landed(now, &landed);
            if waiting.gathering.may_ask_back() {
                let most = self.source.shared.channels();
                waiting.weights =
                    self.channels.restricted_to(most).or_else(|| self.channels.lagging());
                if waiting.weights.is_some() || self.lacks_channels() {
                    waiting.gathering.asked_back();
                    self.channels.ask_back();
                }
            }
            waiting.gathering.closed(|channel| self.closing.is_closed(channel));
            // Until the destination says so, what the lost channel sent may land on top of what
            // another sends from now on.
            if waiting.gathering.is_only_closing()
                && waiting.progressed.elapsed() >= self.source.common.timeouts.handshake
                && let Some(error) = waiting.loss.take()
            {
                return Err(error);
            }
            let closing_takes_long = self.handover.state() == SourceState::Stopped
                && waiting.gathering.is_closing()
                && waiting.progressed.elapsed() >= CLOSING;
            if closing_takes_long || until.is_some_and(|until| Instant::now() >= until) {
                return Ok(waiting.gathering.next());
            }
        }
    }

    fn next_item(&mut self, until: Option<Instant>) -> Result<Item<SenderReport>, Error> {
        if let Some(report) = self.late.pop_front() {
            return Ok(Item::Report(report));
        }
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        self.session.next(Patience::now(LANDINGS, left.unwrap_or(TICK).min(TICK)))
    }

    fn take_report(&mut self, waiting: &mut Waiting, report: SenderReport) -> Result<(), Error> {
        match report {
            SenderReport::RoundDone { channel, at } => {
                if waiting.gathering.reported(channel, Report::Done) {
                    waiting.last = waiting.last.max(at);
                }
            }
            SenderReport::Settled { channel } => {
                waiting.gathering.reported(channel, Report::Settled);
            }
            SenderReport::Failed { channel, error } => {
                let error = self.closing.explain(channel, error);
                if !is_lost(&error) || self.channels.live() < 2 {
                    return Err(error);
                }
                tracing::warn!(channel, error = %error.chain(), "a data channel is lost");
                waiting.gathering.lost(channel);
                self.channels.lose(channel);
                self.statistics.lost_channels += 1;
                self.emit(&Event::ChannelLost { channel })?;
                waiting.loss = Some(error);
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
                self.written_there.extend(&prepared.written);
                if prepared.damaged.is_empty() {
                    self.convergence.learn_load(Duration::from_nanos(prepared.load_ns));
                } else {
                    self.note_damage(&prepared.damaged)?;
                }
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
