//! What is done about a guest that does not converge, and what is learned outside of rounds.

use std::time::{Duration, Instant};

use super::Drive;
use crate::control::protocol::{MAX_DEVICE_STATE_BYTES, Message};
use crate::error::Error;
use crate::host::Guarded;
use crate::machine::Machine;
use crate::migration::session::{Item, PONG, Patience};
use crate::progress::Event;

/// How often the destination hears of this side while pages are sent, and so this side of it: far more often than
/// either gives up a silent one.
const IN_TOUCH: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Steering {
    /// By how much the guest is slowed down.
    throttle_percent: u8,
    /// What the host was told about convergence.
    told_it_meets: Option<bool>,
    rehearsed: Option<Instant>,
    /// Pings sent, and the last one, if it has no answer yet.
    pings: u32,
    unanswered: Option<Ping>,
    /// When the last one was sent.
    pinged: Option<Instant>,
    /// How often memory was to be compared.
    pub(super) comparisons: u32,
    /// When the destination answered last, and since when it has without a long silence.
    pub(super) answered: Option<Instant>,
    pub(super) answers_since: Option<Instant>,
    /// The switchover whose state the destination was asked to load, and has not, and for how long it may.
    loading: Option<(u32, Patience)>,
}

#[derive(Debug, Clone, Copy)]
struct Ping {
    sent: Instant,
    /// Since when the destination could have answered: not while it loads device state.
    due: Instant,
}

impl Steering {
    /// The link is lost: nothing that was asked on it is answered.
    pub(super) fn begin_epoch(&mut self) {
        (self.pings, self.unanswered, self.answered, self.loading) = (0, None, None, None);
        (self.pinged, self.answers_since) = (None, None);
    }
}

