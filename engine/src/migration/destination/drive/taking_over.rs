//! From the last page to the guest's first step here: the point of no return, and what follows it.

use std::time::{Duration, Instant};

use super::{Answer, Drive};
use crate::config::Timeouts;
use crate::control::handover::DestinationInput;
use crate::control::protocol::Message;
use crate::error::Error;
use crate::host::Guarded;
use crate::machine::Machine;
use crate::migration::destination::loading::nanoseconds;
use crate::migration::session::{Item, MEANT_SILENCE, Patience, unexpected};
use crate::progress::Event;
use crate::snapshot::Phase;

impl Drive {
    /// Waits for the commit, or for the source to call the switchover off.
    pub(super) fn await_commit(&mut self) -> Result<Answer, Error> {
        let Timeouts { commit, release, .. } = self.timeouts;
        let commit = commit.max(MEANT_SILENCE);
        let mut patience = Patience::now("the commit", commit);
        let whole = Patience::now("the source to release its resources", release.max(commit));
        loop {
            let sooner = if whole.left() < patience.left() { whole } else { patience };
            match self.session.next_committed(sooner)? {
                Item::Message(Message::Commit) => return Ok(Answer::Commit),
                Item::Message(Message::Releasing) => {
                    patience = Patience::now("the commit", commit);
                }
                Item::Message(Message::CalledOff { attempt }) => {
                    self.called_off(attempt)?;
                    return Ok(Answer::CalledOff);
                }
                Item::Message(other) => return Err(unexpected(&other, "waiting for the commit")),
                // Everything has landed; how the data channels end matters no more, unless more
                // pages come after all.
                Item::Report(report) => self.late.push_back(report),
            }
        }
    }

    /// Runs the guest, which is ours.
    pub(super) fn take_over<M: Machine>(&mut self, machine: &mut Guarded<M>) -> Result<(), Error> {
        let began = Instant::now();
        self.handover.handle(DestinationInput::Commit);
        self.shared().set_phase(Phase::Committed);
        if let Err(error) = machine.reacquire_resources() {
            return Err(self.give_back(machine, error));
        }
        let resumed = if self.paused { Ok(()) } else { machine.resume() };
        match resumed {
            Ok(()) => {}
            // It may have run: the guest is ours, and not for the source to resume.
            Err(panic @ Error::Panicked { .. }) => {
                self.session.tell(&panic);
                return Err(panic);
            }
            Err(error) => return Err(self.give_back(machine, error)),
        }
        self.handover.handle(DestinationInput::Resumed);
        // The guest is ours, whether the source hears of it or not.
        let resume_ns = nanoseconds(began.elapsed());
        if let Err(unheard) = self.session.send_committed(&Message::Resumed { resume_ns }) {
            tracing::warn!(error = %unheard.chain(), "the source could not be told that the guest runs");
        }
        self.statistics.downtime.resume = Duration::from_nanos(resume_ns);
        self.tell(&Event::Committed);
        self.tell(&Event::there(self.paused));
        Ok(())
    }

    /// Gives the guest back, which has not run here, and all that the source needs to run it.
    fn give_back<M: Machine>(&mut self, machine: &mut Guarded<M>, error: Error) -> Error {
        let error = match machine.release_resources() {
            Ok(()) => error,
            Err(cause) => {
                Error::StillHeld { why: error.chain().to_string(), cause: Box::new(cause) }
            }
        };
        self.handover.handle(DestinationInput::ResumeFailed);
        let told = Message::GaveBack { text: error.chain().to_string() };
        if let Err(unheard) = self.session.send_committed(&told) {
            tracing::warn!(error = %unheard.chain(), "the source does not know that it has the guest back");
        }
        error
    }
}
