//! From the last page to the guest's first step here: the point of no return, and what follows it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Answer, Drive, FINISH};
use crate::config::Timeouts;
use crate::control::handover::{DestinationInput, DestinationState};
use crate::control::protocol::Message;
use crate::error::Error;
use crate::host::Guarded;
use crate::machine::Machine;
use crate::migration::destination::loading::nanoseconds;
use crate::migration::session::{COMMIT, HEARD, Item, MEANT_SILENCE, Patience, unexpected};
use crate::pages::memory::GuestMemory;
use crate::progress::Event;
use crate::snapshot::Phase;

impl Drive {
    /// Waits for the commit, or for the source to call the switchover off.
    pub(super) fn await_commit(&mut self) -> Result<Answer, Error> {
        let Timeouts { commit, release, .. } = self.timeouts;
        let commit = commit.max(MEANT_SILENCE);
        let mut patience = Patience::now(COMMIT, commit);
        let whole = Patience::now("the source to release its resources", release.max(commit));
        let mut has_looked = false;
        loop {
            let sooner = if whole.left() < patience.left() { whole } else { patience };
            let item = match self.session.next_committed(sooner) {
                Err(Error::TimedOut { .. }) if !has_looked && !whole.left().is_zero() => {
                    (patience, has_looked) = (patience.last_look(), true);
                    continue;
                }
                item => item?,
            };
            match item {
                Item::Message(Message::Commit) => return Ok(Answer::Commit),
                Item::Message(Message::Releasing) => {
                    (patience, has_looked) = (Patience::now(COMMIT, commit), false);
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
        self.shared().set_phase(Phase::Committed);
        self.cancelled_late = self.shared().is_cancelled();
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
        let resume_ns = nanoseconds(began.elapsed());
        self.fate = Some(Message::Resumed { resume_ns });
        self.statistics.downtime.resume = Duration::from_nanos(resume_ns);
        Ok(())
    }

    /// Tells the source what became of the guest, again if it comes back and asks. That is so, whether the source
    /// hears of it or not.
    pub(super) fn tell_fate(&mut self, memory: &Arc<GuestMemory>) {
        let Some(fate) = self.fate.clone() else { return };
        let mut said = self.session.send_committed(&fate);
        if matches!(fate, Message::Resumed { .. }) {
            self.tell(&Event::Committed);
            self.tell(&Event::there(self.paused));
        }
        loop {
            let Err(unheard) = said.and_then(|()| self.await_heard()) else { return };
            let nothing = || Err(Error::Internal("a guest was to be unloaded that has its fate"));
            match self.await_return(memory, nothing, unheard) {
                Ok(_) => said = self.session.send_committed(&fate),
                Err(unheard) => {
                    let what = if self.agreement.rejoins {
                        "the source does not know"
                    } else {
                        "the source may not know"
                    };
                    tracing::warn!(error = %unheard.chain(), "{what} what became of the guest");
                    return;
                }
            }
        }
    }

    /// Whether it is for this side to end it: not with everything loaded; and once the guest has its fate, the wait for
    /// the source to know of that.
    pub(super) fn may_be_cancelled(&self) -> bool {
        match self.handover.state() {
            DestinationState::Prepared | DestinationState::Owner => false,
            _ => !self.cancelled_late,
        }
    }

    /// Waits until the source says that it knows.
    fn await_heard(&mut self) -> Result<(), Error> {
        let at_most =
            if self.agreement.rejoins { self.timeouts.commit.max(MEANT_SILENCE) } else { FINISH };
        let patience = Patience::now(HEARD, at_most);
        loop {
            let heard = if self.may_be_cancelled() {
                self.session.next(patience)
            } else {
                self.session.next_committed(patience)
            };
            match heard? {
                Item::Message(Message::Heard) => return Ok(()),
                Item::Message(other) => return Err(unexpected(&other, "all was said")),
                // They end in order now.
                Item::Report(report) => self.late.push_back(report),
            }
        }
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
        self.fate = Some(Message::GaveBack { text: error.chain().to_string() });
        error
    }
}
