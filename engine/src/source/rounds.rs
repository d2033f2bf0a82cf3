//! Pre-copy: rounds over what the guest dirtied, and what a round is made of.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::drive::Drive;
use crate::convergence::{Convergence, Round, Verdict};
use crate::dirty::DirtyBitmap;
use crate::error::Error;
use crate::progress::{Event, Phase};
use crate::protocol::Message;
use crate::sender::{Command, SenderReport};
use crate::session::{Item, Patience, unexpected};
use crate::stats::RoundStatistics;

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

impl Drive<'_> {
    /// Rounds over the running guest, until the rest fits into the downtime limit. The rest is
    /// then harvested and not sent.
    pub(super) fn pre_copy(&mut self) -> Result<(), Error> {
        self.source.shared.set_phase(Phase::PreCopy);
        let mut convergence = Convergence::new(self.source.downtime_limit, self.source.max_rounds);
        self.harvested = Some(DirtyBitmap::all(self.memory.layout()));
        loop {
            let began = self.begin_round(false)?;
            self.await_round()?;
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

    /// Asks the trackers what was written, on top of what is harvested and not sent. Returns the
    /// pages to send.
    pub(super) fn harvest(&mut self) -> Result<u64, Error> {
        let reused = self.given.take().and_then(|given| Arc::try_unwrap(given).ok());
        let mut dirty = match (self.harvested.take(), reused) {
            (Some(waiting), _) => waiting,
            (None, Some(mut reused)) => {
                reused.clear();
                reused
            }
            (None, None) => DirtyBitmap::new(self.memory.layout()),
        };
        let result = self.dirty.harvest(&mut dirty);
        let pages = dirty.count();
        self.harvested = Some(dirty);
        result?;
        Ok(pages)
    }

    /// Gives what was harvested to the senders, as a round of its own.
    pub(super) fn begin_round(&mut self, settle: bool) -> Result<RoundBegan, Error> {
        let round = u32::try_from(self.statistics.rounds.len() + 1).unwrap_or(u32::MAX);
        let dirty_pages = self.harvested.as_ref().map_or(0, DirtyBitmap::count);
        let began =
            RoundBegan { at: Instant::now(), dirty_pages, landed_bytes: self.landed_bytes() };
        self.give_to_senders(settle);
        self.source.shared.set_round(round, dirty_pages);
        self.session.send(&Message::Round { round, dirty_pages })?;
        self.emit(&Event::RoundStarted { round, dirty_pages });
        Ok(began)
    }

    /// Gives what was harvested to the senders.
    pub(super) fn give_to_senders(&mut self, settle: bool) {
        let Some(dirty) = self.harvested.take().map(Arc::new) else { return };
        for sender in &self.senders {
            // A sender that is gone has reported why; the wait for its report finds out.
            let _ = sender.send(Command::Round { dirty: Arc::clone(&dirty), settle });
        }
        self.given = Some(dirty);
    }

    /// Waits for all senders. Returns when the last one was done.
    pub(super) fn await_round(&mut self) -> Result<Instant, Error> {
        let mut last = None;
        let mut progress = self.progress_mark();
        let mut progressed = Instant::now();
        let stall = self.source.common.timeouts.stall;
        let mut missing = self.senders.len();
        while missing > 0 {
            match self.session.next(Patience::now("pages to land", STALL_TICK)) {
                Ok(Item::Report(SenderReport::RoundDone { at })) => {
                    missing -= 1;
                    last = last.max(Some(at));
                }
                Ok(Item::Report(SenderReport::Failed(error))) => return Err(error),
                Ok(Item::Report(SenderReport::Finished)) => {}
                Ok(Item::Message(message)) => return Err(unexpected(&message, "sending pages")),
                Err(Error::TimedOut { what, .. }) => {
                    let mark = self.progress_mark();
                    if mark != progress {
                        (progress, progressed) = (mark, Instant::now());
                    } else if progressed.elapsed() >= stall {
                        return Err(Error::TimedOut { what, after: stall });
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(last.unwrap_or_else(Instant::now))
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
    pub(super) fn await_finish(&mut self) {
        let patience = Patience::now("channels to end", FINISH);
        let mut missing = usize::from(self.source.channels);
        while missing > 0 {
            match self.session.next_committed(patience) {
                Ok(Item::Report(SenderReport::Finished | SenderReport::Failed(_))) => missing -= 1,
                Err(Error::TimedOut { .. }) => return,
                _ => {}
            }
        }
    }

    fn landed_bytes(&self) -> u64 {
        self.gauges.iter().map(|gauge| gauge.landed_bytes.load(Ordering::Relaxed)).sum()
    }

    /// Changes whenever any sender gets anywhere.
    fn progress_mark(&self) -> u64 {
        let looked_at: u64 = self.gauges.iter().map(|gauge| gauge.pages().total()).sum();
        looked_at.wrapping_add(self.landed_bytes())
    }
}
