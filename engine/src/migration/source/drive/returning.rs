//! A link that is lost, and the one after it.
//!
//! What was under way is dirty again once every thread that used the link has ended, as for a lost channel. Until the
//! commit the guest runs on meanwhile, and a switchover that was under way is called off: the destination hears of
//! that on the next link. After the commit the destination is asked what became of the guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{Closing, Drive, dial};
use crate::control::handover::{SourceInput, SourceState};
use crate::control::protocol::{
    Agreement, Message, MigrationKey, OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, Rejoin,
};
use crate::error::Error;
use crate::host::{Guarded, caught};
use crate::machine::Machine;
use crate::migration::session::{Item, Patience, Session, is_of_the_link, unexpected};
use crate::progress::Event;
use crate::snapshot::Phase;
use crate::stats::Downtime;
use crate::transport::{LinkPurpose, SourceLink, TransportError};

/// Time between two attempts to reach the destination. It doubles, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What is waited for over links that come back.
const MOVED: &str = "anything to land over the links that came back";

/// The link that is used, among those of a migration.
pub(super) struct Epoch {
    pub(super) key: MigrationKey,
    /// How often a link was lost or could not be made.
    number: u32,
    /// Bytes of control messages on links before this one.
    pub(super) control_bytes: u64,
    /// What had landed when a link was lost after anything had, and when that was.
    lost: Option<(u64, Instant)>,
    /// Before the next attempt: none where something has landed over the link before.
    pause: Duration,
    /// Data channels that the link lacked in the end.
    missing: u32,
}

impl Epoch {
    pub(super) fn first(key: MigrationKey) -> Self {
        let (number, control_bytes, missing) = (0, 0, 0);
        Self { key, number, control_bytes, lost: None, pause: Duration::ZERO, missing }
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }
}

/// What goes on, on the next link.
pub(super) enum Back {
    /// Rounds over a running guest.
    Copying,
    /// Nothing: the guest is at the destination.
    HandedOver,
}

impl Epoch {
    /// Since when nothing has landed, given how much has: one link after the other that moves nothing is no link.
    fn lost_since(&mut self, landed: u64) -> Instant {
        match self.lost {
            Some((before, since)) if before == landed => since,
            _ => {
                let now = Instant::now();
                (self.lost, self.pause) = (Some((landed, now)), Duration::ZERO);
                now
            }
        }
    }
}

