//! Pre-copy: rounds over what the guest dirtied, and what a round is made of.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::drive::Drive;
use crate::convergence::{Convergence, Round, Verdict};
use crate::error::Error;
use crate::progress::{Event, Phase};
use crate::protocol::Message;
use crate::sender::SenderReport;
use crate::session::{Item, Patience, unexpected};
use crate::stats::RoundStatistics;
use crate::transport::TransportError;

/// How often a waiting driver looks whether pages still land.
const STALL_TICK: Duration = Duration::from_millis(100);

/// How long senders have to end their channels in order once nothing depends on it any more.
const FINISH: Duration = Duration::from_secs(1);

/// A round that is under way.
pub(super) struct RoundBegan {
    at: Instant,
    dirty_pages: u64,
    landed_bytes: u64,
}

/// What senders are to report.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Awaited {
    /// That they dropped their shares.
    Shares,
    /// That all they sent has landed.
    Landings,
}

/// How senders reported.
struct Reported {
    /// When the last sender was done.
    last: Instant,
    /// Whether stripes are to change hands: shares were asked back, or a channel was lost.
    fenced: bool,
    /// Better weights, if there are some.
    weights: Option<Vec<u32>>,
}

/// Whether an error is one that another channel survives.
fn is_lost(error: &Error) -> bool {
    matches!(error, Error::Transport(TransportError::Lost { .. }))
}

