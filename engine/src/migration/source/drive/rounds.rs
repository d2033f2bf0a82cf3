//! Pre-copy: rounds over what the guest dirtied, and what a round is made of.

use std::time::Instant;

use super::{DIRTY_SOURCES, Drive};
use crate::control::convergence::{HEAT_PARTS, Round, Verdict};
use crate::control::protocol::Message;
use crate::error::Error;
use crate::host::{Guarded, caught};
use crate::machine::Machine;
use crate::pages::memory::PAGE_BYTES;
use crate::progress::Event;
use crate::snapshot::Phase;
use crate::stats::RoundStatistics;

/// A round with no more page bytes ends when all have landed. Buffers on the way could swallow all of
/// it, and it would seem to have taken no time.
const SETTLED_BYTES: u64 = 64 << 20;

/// A round that is under way.
pub(super) struct RoundBegan {
    pub(super) at: Instant,
    dirty_pages: u64,
    landed_bytes: u64,
}

impl Drive<'_> {
    /// Rounds over the running guest, until the rest fits into the downtime limit. The rest is
    /// then harvested and not sent.
    pub(super) fn pre_copy<M: Machine>(&mut self, machine: &mut Guarded<M>) -> Result<(), Error> {
        self.source.shared.set_phase(Phase::PreCopy);
        loop {
            let number = self.number_of_rounds().saturating_add(1);
            let _span = tracing::info_span!("round", number).entered();
            self.take_wishes();
            self.rehearse(machine)?;
            self.reopen_channels()?;
            let settle = self.channels.dirty()?.count() * PAGE_BYTES <= SETTLED_BYTES;
            let began = self.begin_round(settle)?;
            self.ping()?;
            let mut waiting = self.waiting_for_round();
            self.await_round(&mut waiting, settle, None)?;
            self.channels.all_looked_at();
            let statistics = self.finish_round(&began);
            self.take_wishes();
            let (verdict, dirty_pages) = self.judge(&began)?;
            // It writes nothing, and stands still for as long as it likes.
            if machine.is_paused()? {
                return Ok(());
            }
            self.tell_outlook()?;
            self.throttle(machine)?;
            self.emit(&Event::RoundFinished { round: number, statistics, verdict })?;
            match verdict {
                Verdict::SwitchOver { .. } => return Ok(()),
                Verdict::PostCopy { .. } => return Err(Error::Unsupported("post-copy")),
                Verdict::GiveUp { .. } => {
                    let (at_fault, takes, expected) = self.convergence.at_fault(dirty_pages);
                    return Err(Error::NotConverging {
                        rounds: number,
                        dirty_pages,
                        expected,
                        limit: self.convergence.settings().downtime_limit,
                        at_fault,
                        takes,
                    });
                }
                Verdict::Iterate { .. } | Verdict::Approach { .. } => {
                    self.rest(self.convergence.rest(began.at.elapsed()))?;
                }
            }
        }
    }

    /// Decides what follows a round, and with how many pages.
    pub(super) fn judge(&mut self, began: &RoundBegan) -> Result<(Verdict, u64), Error> {
        // Not since the round began: what is written between rounds comes with the next one.
        let since = self.harvested;
        let mut dirty_pages = self.harvest()?;
        let parts = self.channels.dirty()?.counts(HEAT_PARTS);
        let took = began.at.elapsed();
        let now = self.now();
        let dirtied_for = self.harvested.saturating_duration_since(since);
        let round = Round { took, dirtied_for, dirty_pages: &parts };
        let mut verdict = self.convergence.round_ended(now, round);
        if let Verdict::Approach { .. } = verdict {
            // The link is empty, so an answer comes as fast as it will when it matters.
            self.await_landings()?;
            self.ping()?;
            dirty_pages = self.harvest()?;
            verdict = self.convergence.decide(self.now(), dirty_pages);
        }
        self.statistics.dirty_pages_per_second =
            self.convergence.dirty_rate().pages_per_second().unwrap_or(0.0);
        self.statistics.bytes_per_second =
            self.convergence.bandwidth().bytes_per_second().unwrap_or(0.0);
        self.source.shared.board.write(|written| {
            written.dirty_pages_per_second = self.statistics.dirty_pages_per_second;
            written.bytes_per_second = self.statistics.bytes_per_second;
            written.expected_downtime = verdict.expected();
            written.forecast = self.convergence.outlook().copied();
        });
        Ok((verdict, dirty_pages))
    }

    pub(super) fn number_of_rounds(&self) -> u32 {
        self.statistics.round_count
    }

    /// Asks the trackers what was written, on top of what is to be sent already. Returns the
    /// pages to send.
    pub(super) fn harvest(&mut self) -> Result<u64, Error> {
        let began = Instant::now();
        self.channels.written_there(std::mem::take(&mut self.written_there))?;
        self.channels.send_again(std::mem::take(&mut self.damaged_there))?;
        let dirty = self.channels.dirty()?;
        caught(DIRTY_SOURCES, || self.dirty.harvest(dirty))??;
        let pages = dirty.count();
        self.harvested = began;
        self.convergence.learn_harvest(began.elapsed());
        Ok(pages)
    }

    /// Has the senders send what was harvested, as a round of its own.
    pub(super) fn begin_round(&mut self, settle: bool) -> Result<RoundBegan, Error> {
        let round = self.number_of_rounds().saturating_add(1);
        let dirty_pages = self.channels.dirty()?.count();
        let landed = self.channels.landed();
        let landed_bytes = landed.iter().sum();
        let began = RoundBegan { at: Instant::now(), dirty_pages, landed_bytes };
        self.convergence.set_bandwidth_limit(self.source.shared.bandwidth_limit());
        self.convergence.round_began(self.now(), &landed, dirty_pages);
        self.source.shared.board.begin_round(round, dirty_pages);
        self.channels.lend(settle)?;
        self.session.send(&Message::Round { round, dirty_pages })?;
        self.emit(&Event::RoundStarted { round, dirty_pages })?;
        Ok(began)
    }

    /// Tells the destination of the round that goes on over another link.
    pub(super) fn announce_round(&mut self) -> Result<(), Error> {
        let round = self.number_of_rounds().saturating_add(1);
        let dirty_pages = self.channels.dirty()?.count();
        self.session.send(&Message::Round { round, dirty_pages })
    }

    pub(super) fn finish_round(&mut self, began: &RoundBegan) -> RoundStatistics {
        let statistics = RoundStatistics {
            dirty_pages: began.dirty_pages,
            landed_bytes: self.channels.landed().iter().sum::<u64>() - began.landed_bytes,
            took: began.at.elapsed(),
        };
        self.statistics.add_round(statistics);
        statistics
    }
}
