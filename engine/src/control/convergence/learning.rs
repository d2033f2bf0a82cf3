//! What is learned on the way.

use std::num::NonZeroU64;
use std::time::Duration;

use super::Convergence;
use super::estimate::from_seconds;
use crate::machine::Rehearsal;
use crate::pages::memory::PAGE_BYTES;

/// How old what is known of device state may become.
const REHEARSE_AGAIN: Duration = Duration::from_secs(30);
const REHEARSE_SOON: Duration = Duration::from_millis(200);

impl Convergence {
    /// A round begins with `pages` to send.
    pub fn round_began(&mut self, now: Duration, landed: &[u64], pages: u64) {
        let round_trip = self.terms.round_trip.estimate().expected;
        self.link.round_began(now, landed, pages.saturating_mul(PAGE_BYTES), round_trip);
    }

    /// Page bytes that have landed on each channel since the migration began.
    pub fn landed(&mut self, now: Duration, landed: &[u64]) {
        self.link.sample(now, landed);
    }

    /// Nothing was sent for a while: that says nothing about the link. With what has landed on each channel.
    pub(crate) fn stood_still(&mut self, now: Duration, landed: &[u64]) {
        self.link.skip(now, landed);
    }

    /// Page bytes a second that the host allows just now; `None` if as many as the link carries. It
    /// allows all of them while the guest stands still.
    pub fn set_bandwidth_limit(&mut self, limit: Option<NonZeroU64>) {
        self.link.set_limit(limit);
    }

    /// A message and its answer took so long.
    pub fn learn_round_trip(&mut self, took: Duration) {
        self.terms.round_trip.learn(took);
    }

    /// A harvest took so long.
    pub fn learn_harvest(&mut self, took: Duration) {
        self.terms.harvest.learn(took);
    }

    /// Device state was saved for the sake of what it takes.
    pub fn learn_rehearsal(&mut self, rehearsal: &Rehearsal) {
        self.terms.learn(rehearsal);
    }

    /// Whether what is known of device state should be learned anew, after so long: soon as long as
    /// little is known, and where what is not pages alone takes too long.
    pub fn wants_rehearsal(&self, now: Duration, age: Duration) -> bool {
        let soon = !self.terms.save.is_settled() || !self.pages_take_long(now);
        age >= if soon { REHEARSE_SOON } else { REHEARSE_AGAIN }
    }

    /// Stopping the guest took so long.
    pub fn learn_pause(&mut self, took: Duration) {
        self.terms.pause.learn(took);
    }

    /// Saving so many bytes of device state took so long.
    pub fn learn_save(&mut self, state_bytes: u64, took: Duration) {
        self.terms.learn(&Rehearsal { state_bytes, save: took, ..Rehearsal::default() });
    }

    /// Loading device state took so long.
    pub fn learn_load(&mut self, took: Duration) {
        self.terms.load.learn(took);
    }

    /// Device state has been with the destination for so long, and is not loaded: nobody waits for it
    /// any more, but if that is the last of it, it is why.
    pub fn load_goes_on(&mut self, so_far: Duration) {
        self.terms.load.goes_on(so_far);
    }

    /// Releasing host resources took so long.
    pub fn learn_release(&mut self, took: Duration) {
        self.terms.release.learn(took);
    }

    /// Device state went to the destination and its answer came back, in that time without the
    /// load: what that tells of the round trip.
    pub fn learn_state_exchange(&mut self, took: Duration) {
        let way = self
            .switchover_bandwidth(Duration::MAX)
            .map_or(Duration::ZERO, |(rate, _)| from_seconds(self.terms.state_bytes as f64 / rate));
        self.terms.round_trip.learn(took.saturating_sub(way));
    }
}
