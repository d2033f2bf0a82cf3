//! Who is served, for acceptors that serve one migration at a time. Pure: no clock.
//!
//! A source has the place once it has [greeted](super::Admission). Others that have greeted wait: as
//! long as the one that has the place owes an answer, which is a bounded short time, or for a moment
//! where it goes on.

use std::time::{Duration, Instant};

use crate::transport::LinkId;

/// How long a source that was answered may take for its next word while another one waits, beyond the
/// round trip.
const ANSWER: Duration = Duration::from_millis(500);

/// The same with the round trip, at most: whoever takes long for its greeting only seems to be far away.
const ANSWER_AT_MOST: Duration = Duration::from_secs(2);

/// How long a source waits for one that keeps its place, before it is told to come later. One that has
/// just come to its end is gone sooner than that.
const TURN: Duration = Duration::from_secs(1);

/// How long a source waits in all, counted from when it was let in: shorter than sources wait for an answer
/// to their greeting ([`Timeouts::handshake`](crate::Timeouts::handshake)). That clock begins half a round
/// trip after it was let in, and what it is told takes as long to get there.
const WAIT_AT_MOST: Duration = Duration::from_secs(8);

/// Whether the one that is served keeps its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It does: others are told to come later.
    Kept,
    /// That will show soon: others wait.
    Open,
    /// No: whoever waits is served.
    Forfeited,
}

/// Who has the place that another one wants, and how.
#[derive(Debug, Clone, Copy)]
pub struct Holder {
    /// Its migration.
    pub id: LinkId,
    /// Whether it keeps the place.
    pub place: Place,
}

/// What is known of the source that has the place.
///
/// One that has greeted may still be anybody, until it has answered the *welcome*, which a source does at
/// once. From then on either side may be busy for long (with registration), and it keeps its place
/// whatever it says.
#[derive(Debug, Clone, Copy)]
pub struct Standing {
    answers_within: Duration,
    told: Option<Instant>,
    firm: bool,
}

impl Standing {
    /// Of a source that has greeted, and took so long for that once it was let in: a round trip at
    /// least.
    pub fn greeted(round_trip: Duration) -> Self {
        let answers_within = ANSWER.saturating_add(round_trip).min(ANSWER_AT_MOST);
        Self { answers_within, told: None, firm: false }
    }

    /// Of a source that needs no greeting.
    pub fn firm() -> Self {
        Self { firm: true, ..Self::greeted(Duration::ZERO) }
    }

    /// It has said something: the answer, if it owes one.
    pub fn hear(&mut self) {
        self.firm |= self.told.is_some();
    }

    /// It was told something, and owes an answer.
    pub fn tell(&mut self, now: Instant) {
        self.told.get_or_insert(now);
    }

    /// The greetings are over: guest memory is registered for it.
    pub fn settle(&mut self) {
        self.firm = true;
    }

    /// Whether it keeps its place.
    pub fn place(&self, now: Instant) -> Place {
        match self.told {
            _ if self.firm => Place::Kept,
            Some(told) if now.saturating_duration_since(told) >= self.answers_within => {
                Place::Forfeited
            }
            _ => Place::Open,
        }
    }
}

/// The wait of a source that has greeted, for the place that another one has.
#[derive(Debug, Clone, Copy)]
pub struct Turn {
    behind: Option<LinkId>,
    /// Of the one that has the place, if that keeps it.
    until: Instant,
    /// Whoever has it.
    at_most: Instant,
}

impl Turn {
    /// Begins now, for a source that took so long for its greeting once it was let in.
    pub fn new(now: Instant, round_trip: Duration) -> Self {
        // Whose greeting took longer than any way there and back still has a moment.
        let left = WAIT_AT_MOST.saturating_sub(round_trip).max(TURN);
        Self { behind: None, until: now, at_most: now + left }
    }