impl Drive<'_> {
    /// After a failure: makes another link, if that can mend it. The error that ends the migration, if not.
    pub(super) fn come_back<M: Machine>(
        &mut self,
        machine: &mut Guarded<M>,
        agreement: Agreement,
        error: Error,
    ) -> Result<Back, Error> {
        if !agreement.rejoins || !is_of_the_link(&error) {
            return Err(error);
        }
        let lost = Instant::now();
        self.stand_down(machine)?;
        let error = self.session.explain(error);
        if !is_of_the_link(&error) {
            return Err(error);
        }
        let why = error.chain().to_string();
        let at_most = self.source.common.timeouts.rejoin;
        let committed = self.handover.state() == SourceState::Committed;
        // After the commit nothing moves over any link.
        let since = if committed { lost } else { self.epoch.lost_since(self.channels.moved()) };
        let patience = Patience::since("the destination to be reached", since, at_most);
        if patience.left().is_zero() && !committed {
            // It came back, as often as there was time for.
            let cause = Box::new(Error::TimedOut { what: MOVED, after: at_most });
            return Err(Error::LinkLost { why, after: at_most, cause });
        }
        let phase = self.source.shared.set_phase(Phase::LinkLost);
        tracing::warn!(error = %why, "the link is lost");
        self.emit(&Event::LinkLost { why: why.clone(), at_most })?;
        let mut distrusted = None;
        loop {
            self.end_epoch()?;
            self.rest_before_dialling(patience)?;
            let cause = match self.rejoin(agreement, patience) {
                Ok(back) => {
                    self.source.shared.set_phase(phase);
                    self.statistics.rejoins += 1;
                    self.emit(&Event::Rejoined {
                        epoch: self.epoch.number,
                        after: lost.elapsed(),
                    })?;
                    return Ok(back);
                }
                Err(cause) if self.link.is_some() => self.session.explain(cause),
                Err(cause) => cause,
            };
            // On the way to an answer every time limit is the link's.
            if !is_of_the_link(&cause) && !matches!(cause, Error::TimedOut { .. }) {
                return Err(cause);
            }
            if let Error::Transport(TransportError::Security { reason, .. }) = &cause
                && distrusted.as_ref() != Some(reason)
            {
                tracing::warn!("the link does not come back: no secure connection: {reason}");
                distrusted = Some(reason.clone());
            }
            tracing::debug!(error = %cause.chain(), "the link does not come back yet");
            if patience.left() <= FIRST_PAUSE {
                return Err(Error::LinkLost { why, after: at_most, cause: Box::new(cause) });
            }
        }
    }

    fn rest_before_dialling(&mut self, patience: Patience) -> Result<(), Error> {
        // There are attempts until the time is over.
        let pause = self.epoch.pause.min(patience.left() / 2);
        self.epoch.pause = (2 * self.epoch.pause).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        if self.handover.state() == SourceState::Committed {
            std::thread::sleep(pause);
            return Ok(());
        }
        self.source.shared.rest(pause)
    }

    /// The guest stands still for nothing: a switchover that was under way is called off.
    fn stand_down<M: Machine>(&mut self, machine: &mut Guarded<M>) -> Result<(), Error> {
        if self.handover.state() == SourceState::Committed {
            return Ok(());
        }
        if self.handover.state() == SourceState::Stopped {
            if self.may_be_released {
                machine.reacquire_resources()?;
                self.may_be_released = false;
            }
            if !self.paused {
                machine.resume()?;
            }
            let stood = self.stands_since.elapsed();
            self.source.shared.set_stands_still(false);
            self.source.shared.set_phase(Phase::PreCopy);
            self.statistics.called_off += stood;
            self.statistics.downtime = Downtime::default();
            let attempt = self.handover.attempt();
            // The destination hears of it when it hears anything again.
            self.handover.handle(SourceInput::CalledOff);
            self.source.shared.board.write(|written| written.called_off += 1);
            self.emit(&Event::CalledOff { attempt, stage: None, stood })?;
        }
        // It gains nothing by being slow now. The next round decides anew.
        self.end_throttling(machine);
        Ok(())
    }

    /// Nothing is left of the link: neither threads nor what they had under way, which is dirty again.
    pub(super) fn end_epoch(&mut self) -> Result<(), Error> {
        self.epoch.missing = self.epoch.missing.max(self.channels.missing());
        self.stop.store(true, Ordering::Relaxed);
        self.channels.dismiss();
        self.epoch.control_bytes += self.session.end();
        self.link = None;
        self.channels.begin_epoch()?;
        self.late.clear();
        self.closing = Closing::new(self.source.channels);
        self.steering.begin_epoch();
        self.stop = Arc::new(AtomicBool::new(false));
        Ok(())
    }

    /// Makes the next link, and has the destination answer on it.
    fn rejoin(&mut self, agreement: Agreement, patience: Patience) -> Result<Back, Error> {
        let link = self.dial_again()?;
        self.go_on_with(link, agreement, patience)
    }

    pub(super) fn dial_again(&mut self) -> Result<Box<dyn SourceLink>, Error> {
        self.epoch.number = self.epoch.number.saturating_add(1);
        let Epoch { ref key, number: epoch, .. } = self.epoch;
        let purpose = LinkPurpose::Rejoin { migration: key.id, epoch };
        if self.handover.state() == SourceState::Committed {
            // Too late to cancel.
            return Ok(caught("the transport", || self.connector.connect(purpose))??);
        }
        dial(&mut *self.connector, purpose, &self.settings)
    }

    /// Has the destination answer on a link that takes the place of the one before.
    pub(super) fn go_on_with(
        &mut self,
        mut link: Box<dyn SourceLink>,
        agreement: Agreement,
        patience: Patience,
    ) -> Result<Back, Error> {
        let committed = self.handover.state() == SourceState::Committed;
        let conversation = self.session.conversation_on_next_link();
        self.session = Session::on(&mut *link, self.settings.clone(), conversation)?;
        self.session.outlives_its_link();
        self.link = Some(link);
        let rejoin = Rejoin {
            oldest_version: OLDEST_PROTOCOL_VERSION,
            newest_version: PROTOCOL_VERSION,
            key: self.epoch.key.clone(),
            epoch: self.epoch.number,
            rounds: self.number_of_rounds(),
            switchovers: self.handover.attempt(),
            committed,
        };
        let handshake = self.source.common.timeouts.handshake.min(patience.left());
        let answer = Patience::now("the destination's answer to the return", handshake);
        let said = Message::Rejoin(rejoin);
        let heard = if committed {
            self.session.send_committed(&said)?;
            self.session.next_committed(answer)?
        } else {
            self.session.send(&said)?;
            Item::Message(self.session.next_message(answer)?)
        };
        let rejoined = match heard {
            Item::Message(Message::Rejoined(rejoined)) => rejoined,
            Item::Message(other) => {
                return Err(unexpected(&other, "waiting for the answer to the return"));
            }
            Item::Report(_) => return Err(Error::Internal("a report of no channel")),
        };
        if committed {
            return self.learn_fate(patience).map(|()| Back::HandedOver);
        }
        // At once: a destination that says this over and over does not have it pile up.
        self.channels.written_there(rejoined.written)?;
        self.open_channels(agreement)?;
        self.statistics.reopened_channels += std::mem::take(&mut self.epoch.missing);
        Ok(Back::Copying)
    }

    /// What became of a guest that was committed on an earlier link.
    fn learn_fate(&mut self, patience: Patience) -> Result<(), Error> {
        let resume = self.await_fate(patience)?;
        self.statistics.downtime.resume = resume;
        self.statistics.downtime.commit = self.stands_since.elapsed().saturating_sub(resume);
        Ok(())
    }

    /// Waits for the destination's word on what became of the guest, and says that it was heard.
    pub(super) fn await_fate(&mut self, mut patience: Patience) -> Result<Duration, Error> {
        let mut is_last = false;
        let fate = loop {
            let item = match self.session.next_committed(patience) {
                Err(Error::TimedOut { .. }) if !is_last => {
                    (patience, is_last) = (patience.last_look(), true);
                    continue;
                }
                item => item?,
            };
            match item {
                Item::Message(Message::Resumed { resume_ns }) => {
                    self.handover.handle(SourceInput::Resumed);
                    break Ok(Duration::from_nanos(resume_ns));
                }
                Item::Message(Message::GaveBack { text }) => {
                    self.handover.handle(SourceInput::GaveBack);
                    break Err(Error::GivenBack { text });
                }
                Item::Message(other) => {
                    return Err(unexpected(&other, "waiting for the answer to the commit"));
                }
                // Data channels have done their work; how they end matters no more.
                Item::Report(_) => {}
            }
        };
        // It is known here. The destination waits for this for a while only.
        if let Err(unheard) = self.session.send_committed(&Message::Heard) {
            tracing::debug!(error = %unheard.chain(), "the destination could not be told that it was heard");
        }
        fate
    }
}
