//! How what was lent to the channels comes home: what the source's driver waits for, and what it does then.
//!
//! A round is *lent* to the senders, a share each (see [`ledger`](crate::pages::ledger)). It ends when every
//! share is back. If a channel is lost meanwhile, or one lags behind, stripes are to *change hands*, and that
//! takes longer: all that anybody has sent must have landed, or be known never to land, before another
//! channel sends the same pages. Between rounds the driver may also wait for landings alone.
//!
//! ```text
//!   round ──▶ Sending ────────────────────────────────▶ Home
//!               │ a channel is lost,
//!               ▼ or shares are asked back
//!            Gathering ─── Settle ──▶ Settling ───────▶ Lend   (a round of what is left)
//!
//!   landings ▶ Landing ───────────────────────────────▶ Home
//!               │ a channel is lost
//!               ▼
//!            Regrouping ──────────────────────────────▶ Deal   (the next round has what is left)
//! ```
//!
//! To the right it goes when all is in, which is the [next step](Next) for the driver:
//!
//! | stage | a channel is lost | shares are asked back | all is in |
//! |---|---|---|---|
//! | Sending | Gathering | Gathering | Home |
//! | Gathering | Gathering | | Settle, Settling |
//! | Settling | Settling | | Lend |
//! | Landing | Regrouping | | Home |
//! | Regrouping | Regrouping | | Deal |
//!
//! All is in when each channel has reported, or is gone:
//!
//! ```text
//!   Due ── reports ──▶ In ── lost ──▶ Closing ── the destination says: closed ──▶ Gone
//!    └──────────────── lost ─────────────▲
//! ```
//!
//! In `Sending` and `Gathering` a report is that the share is dropped, in the others that all has landed. A
//! channel may have reported that it is done and be lost with what it still had under way.

/// How far all of them are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Stage {
    /// Senders work on their shares.
    Sending,
    /// They do, and stripes are to change hands once all shares are back.
    Gathering,
    /// The shares are back, and what was sent has to land before stripes change hands.
    Settling,
    /// No share is out, and what was sent has to land.
    Landing,
    /// As before, and stripes are to change hands.
    Regrouping,
}

/// How far one channel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Lane {
    /// Its report is awaited.
    Due,
    /// It has reported.
    In,
    /// It is lost here, and may still land there.
    Closing,
    /// Nothing of it lands any more.
    Gone,
}

/// What a sender reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Report {
    /// It has dropped its share.
    Done,
    /// All that it sent has landed.
    Settled,
}

/// What the driver does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Next {
    /// Wait for more.
    Wait,
    /// Have all senders report when everything has landed, and wait on.
    Settle,
    /// Take the ledger back, deal the stripes out anew, and lend what is left, if anything is.
    Lend,
    /// Take the ledger back and deal the stripes out anew.
    Deal,
    /// Take the ledger back.
    Home,
}

/// A wait for all channels.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Gathering {
    stage: Stage,
    lanes: Vec<Lane>,
}

impl Gathering {
    /// Of a round that is lent to those channels which live.
    pub(crate) fn of_round(live: impl IntoIterator<Item = bool>) -> Self {
        Self::new(Stage::Sending, live)
    }

    /// Of all that those channels have sent, between rounds.
    pub(crate) fn of_landings(live: impl IntoIterator<Item = bool>) -> Self {
        Self::new(Stage::Landing, live)
    }

    fn new(stage: Stage, live: impl IntoIterator<Item = bool>) -> Self {
        let lane = |live| if live { Lane::Due } else { Lane::Gone };
        Self { stage, lanes: live.into_iter().map(lane).collect() }
    }

    /// Takes a report. One that is not awaited says nothing new. Whether it was.
    pub(crate) fn reported(&mut self, channel: u16, report: Report) -> bool {
        let awaited = match self.stage {
            Stage::Sending | Stage::Gathering => Report::Done,
            Stage::Settling | Stage::Landing | Stage::Regrouping => Report::Settled,
        };
        let lane = &mut self.lanes[usize::from(channel)];
        let counts = report == awaited && *lane == Lane::Due;
        if counts {
            *lane = Lane::In;
        }
        counts
    }

    /// A channel is lost here.
    pub(crate) fn lost(&mut self, channel: u16) {
        self.lanes[usize::from(channel)] = Lane::Closing;
        self.stage = match self.stage {
            Stage::Sending | Stage::Gathering => Stage::Gathering,
            Stage::Settling => Stage::Settling,
            Stage::Landing | Stage::Regrouping => Stage::Regrouping,
        };
    }

    /// Takes what is known of the channels that the destination has closed.
    pub(crate) fn closed(&mut self, is_closed: impl Fn(u16) -> bool) {
        for (channel, lane) in (0..).zip(&mut self.lanes) {
            if *lane == Lane::Closing && is_closed(channel) {
                *lane = Lane::Gone;
            }
        }
    }

    /// Whether asking shares back is of any use.
    pub(crate) fn may_ask_back(&self) -> bool {
        self.stage == Stage::Sending && self.any(Lane::Due)
    }

    /// Shares were asked back.
    pub(crate) fn asked_back(&mut self) {
        debug_assert!(self.may_ask_back(), "{self:?}");
        self.stage = Stage::Gathering;
    }

    /// Whether a report of that channel is awaited.
    pub(crate) fn is_due(&self, channel: u16) -> bool {
        self.lanes.get(usize::from(channel)) == Some(&Lane::Due)
    }

    /// Whether the destination has yet to say that a lost channel is closed there.
    pub(crate) fn is_closing(&self) -> bool {
        self.any(Lane::Closing)
    }

    /// Whether that is all that is missing.
    pub(crate) fn is_only_closing(&self) -> bool {
        self.is_closing() && !self.any(Lane::Due)
    }

    /// What to do. Said once: what was `Settle` is a wait from then on.
    pub(crate) fn next(&mut self) -> Next {
        if self.any(Lane::Due) || self.is_closing() {
            return Next::Wait;
        }
        match self.stage {
            Stage::Sending | Stage::Landing => Next::Home,
            Stage::Settling => Next::Lend,
            Stage::Regrouping => Next::Deal,
            Stage::Gathering => {
                self.stage = Stage::Settling;
                for lane in self.lanes.iter_mut().filter(|lane| **lane == Lane::In) {
                    *lane = Lane::Due;
                }
                Next::Settle
            }
        }
    }

    fn any(&self, wanted: Lane) -> bool {
        self.lanes.contains(&wanted)
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