impl Drive<'_> {
    /// Takes over what the host wants now.
    pub(super) fn take_wishes(&mut self) {
        self.convergence.set(self.source.shared.settings());
    }

    /// Learns what device state takes, unless that is known.
    pub(super) fn rehearse<M: Machine>(&mut self, machine: &mut Guarded<M>) -> Result<(), Error> {
        let now = self.now();
        let age = self.steering.rehearsed.map(|at| at.elapsed());
        if age.is_some_and(|age| !self.convergence.wants_rehearsal(now, age)) {
            return Ok(());
        }
        // It would be let run afterwards.
        if machine.is_paused()? {
            return Ok(());
        }
        self.paused = false;
        let rehearsal = match machine.rehearse() {
            // It may have stopped the guest for a moment, and nobody knows whether that was over.
            Err(panic @ Error::Panicked { .. }) => {
                self.must_resume = true;
                return Err(panic);
            }
            rehearsal => rehearsal?,
        };
        if let Some(rehearsal) = rehearsal {
            check_state_bytes(rehearsal.state_bytes)?;
            self.convergence.learn_rehearsal(&rehearsal);
        }
        self.steering.rehearsed = Some(Instant::now());
        Ok(())
    }

    /// Slows the guest down as was decided, or lets it have its speed back.
    pub(super) fn throttle<M: Machine>(&mut self, machine: &mut Guarded<M>) -> Result<(), Error> {
        let percent = self.convergence.throttle_percent();
        if percent == 0 && self.steering.throttle_percent == 0 {
            return Ok(());
        }
        // Also when nothing has changed: which vCPU dirties how much has.
        if !machine.throttle(percent)? && percent > 0 {
            self.convergence.forbid_throttling();
            self.emit(&Event::CannotThrottle)?;
            if self.steering.throttle_percent > 0 {
                // It could before: it is let go, as far as that goes.
                machine.throttle(0)?;
            }
            return self.throttled(0);
        }
        self.throttled(percent)
    }

    /// The guest has been slowed down by so much.
    fn throttled(&mut self, percent: u8) -> Result<(), Error> {
        if percent != self.steering.throttle_percent {
            self.steering.throttle_percent = percent;
            self.source.shared.board.write(|written| written.throttle_percent = percent);
            self.statistics.throttle_max_percent =
                self.statistics.throttle_max_percent.max(percent);
            self.emit(&Event::Throttled { percent })?;
        }
        Ok(())
    }

    /// The guest stays, at its own speed.
    pub(super) fn end_throttling<M: Machine>(&mut self, machine: &mut Guarded<M>) {
        self.source.shared.board.write(|written| written.throttle_percent = 0);
        if std::mem::take(&mut self.steering.throttle_percent) > 0
            && let Err(panic) = machine.throttle(0)
        {
            tracing::error!(error = %panic.chain(), "the guest may still be slowed down");
        }
    }

    /// Tells the host whether it will converge, when that is known and when it has changed.
    pub(super) fn tell_outlook(&mut self) -> Result<(), Error> {
        if let Some(outlook) = self.convergence.outlook().copied()
            && self.steering.told_it_meets != Some(outlook.meets_limit)
        {
            self.steering.told_it_meets = Some(outlook.meets_limit);
            self.emit(&Event::Forecast(outlook))?;
        }
        Ok(())
    }

    /// Asks for an answer, to learn what that takes, unless one is due already.
    pub(super) fn ping(&mut self) -> Result<(), Error> {
        if self.steering.unanswered.is_some() {
            return Ok(());
        }
        self.steering.pings = self.steering.pings.wrapping_add(1);
        let now = Instant::now();
        self.steering.unanswered = Some(Ping { sent: now, due: now });
        self.steering.pinged = Some(now);
        self.session.send(&Message::Ping { number: self.steering.pings })
    }

    /// Asks for an answer if the last question was a while ago, however long a round takes.
    pub(super) fn keep_in_touch(&mut self) -> Result<(), Error> {
        let at_least = IN_TOUCH.min(self.source.common.timeouts.stall / 8);
        match self.steering.pinged {
            Some(pinged) if pinged.elapsed() < at_least => Ok(()),
            _ => self.ping(),
        }
    }

    /// Takes an answer. One to another ping than the last is none that was asked for.
    pub(super) fn take_pong(&mut self, number: u32) {
        if number == self.steering.pings
            && let Some(Ping { sent, .. }) = self.steering.unanswered.take()
        {
            self.convergence.learn_round_trip(sent.elapsed());
            // Less than what has a channel count as silent, and more than what is between two answers.
            let long = self.source.common.timeouts.stall / 4;
            if self.steering.answered.is_none_or(|last| last.elapsed() >= long) {
                self.steering.answers_since = Some(Instant::now());
            }
            self.steering.answered = Some(Instant::now());
        }
    }

    /// Fails if the destination has left a ping unanswered for too long: its pages may land, and the switchover
    /// would find nobody.
    pub(super) fn check_answer(&self) -> Result<(), Error> {
        let stall = self.source.common.timeouts.stall;
        let overdue = |ping: Ping| ping.due.elapsed() >= stall;
        // An answer may have come that was not looked at yet.
        if self.steering.unanswered.is_some_and(overdue)
            && !self.is_loading()
            && self.session.waiting() == 0
        {
            return Err(Error::TimedOut { what: PONG, after: stall });
        }
        Ok(())
    }

    /// The destination is asked to load device state.
    pub(super) fn asked_to_load(&mut self, attempt: u32, patience: Patience) {
        self.steering.loading = Some((attempt, patience));
    }

    /// It has, or what it was asked for did not go out.
    pub(super) fn loads_no_more(&mut self, attempt: u32) {
        let loaded = self.steering.loading.take_if(|(asked, _)| *asked == attempt);
        if let (Some(_), Some(ping)) = (loaded, &mut self.steering.unanswered) {
            ping.due = Instant::now();
        }
    }

    /// Whether it is loading still, as far as is known.
    pub(super) fn is_loading(&self) -> bool {
        self.steering.loading.is_some()
    }

    /// Waits until the destination has loaded what it was asked to, though that was called off: it does
    /// nothing else until then. It would not say that a lost channel is closed, and what it is told of
    /// rounds would pile up until the link takes no more.
    pub(super) fn await_load(&mut self) -> Result<(), Error> {
        while let Some((_, patience)) = self.steering.loading {
            match self.session.next(patience)? {
                Item::Report(report) => self.late.push_back(report),
                Item::Message(message) => self.note_message(&message, "waiting for a load")?,
            }
        }
        Ok(())
    }

    /// Lets some time pass, and what comes meanwhile come.
    pub(super) fn rest(&mut self, time: Duration) -> Result<(), Error> {
        let patience = Patience::now("a rest to end", time);
        loop {
            match self.session.next(patience) {
                Ok(Item::Report(report)) => self.late.push_back(report),
                Ok(Item::Message(message)) => self.note_message(&message, "resting")?,
                Err(Error::TimedOut { .. }) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Refuses device state that the protocol has no room for.
pub(super) fn check_state_bytes(bytes: u64) -> Result<(), Error> {
    if bytes <= MAX_DEVICE_STATE_BYTES {
        return Ok(());
    }
    Err(Error::Configuration(format!(
        "device state of {bytes} bytes, at most {MAX_DEVICE_STATE_BYTES} are possible"
    )))
}