    /// Whether it is told to come later, given who has the place.
    pub fn is_over(&mut self, now: Instant, holder: Holder) -> bool {
        let Holder { id, place } = holder;
        if self.behind.replace(id) != Some(id) || place != Place::Kept {
            self.until = now + TURN;
        }
        now >= self.until || now >= self.at_most
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::Timeouts;

    #[test]
    fn whoever_greets_has_a_place_and_owes_an_answer() {
        let now = Instant::now();
        let mut source = Standing::greeted(Duration::ZERO);
        // Said before it was told anything: no answer to that.
        source.hear();
        let late = now + 100 * ANSWER;
        assert_eq!(source.place(late), Place::Open, "it waits for an answer");
        source.tell(late);
        assert_eq!(source.place(late + ANSWER / 2), Place::Open);
        // Another word is no reason to wait for longer.
        source.tell(late + ANSWER / 2);
        assert_eq!(source.place(late + ANSWER), Place::Forfeited);
        source.hear();
        source.tell(late + ANSWER);
        assert_eq!(source.place(late + 100 * ANSWER), Place::Kept);
    }

    #[test]
    fn a_source_whose_memory_is_registered_keeps_its_place() {
        let now = Instant::now();
        let mut source = Standing::greeted(Duration::ZERO);
        source.tell(now);
        source.settle();
        assert_eq!(source.place(now + 100 * ANSWER), Place::Kept);
        assert_eq!(Standing::firm().place(now), Place::Kept);
    }

    #[test]
    fn who_is_far_away_has_longer_but_not_for_ever() {
        let now = Instant::now();
        for (round_trip, due) in [
            (Duration::from_millis(1400), Duration::from_millis(1900)),
            (Duration::from_secs(60), ANSWER_AT_MOST),
            (Duration::MAX, ANSWER_AT_MOST),
        ] {
            let mut source = Standing::greeted(round_trip);
            source.tell(now);
            assert_eq!(source.place(now + due / 2), Place::Open);
            assert_eq!(source.place(now + due), Place::Forfeited);
        }
    }

    #[test]
    fn a_turn_lasts_as_long_as_one_keeps_the_place_and_not_for_ever() {
        let (first, second) = (LinkId([1; 16]), LinkId([2; 16]));
        let now = Instant::now();
        let mut turn = Turn::new(now, Duration::ZERO);
        let by = |id, place| Holder { id, place };
        assert!(!turn.is_over(now, by(first, Place::Kept)));
        assert!(!turn.is_over(now + TURN / 2, by(first, Place::Kept)));
        assert!(Turn { ..turn }.is_over(now + TURN, by(first, Place::Kept)));
        // Another one has it since, and may answer, or not.
        for (at, holder, place) in
            [(1, second, Place::Kept), (2, second, Place::Open), (3, second, Place::Open)]
        {
            assert!(!turn.is_over(now + at * TURN, by(holder, place)));
        }
        assert!(!turn.is_over(now + 3 * TURN + TURN / 2, by(second, Place::Kept)));
        assert!(turn.is_over(now + 4 * TURN, by(second, Place::Kept)));
        assert!(turn.is_over(now + WAIT_AT_MOST, by(second, Place::Open)));
    }

    /// By its own clock, which begins when it hears that it is let in.
    #[test]
    fn who_is_far_away_hears_in_time_that_it_is_to_come_later() {
        let waits = Timeouts::default().handshake;
        let holder = Holder { id: LinkId([1; 16]), place: Place::Open };
        let let_in = Instant::now();
        for way in (0..=8).map(|step| step * Duration::from_millis(500)) {
            let (greeted, began) = (let_in + 2 * way, let_in + way);
            let mut turn = Turn::new(greeted, 2 * way);
            let mut ticks = (0..).map(|tick| greeted + tick * Duration::from_millis(100));
            let told = ticks.find(|now| turn.is_over(*now, holder)).expect("once");
            assert!(told >= greeted + TURN, "{way:?} each way: no turn at all");
            assert!(told + way < began + waits, "{way:?} each way");
        }
        // Of a greeting that came in many pieces.
        let mut turn = Turn::new(let_in, Duration::MAX);
        assert!(!turn.is_over(let_in + TURN / 2, holder));
        assert!(turn.is_over(let_in + TURN, holder));
    }
}