impl Drive<'_> {
    /// Rounds over the running guest, until the rest fits into the downtime limit. The rest is
    /// then harvested and not sent.
    pub(super) fn pre_copy(&mut self) -> Result<(), Error> {
        self.source.shared.set_phase(Phase::PreCopy);
        let mut convergence = Convergence::new(self.source.downtime_limit, self.source.max_rounds);
        loop {
            let began = self.begin_round(false)?;
            self.await_round(false)?;
            self.channels.all_looked_at();
            let statistics = self.finish_round(&began);
            let dirty_pages = self.harvest()?;
            let round =
                Round { landed_bytes: statistics.landed_bytes, took: statistics.took, dirty_pages };
            let verdict = convergence.observe(round);
            let seconds = statistics.took.as_secs_f64();
            if seconds > 0.0 {
                self.statistics.dirty_pages_per_second = dirty_pages as f64 / seconds;
            }
            self.statistics.bytes_per_second = convergence.bytes_per_second().unwrap_or(0.0);
            let number = u32::try_from(self.statistics.rounds.len()).unwrap_or(u32::MAX);
            self.emit(&Event::RoundFinished { round: number, statistics, verdict });
            match verdict {
                Verdict::Iterate { .. } => {}
                Verdict::SwitchOver { .. } => return Ok(()),
                Verdict::GiveUp { expected } => {
                    return Err(Error::NotConverging {
                        rounds: number,
                        dirty_pages,
                        expected,
                        limit: self.source.downtime_limit,
                    });
                }
            }
        }
    }

    /// Asks the trackers what was written, on top of what is to be sent already. Returns the
    /// pages to send.
    pub(super) fn harvest(&mut self) -> Result<u64, Error> {
        let dirty = self.channels.dirty()?;
        self.dirty.harvest(dirty)?;
        Ok(dirty.count())
    }

    /// Has the senders send what was harvested, as a round of its own.
    pub(super) fn begin_round(&mut self, settle: bool) -> Result<RoundBegan, Error> {
        let round = u32::try_from(self.statistics.rounds.len() + 1).unwrap_or(u32::MAX);
        let dirty_pages = self.channels.dirty()?.count();
        let began =
            RoundBegan { at: Instant::now(), dirty_pages, landed_bytes: self.landed_bytes() };
        self.channels.lend(settle)?;
        self.source.shared.set_round(round, dirty_pages);
        self.session.send(&Message::Round { round, dirty_pages })?;
        self.emit(&Event::RoundStarted { round, dirty_pages });
        Ok(began)
    }

    /// Waits until all that was lent is sent. Returns when the last sender was done.
    ///
    /// What a lost or a lagging channel leaves is dealt out again: a new epoch.
    pub(super) fn await_round(&mut self, settle: bool) -> Result<Instant, Error> {
        loop {
            let reported = self.await_senders(Awaited::Shares)?;
            if reported.fenced {
                // Also by those that had sent all of their share.
                self.channels.settle();
                self.await_senders(Awaited::Landings)?;
            }
            self.channels.take_back()?;
            if !reported.fenced {
                return Ok(reported.last);
            }
            if let Some(weights) = &reported.weights {
                self.emit(&Event::Rebalanced { weights: weights.clone() });
                self.statistics.rebalances += 1;
            }
            self.channels.deal(reported.weights)?;
            if self.channels.dirty()?.is_empty() {
                return Ok(reported.last);
            }
            self.channels.lend(settle)?;
        }
    }

    /// Waits until all senders have reported it.
    fn await_senders(&mut self, awaited: Awaited) -> Result<Reported, Error> {
        let mut reported = Reported { last: Instant::now(), fenced: false, weights: None };
        let mut mark = self.progress_mark();
        let mut progressed = Instant::now();
        let stall = self.source.common.timeouts.stall;
        // A channel may report that it is done, and then fail with what it still had under way.
        let mut missing = self.channels.all_live();
        // Channels that are lost here, and may still land there.
        let mut unclosed: Vec<(u16, Error)> = Vec::new();
        while !missing.is_empty() || !unclosed.is_empty() {
            match self.session.next(Patience::now("pages to land", STALL_TICK)) {
                Ok(Item::Report(SenderReport::RoundDone { channel, at })) => {
                    missing.retain(|other| *other != channel);
                    reported.last = reported.last.max(at);
                }
                Ok(Item::Report(SenderReport::Settled { channel })) => {
                    missing.retain(|other| *other != channel);
                }
                Ok(Item::Report(SenderReport::Failed { channel, error })) => {
                    if !is_lost(&error) || self.channels.live() < 2 {
                        return Err(error);
                    }
                    tracing::warn!(channel, error = %error.chain(), "a data channel is lost");
                    missing.retain(|other| *other != channel);
                    reported.fenced = true;
                    self.channels.lose(channel);
                    self.statistics.lost_channels += 1;
                    self.emit(&Event::ChannelLost { channel });
                    unclosed.push((channel, error));
                    (mark, progressed) = (self.progress_mark(), Instant::now());
                }
                Ok(Item::Report(SenderReport::Finished)) => {}
                Ok(Item::Message(message)) => self.note_closed(&message, "sending pages")?,
                Err(Error::TimedOut { what, .. }) => {
                    let now = self.progress_mark();
                    if now != mark {
                        (mark, progressed) = (now, Instant::now());
                    } else if progressed.elapsed() >= stall {
                        return Err(Error::TimedOut { what, after: stall });
                    }
                }
                Err(error) => return Err(error),
            }
            if awaited == Awaited::Shares && !missing.is_empty() && !reported.fenced {
                reported.weights = self.channels.lagging();
                reported.fenced = reported.weights.is_some();
                if reported.fenced {
                    self.channels.ask_back();
                }
            }
            unclosed.retain(|(channel, _)| !self.closed_there[usize::from(*channel)]);
            // Until the destination says so, what the lost channel sent may land on top of what
            // another sends from now on.
            if missing.is_empty() && progressed.elapsed() >= self.source.common.timeouts.handshake {
                return Err(unclosed.pop().map_or(
                    Error::TimedOut { what: "a lost channel to be closed", after: stall },
                    |(_, error)| error,
                ));
            }
        }
        Ok(reported)
    }

    /// Takes a message that may come at any time while pages are being sent.
    pub(super) fn note_closed(
        &mut self,
        message: &Message,
        state: &'static str,
    ) -> Result<(), Error> {
        let closed = match message {
            Message::ChannelClosed { channel } => self.closed_there.get_mut(usize::from(*channel)),
            _ => None,
        };
        *closed.ok_or_else(|| unexpected(message, state))? = true;
        Ok(())
    }

    pub(super) fn finish_round(&mut self, began: &RoundBegan) -> RoundStatistics {
        let statistics = RoundStatistics {
            dirty_pages: began.dirty_pages,
            landed_bytes: self.landed_bytes() - began.landed_bytes,
            took: began.at.elapsed(),
        };
        self.statistics.rounds.push(statistics);
        statistics
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

    fn landed_bytes(&self) -> u64 {
        self.channels.gauges.iter().map(|gauge| gauge.landed_bytes.load(Ordering::Relaxed)).sum()
    }

    /// Changes whenever any sender gets anywhere.
    fn progress_mark(&self) -> u64 {
        let looked_at: u64 = self.channels.gauges.iter().map(|gauge| gauge.pages().total()).sum();
        looked_at.wrapping_add(self.landed_bytes())
    }
}
