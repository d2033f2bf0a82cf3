//! The switchover: from the pause to the answer to the commit.

use std::time::{Duration, Instant};

use super::drive::{Drive, refused};
use crate::digest::Digest;
use crate::error::Error;
use crate::handover::{SourceAction, SourceInput};
use crate::machine::{Machine, MachineOperation};
use crate::progress::{Event, Phase};
use crate::protocol::{
    Agreement, MAX_DEVICE_STATE_BYTES, MAX_STATE_CHUNK_BYTES, Message, Prepare, Prepared,
};
use crate::session::{Item, Patience, unexpected};

/// Measures parts that follow one another and leave nothing out.
struct Stopwatch(Instant);

impl Stopwatch {
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now.saturating_duration_since(std::mem::replace(&mut self.0, now))
    }
}

impl Drive<'_> {
    /// From the pause to the answer to the commit.
    pub(super) fn switch_over<M: Machine>(
        &mut self,
        machine: &mut M,
        agreement: Agreement,
        transfer: Instant,
    ) -> Result<(), Error> {
        let mut watch = Stopwatch(Instant::now());
        self.source.shared.set_phase(Phase::Switchover);
        // From here on the guest is stopped, or may be: a failure must resume it.
        self.handover.handle(SourceInput::Paused);
        machine.pause().map_err(|cause| refused(MachineOperation::Pause, cause))?;
        self.statistics.downtime.pause = watch.lap();
        self.emit(&Event::GuestPaused);
        self.harvest()?;
        self.statistics.downtime.final_harvest = watch.lap();

        let began = self.begin_round(true)?;
        let mut state = Vec::new();
        let saving = Instant::now();
        machine.save(&mut state).map_err(|cause| refused(MachineOperation::Save, cause))?;
        let saved = Instant::now();
        self.statistics.device_state.save = saved.saturating_duration_since(saving);
        self.statistics.device_state.bytes = state.len() as u64;
        let landed = self.await_round(true)?;
        // Saved while the pages were under way; what took longer than they is its own part.
        let overtime = saved.saturating_duration_since(landed);
        self.statistics.downtime.device_state += overtime;
        self.statistics.downtime.final_pages += watch.lap().saturating_sub(overtime);
        // Saving may have dirtied memory.
        let late_pages = self.harvest()?;
        self.statistics.downtime.final_harvest += watch.lap();
        if late_pages > 0 {
            self.channels.lend(true)?;
            self.await_round(true)?;
        }
        self.finish_round(&began);
        self.statistics.transfer = transfer.elapsed();
        self.statistics.downtime.final_pages += watch.lap();

        let digest = if agreement.verify { Some(Digest::of(&self.memory)?) } else { None };
        self.statistics.downtime.verify = watch.lap();
        let prepared = self.prepare(&state, digest)?;
        self.statistics.device_state.load = Duration::from_nanos(prepared.load_ns);
        let verified = Duration::from_nanos(prepared.verify_ns);
        let lap = watch.lap();
        self.statistics.downtime.verify += verified.min(lap);
        self.statistics.downtime.device_state += lap.saturating_sub(verified);

        machine
            .release_resources()
            .map_err(|cause| refused(MachineOperation::ReleaseResources, cause))?;
        self.released = true;
        let resume = self.commit()?;
        let lap = watch.lap();
        self.statistics.downtime.resume = resume.min(lap);
        self.statistics.downtime.commit = lap.saturating_sub(resume);
        Ok(())
    }

    /// Sends the device state and has the destination load it.
    fn prepare(&mut self, state: &[u8], digest: Option<Digest>) -> Result<Prepared, Error> {
        let state_bytes = state.len() as u64;
        if state_bytes > MAX_DEVICE_STATE_BYTES {
            return Err(Error::Configuration(format!(
                "device state of {state_bytes} bytes, at most {MAX_DEVICE_STATE_BYTES} are possible"
            )));
        }
        for chunk in state.chunks(MAX_STATE_CHUNK_BYTES) {
            self.session.send(&Message::StateChunk(chunk.to_vec()))?;
        }
        self.session.send(&Message::Prepare(Prepare { state_bytes, digest }))?;
        let patience =
            Patience::now("the destination to load the guest", self.source.common.timeouts.load);
        let prepared = loop {
            match self.session.next_message(patience)? {
                Message::Prepared(prepared) => break prepared,
                // All has landed, so one that was lost since matters no more.
                other => self.note_closed(&other, "waiting for the destination to load")?,
            }
        };
        match (digest, prepared.digest) {
            (Some(source_digest), Some(destination_digest))
                if source_digest != destination_digest =>
            {
                Err(Error::MemoryDiffers { source_digest, destination_digest })
            }
            _ => Ok(prepared),
        }
    }

    /// The point of no return. Returns how long the destination took to resume.
    fn commit(&mut self) -> Result<Duration, Error> {
        if self.source.shared.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let action = self.handover.handle(SourceInput::Prepared);
        debug_assert_eq!(action, SourceAction::SendCommit);
        self.source.shared.set_phase(Phase::Committed);
        let patience =
            Patience::now("the answer to the commit", self.source.common.timeouts.commit);
        self.session.send(&Message::Commit)?;
        self.emit(&Event::Committed);
        loop {
            match self.session.next_committed(patience)? {
                Item::Message(Message::Resumed { resume_ns }) => {
                    self.handover.handle(SourceInput::Resumed);
                    return Ok(Duration::from_nanos(resume_ns));
                }
                Item::Message(Message::GaveBack { text }) => {
                    self.handover.handle(SourceInput::GaveBack);
                    return Err(Error::GivenBack { text });
                }
                Item::Message(other) => {
                    return Err(unexpected(&other, "waiting for the answer to the commit"));
                }
                // Data channels have done their work; how they end matters no more.
                Item::Report(_) => {}
            }
        }
    }
}
