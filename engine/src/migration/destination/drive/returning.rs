//! A link that is lost, and the source that comes back on another one.
//!
//! Everything that could land over the lost link has ended before the source is answered. What the source says of
//! itself settles the rest: a switchover that it called off, or the commit, or the question what became of a guest
//! that is here already.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::{Drive, accept};
use crate::control::handover::{DestinationAction, DestinationInput, DestinationState};
use crate::control::protocol::{FailureReason, Message, Rejoin, Rejoined};
use crate::error::Error;
use crate::host::caught;
use crate::migration::destination::closing::Closing;
use crate::migration::session::{
    Item, MEANT_SILENCE, OVERTIME, Patience, Session, is_of_the_link, unexpected,
};
use crate::pages::memory::GuestMemory;
use crate::progress::Event;
use crate::snapshot::Phase;
use crate::transport::{DestinationLink, LinkPurpose, Returning};

/// How long somebody who connects may take to say that it is the source.
const GREETING: Duration = Duration::from_secs(2);

/// Between one attempt to hear of the source and the next: somewhere to wait that fails at once may go on to.
const PAUSE: Duration = Duration::from_millis(20);

/// What others are told meanwhile.
const TAKEN: &str = "a migration whose link was lost is waited for here; try again later";

/// The link that is used, among those of a migration.
#[derive(Default)]
pub(super) struct Epoch {
    /// As the source counts them.
    number: u32,
    /// Data channels of this link that are lost.
    pub(super) lost_channels: u16,
    /// Those of links before that are not there again.
    missing: u16,
    /// Bytes of control messages on links before this one.
    pub(super) control_bytes: u64,
}

/// What the source came back for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Back {
    /// To go on with rounds.
    Copying,
    /// It has committed.
    Committed,
}

impl Drive {
    /// After a failure: waits for the source to come back, if that can mend it. The error that ends the migration,
    /// if not. A guest that was loaded for a switchover which the source called off is unloaded by `unload`.
    pub(super) fn await_return(
        &mut self,
        memory: &Arc<GuestMemory>,
        mut unload: impl FnMut() -> Result<(), Error>,
        error: Error,
    ) -> Result<Back, Error> {
        if !self.agreement.rejoins || !is_of_the_link(&error) {
            return Err(error);
        }
        let lost = Instant::now();
        let error = self.session.explain(error);
        if !is_of_the_link(&error) {
            return Err(error);
        }
        let why = error.chain().to_string();
        // Once it may have committed the source has its own time to notice, where only this side has lost the link.
        let notices = match self.handover.state() {
            DestinationState::Receiving => Duration::ZERO,
            _ => self.timeouts.commit.max(MEANT_SILENCE).saturating_add(OVERTIME),
        };
        let at_most = self.timeouts.rejoin.saturating_add(notices);
        let patience = Patience::since("the source to come back", lost, at_most);
        let phase = self.shared().set_phase(Phase::LinkLost);
        tracing::warn!(error = %why, "the link is lost");
        self.tell(&Event::LinkLost { why: why.clone(), at_most });
        loop {
            self.end_epoch();
            let back = self
                .hear_return(patience)
                .and_then(|rejoin| self.take_up(memory, &mut unload, &rejoin));
            let cause = match back {
                Ok(back) => {
                    let copying = back == Back::Copying;
                    self.shared().set_phase(if copying { Phase::PreCopy } else { phase });
                    self.statistics.rejoins += 1;
                    self.tell(&Event::Rejoined { epoch: self.epoch.number, after: lost.elapsed() });
                    return Ok(back);
                }
                Err(cause) if self.link.is_some() => self.session.explain(cause),
                Err(cause) => cause,
            };
            // Until the source has its answer every time limit is the link's.
            if is_of_the_link(&cause) || matches!(cause, Error::TimedOut { .. }) {
                tracing::debug!(error = %cause.chain(), "the source is not back yet");
                if patience.left().is_zero() {
                    return Err(Error::LinkLost { why, after: at_most, cause: Box::new(cause) });
                }
                self.pause(patience)?;
            } else if self.link.is_none() && matches!(cause, Error::Transport(_)) {
                // There is nowhere left to wait.
                return Err(Error::LinkLost { why, after: lost.elapsed(), cause: Box::new(cause) });
            } else {
                return Err(cause);
            }
        }
    }

