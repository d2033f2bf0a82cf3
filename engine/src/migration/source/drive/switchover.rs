//! A switchover: from the pause to the answer to the commit, or back.
//!
//! While the guest stands still a clock runs against the downtime limit. When what is left would
//! overrun it the switchover is called off: the guest is resumed first, then the destination is told,
//! and what was being sent goes on as a round like any other. Pages were re-armed before they were
//! read, so the guest may write again at any time, and what was not sent is still to be sent.

use std::io;
use std::time::{Duration, Instant};

use super::Drive;
use super::rounds::RoundBegan;
use super::steering::check_state_bytes;
use super::waiting::Waiting;
use crate::control::convergence::{Attempt, Bound};
use crate::control::handover::{SourceAction, SourceInput, SourceState};
use crate::control::protocol::{
    Agreement, MAX_SAMPLES, MAX_STATE_CHUNK_BYTES, Message, PageSample, Prepare, Prepared,
};
use crate::error::Error;
use crate::host::Guarded;
use crate::machine::Machine;
use crate::migration::session::{COMPARED, FATE, Item, Patience};
use crate::pages::digest::Digest;
use crate::pages::memory::{OutOfRange, PageRange};
use crate::pages::sums::sum_of;
use crate::progress::{Event, SwitchoverStage};
use crate::snapshot::Phase;
use crate::stats::Downtime;

/// Device state up to here fits into any buffer on its way; more goes out by a thread of its own, whose
/// start costs some ten microseconds.
const STATE_AT_ONCE_BYTES: usize = 16 << 10;

/// How often pages may arrive damaged, and be sent again. A link that goes on like this is of no use.
const MOST_DAMAGES: u32 = 8;

/// What became of a switchover.
pub(super) enum Switchover {
    /// The guest runs at the destination.
    Done,
    /// The guest goes on here.
    CalledOff,
}

/// Why it must be called off, and the round that is under way.
struct Overdue {
    stage: SwitchoverStage,
    round: Option<(RoundBegan, Waiting)>,
}

impl Overdue {
    fn at(stage: SwitchoverStage) -> Self {
        Self { stage, round: None }
    }

    fn in_round(began: RoundBegan, waiting: Waiting) -> Self {
        Self { stage: SwitchoverStage::Pages, round: Some((began, waiting)) }
    }
}

/// Measures parts that follow one another and leave nothing out.
struct Stopwatch(Instant);

impl Stopwatch {
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now.saturating_duration_since(std::mem::replace(&mut self.0, now))
    }
}

impl Drive<'_> {
    /// From the pause to the answer to the commit, unless it takes too long.
    pub(super) fn switch_over<M: Machine>(
        &mut self,
        machine: &mut Guarded<M>,
        agreement: Agreement,
    ) -> Result<Switchover, Error> {
        // The guest still runs: telling it costs no downtime.
        let number = self.handover.attempt() + 1;
        let _span = tracing::info_span!("switchover", attempt = number).entered();
        self.session.send(&Message::Switchover { attempt: number })?;
        let settings = *self.convergence.settings();
        self.paused = machine.is_paused()?;
        // There is no downtime of a guest that stood still before.
        let bound = if self.paused { Bound::BestEffort } else { settings.bound };
        let mut attempt = Attempt::begin(self.now(), settings.downtime_limit, bound);
        self.statistics.switchover_attempts += 1;
        self.statistics.downtime = Downtime::default();
        self.statistics.predicted_downtime =
            self.convergence.prediction().map(|prediction| prediction.total().expected);
        self.statistics.downtime_limit = Some(settings.downtime_limit);
        self.source.shared.set_phase(Phase::Switchover);
        let overdue = self.try_to(machine, agreement, &mut attempt)?;
        match overdue {
            None => Ok(Switchover::Done),
            Some(overdue) => {
                self.call_off(machine, attempt, overdue)?;
                Ok(Switchover::CalledOff)
            }
        }
    }

    fn try_to<M: Machine>(
        &mut self,
        machine: &mut Guarded<M>,
        agreement: Agreement,
        attempt: &mut Attempt,
    ) -> Result<Option<Overdue>, Error> {
        let mut watch = Stopwatch(Instant::now());
        // From here on the guest is stopped, or may be: a failure must resume it.
        self.handover.handle(SourceInput::Paused);
        self.stands_since = Instant::now();
        machine.pause()?;
        self.source.shared.set_stands_still(true);
        let lap = watch.lap();
        self.convergence.learn_pause(lap);
        self.statistics.downtime.pause = lap;
        self.emit(&Event::GuestPaused)?;
        let pages = self.harvest()?;
        self.statistics.downtime.final_harvest = watch.lap();
        if self.convergence.overruns(attempt, self.now(), pages) {
            return Ok(Some(Overdue::at(SwitchoverStage::Pages)));
        }

        let after_pages = self.convergence.after_pages();
        let began = self.begin_round(true)?;
        let mut state = Vec::new();
        let saving = Instant::now();
        machine.save(&mut state)?;
        let saved = Instant::now();
        check_state_bytes(state.len() as u64)?;
        let took = saved.saturating_duration_since(saving);
        self.statistics.device_state.save = took;
        self.statistics.device_state.bytes = state.len() as u64;
        self.convergence.learn_save(state.len() as u64, took);
        let mut waiting = self.waiting_for_round();
        let due = attempt.due(after_pages).and_then(|due| self.instant(due));
        let Some(landed) = self.await_round(&mut waiting, true, due)? else {
            return Ok(Some(Overdue::in_round(began, waiting)));
        };
        // Saved while the pages were under way; what took longer than they is its own part.
        let overtime = saved.saturating_duration_since(landed);
        self.statistics.downtime.device_state += overtime;
        self.statistics.downtime.final_pages += watch.lap().saturating_sub(overtime);
        // Saving may have dirtied memory.
        let late_pages = self.harvest()?;
        self.statistics.downtime.final_harvest += watch.lap();
        if late_pages > 0 {
            self.channels.lend(true)?;
            let mut waiting = self.waiting_for_round();
            if self.await_round(&mut waiting, true, due)?.is_none() {
                return Ok(Some(Overdue::in_round(began, waiting)));
            }
        }
        self.finish_round(&began);
        self.statistics.transfer = self.now();
        self.statistics.downtime.final_pages += watch.lap();

        if agreement.verify {
            self.verify()?;
            let lap = watch.lap();
            self.statistics.downtime.verify = lap;
            attempt.exclude(lap);
        }
        if attempt.overruns(self.now(), self.convergence.after_commit()) {
            return Ok(Some(Overdue::at(SwitchoverStage::DeviceState)));
        }
        let Some(mut prepared) = self.prepare(state, attempt)? else {
            // Unless it is the link that takes so long.
            if !self.session.is_sending_aside() {
                self.convergence.load_goes_on(watch.lap());
            }
            return Ok(Some(Overdue::at(SwitchoverStage::DeviceState)));
        };
        if !prepared.damaged.is_empty() {
            self.note_damage(&prepared.damaged)?;
            return Ok(Some(Overdue::at(SwitchoverStage::DamagedPages)));
        }
        // Of no matter unless this is called off after all.
        self.written_there.extend(std::mem::take(&mut prepared.written));
        let lap = watch.lap();
        let loaded = Duration::from_nanos(prepared.load_ns);
        self.statistics.device_state.load = loaded;
        self.statistics.downtime.device_state += lap;
        self.convergence.learn_load(loaded);
        self.convergence.learn_state_exchange(lap.saturating_sub(loaded));
        self.hand_over(machine, attempt, &mut watch)
    }

    /// Pages arrived damaged: they are sent again, while the guest goes on. Fails where that is no passing trouble.
    pub(super) fn note_damage(&mut self, damaged: &[PageRange]) -> Result<(), Error> {
        let pages = damaged.iter().map(|range| u64::from(range.pages)).sum();
        self.damages += 1;
        if self.damages > MOST_DAMAGES {
            return Err(Error::PagesDamaged { pages, times: self.damages });
        }
        tracing::warn!(
            pages,
            "pages arrived otherwise than they were sent; parts of memory of so many are sent again"
        );
        self.statistics.damaged_pages += pages;
        self.damaged_there.extend(damaged);
        Ok(())
    }

    /// Checksums for the destination to compare with its own; the guest stands still, and all has landed.
    fn checks(&mut self) -> Result<(Vec<u64>, Vec<PageSample>), Error> {
        let sums = self.sums.as_ref().map(|sums| sums.chunks()).unwrap_or_default();
        if !self.takes_samples()? {
            return Ok((sums, Vec::new()));
        }
        let mut seed = [0; 8];
        let failed = |cause| Error::Host { operation: "draw pages at random", cause };
        getrandom::fill(&mut seed).map_err(|error| failed(io::Error::other(error)))?;
        let mut copy = Vec::new();
        let drawn = self.channels.draw(MAX_SAMPLES, u64::from_le_bytes(seed))?;
        let sample = |(region, page)| {
            let sum = sum_of(&self.memory, region, page, &mut copy)?;
            Ok(PageSample { region, page, sum })
        };
        let samples: Result<_, OutOfRange> = drawn.into_iter().map(sample).collect();
        Ok((sums, samples?))
    }

    /// The point of no return, if there is still time for it.
    fn hand_over<M: Machine>(
        &mut self,
        machine: &mut Guarded<M>,
        attempt: &Attempt,
        watch: &mut Stopwatch,
    ) -> Result<Option<Overdue>, Error> {
        let after = self.convergence.after_commit();
        if attempt.overruns(self.now(), after) {
            return Ok(Some(Overdue::at(SwitchoverStage::Commit)));
        }
        // What fails in the middle may have released some of it.
        self.may_be_released = true;
        self.session.be_busy();
        let releasing = Instant::now();
        machine.release_resources()?;
        self.convergence.learn_release(releasing.elapsed());
        // Releasing may have taken its time.
        if attempt.overruns(self.now(), after) {
            return Ok(Some(Overdue::at(SwitchoverStage::Commit)));
        }
        // And so may the destination's word that it has failed, or waits no longer.
        for _ in 0..self.session.waiting() {
            match self.session.pending()? {
                Some(Item::Message(message)) => self.note_message(&message, "about to commit")?,
                Some(Item::Report(report)) => self.late.push_back(report),
                None => break,
            }
        }
        let resume = tracing::info_span!("commit").in_scope(|| self.commit())?;
        let lap = watch.lap();
        self.statistics.downtime.resume = resume.min(lap);
        self.statistics.downtime.commit = lap.saturating_sub(resume);
        Ok(None)
    }

    /// Lets the guest go on here, and tells the destination.
    fn call_off<M: Machine>(
        &mut self,
        machine: &mut Guarded<M>,
        attempt: Attempt,
        overdue: Overdue,
    ) -> Result<(), Error> {
        if self.may_be_released {
            // If it fails, whoever takes the guest back tries again.
            machine.reacquire_resources()?;
            self.may_be_released = false;
        }
        if !self.paused {
            machine.resume()?;
        }
        let stood = attempt.stood(self.now());
        self.source.shared.set_stands_still(false);
        self.source.shared.set_phase(Phase::PreCopy);
        self.statistics.called_off += stood;
        self.statistics.downtime = Downtime::default();
        let Overdue { stage, round } = overdue;
        // It is the link's doing, not the guest's, and need not wait until that writes less.
        if stage != SwitchoverStage::DamagedPages {
            let now = self.now();
            self.convergence.called_off(now);
        }
        let number = self.handover.attempt();
        let action = self.handover.handle(SourceInput::CalledOff);
        debug_assert_eq!(action, SourceAction::SendCalledOff(number));
        // Nobody needs the rest of the device state. Only where something of it is left has the
        // destination not been asked to load.
        if !self.session.recall()? {
            self.loads_no_more(number);
        }
        self.session.send(&Message::CalledOff { attempt: number })?;
        self.source.shared.board.write(|written| written.called_off += 1);
        self.emit(&Event::CalledOff { attempt: number, stage: Some(stage), stood })?;
        if let Some((began, mut waiting)) = round {
            self.await_round(&mut waiting, true, None)?;
            self.finish_round(&began);
        }
        self.await_load()?;
        self.harvest()?;
        Ok(())
    }

    /// Whether a switchover of that number was called off.
    pub(super) fn was_called_off(&self, number: u32) -> bool {
        let current = self.handover.attempt();
        number < current || (number == current && self.handover.state() == SourceState::Running)
    }

    /// Compares memory: both sides take a digest at the same time.
    fn verify(&mut self) -> Result<(), Error> {
        let number = self.handover.attempt();
        self.session.send(&Message::Verify { attempt: number })?;
        let began = Instant::now();
        let here = Digest::of(&self.memory)?;
        // There it takes about as long. Nothing else is said meanwhile, so the link may be lost. Or that host is much
        // slower: it has twice as long each time.
        let about = began.elapsed().saturating_mul(4);
        let at_most = self.source.common.timeouts.stall.saturating_add(about);
        let at_most = at_most.saturating_mul(1 << self.steering.comparisons.min(16));
        self.steering.comparisons += 1;
        let patience = Patience::now(COMPARED, at_most);
        loop {
            match self.session.next(patience)? {
                Item::Message(Message::Verified { attempt, digest: there })
                    if attempt == number =>
                {
                    if here != there {
                        let (source_digest, destination_digest) = (here, there);
                        return Err(Error::MemoryDiffers { source_digest, destination_digest });
                    }
                    return self.session.send(&Message::Compared { attempt, digest: here });
                }
                Item::Message(other) => {
                    self.note_message(&other, "waiting for the destination to compare memory")?;
                }
                Item::Report(report) => self.late.push_back(report),
            }
        }
    }

    /// Sends the device state and has the destination load it. `None` if that is not done in time.
    fn prepare(&mut self, state: Vec<u8>, attempt: &Attempt) -> Result<Option<Prepared>, Error> {
        let state_bytes = state.len() as u64;
        let number = self.handover.attempt();
        let load = self.source.common.timeouts.load;
        self.asked_to_load(number, Patience::now("the destination to load the guest", load));
        let (sums, samples) = self.checks()?;
        let paused = self.paused;
        let prepare = Prepare { attempt: number, state_bytes, paused, sums, samples };
        self.send_state(state, prepare)?;
        let due = attempt.due(self.convergence.after_commit()).and_then(|due| self.instant(due));
        let is_over = |due: Option<Instant>| due.is_some_and(|due| Instant::now() >= due);
        let in_time = due.map(|due| due.saturating_duration_since(Instant::now()));
        let patience = match in_time {
            Some(left) if left < load => {
                Patience::now("the destination to load the guest in time", left)
            }
            _ => Patience::now("the destination to load the guest", load),
        };
        loop {
            if is_over(due) {
                return Ok(None);
            }
            match self.session.next(patience) {
                Ok(Item::Message(Message::Prepared(prepared))) if prepared.attempt == number => {
                    self.loads_no_more(number);
                    // Who answers what has not gone out yet must not have the commit wait for it.
                    return match self.session.sent_aside(patience) {
                        Err(Error::TimedOut { .. }) if is_over(due) => {
                            self.written_there.extend(&prepared.written);
                            if !prepared.damaged.is_empty() {
                                self.note_damage(&prepared.damaged)?;
                            }
                            Ok(None)
                        }
                        sent => sent.map(|_| Some(prepared)),
                    };
                }
                Ok(Item::Message(other)) => {
                    self.note_message(&other, "waiting for the destination to load")?;
                }
                // All has landed, so a channel that was lost matters only if this is called off.
                Ok(Item::Report(report)) => self.late.push_back(report),
                Err(Error::TimedOut { .. }) if is_over(due) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends device state, and what comes after it. A link that stands still does not hold up the
    /// driver, which may have to call the switchover off.
    fn send_state(&mut self, state: Vec<u8>, prepare: Prepare) -> Result<(), Error> {
        if state.len() <= STATE_AT_ONCE_BYTES {
            if !state.is_empty() {
                self.session.send(&Message::StateChunk(state))?;
            }
            return self.session.send(&Message::Prepare(prepare));
        }
        let mut offset = 0;
        let chunks = std::iter::from_fn(move || {
            let end = state.len().min(offset + MAX_STATE_CHUNK_BYTES);
            let chunk = &state[std::mem::replace(&mut offset, end)..end];
            (!chunk.is_empty()).then(|| Message::StateChunk(chunk.to_vec()))
        });
        self.session.send_aside(chunks.chain([Message::Prepare(prepare)]))
    }

    /// Commits. Returns how long the destination took to resume.
    fn commit(&mut self) -> Result<Duration, Error> {
        self.source.shared.check()?;
        let attempt = self.handover.attempt();
        let action = self.handover.handle(SourceInput::Prepared { attempt });
        debug_assert_eq!(action, SourceAction::SendCommit);
        self.stands_since = Instant::now();
        self.source.shared.set_phase(Phase::Committed);
        let patience = Patience::now(FATE, self.source.common.timeouts.commit);
        self.session.send_committed(&Message::Commit)?;
        self.tell(&Event::Committed);
        self.await_fate(patience)
    }
}