    /// Lets some time pass before the source is waited for again.
    fn pause(&self, patience: Patience) -> Result<(), Error> {
        let pause = PAUSE.min(patience.left());
        if self.may_be_cancelled() {
            return self.shared().rest(pause);
        }
        thread::sleep(pause);
        Ok(())
    }

    /// Nothing is left of the link: no thread that could let anything land.
    fn end_epoch(&mut self) {
        self.populating.stop();
        self.epoch.control_bytes += self.session.end();
        self.link = None;
        self.closing = Closing::default();
        self.late.clear();
        self.gauges.iter().for_each(|gauge| gauge.begin_epoch());
        self.epoch.missing = self.epoch.missing.max(std::mem::take(&mut self.epoch.lost_channels));
    }

    /// Waits until the source is back, and hears what for.
    fn hear_return(&mut self, patience: Patience) -> Result<Rejoin, Error> {
        let (migration, epoch) = (self.hello.key.id, self.epoch.number.saturating_add(1));
        let purpose = LinkPurpose::Rejoin { migration, epoch };
        let may_be_cancelled = self.may_be_cancelled();
        loop {
            let timeout = Some(patience.left());
            let link = if may_be_cancelled {
                accept(&mut *self.rendezvous, purpose, timeout, &self.settings)?
            } else {
                caught("the rendezvous", || self.rendezvous.accept(purpose, timeout))??
            };
            match self.is_source(link, patience) {
                Ok(rejoin) => return Ok(rejoin),
                Err(error) => {
                    tracing::info!(error = %error.chain(), "somebody else came, and is turned away");
                }
            }
            if may_be_cancelled {
                self.settings.shared.check()?;
            }
        }
    }

    /// Whether it is the source who has come. If so, the link is the one to go on with.
    fn is_source(
        &mut self,
        mut link: Box<dyn DestinationLink>,
        patience: Patience,
    ) -> Result<Rejoin, Error> {
        let conversation = self.session.conversation_on_next_link();
        let mut session = Session::on(&mut *link, self.settings.clone(), conversation)?;
        let greeting = GREETING.min(self.timeouts.handshake).min(patience.left());
        let greeting = Patience::now("a source's first word", greeting);
        let heard = session.next_committed(greeting);
        if let Ok(Item::Message(Message::Rejoin(rejoin))) = &heard
            && rejoin.key == self.hello.key
            && rejoin.epoch > self.epoch.number
        {
            session.outlives_its_link();
            let returning = Returning::by(self.hello.key.clone(), rejoin.epoch);
            caught("the transport", || link.expect_return(returning))?;
            self.epoch.number = rejoin.epoch;
            (self.session, self.link) = (session, Some(link));
            return Ok(rejoin.clone());
        }
        let (reason, text) = (FailureReason::Declined, TAKEN.to_owned());
        session.say_last(&Message::Failed { reason, text });
        Err(heard.err().unwrap_or(Error::Internal("it says what another source says")))
    }

    /// Answers the source, and goes on as it says.
    fn take_up(
        &mut self,
        memory: &Arc<GuestMemory>,
        unload: &mut impl FnMut() -> Result<(), Error>,
        rejoin: &Rejoin,
    ) -> Result<Back, Error> {
        let (attempt, committed) = (rejoin.switchovers, rejoin.committed);
        let action = self.handover.handle(DestinationInput::Returned { attempt, committed });
        match action {
            DestinationAction::Unload => {
                unload()?;
                self.tell(&Event::CalledOff { attempt, stage: None, stood: Duration::ZERO });
                self.shared().board.write(|written| written.called_off += 1);
            }
            DestinationAction::Refuse => {
                let said = Message::Rejoin(rejoin.clone());
                return Err(unexpected(&said, "the guest is elsewhere by what was said before"));
            }
            _ => {}
        }
        // The source may know of some of them already.
        let written = if committed { Vec::new() } else { self.written.clone() };
        let rejoined = Message::Rejoined(Rejoined { epoch: rejoin.epoch, written });
        let answered = self.session.send_committed(&rejoined);
        if action == DestinationAction::ResumeGuest {
            // It is ours, whether the source hears that or not: it will ask again.
            return Ok(Back::Committed);
        }
        answered?;
        if committed {
            return Ok(Back::Committed);
        }
        self.open_channels(memory)?;
        self.statistics.reopened_channels += u32::from(std::mem::take(&mut self.epoch.missing));
        Ok(Back::Copying)
    }
}
