//! Whether a source that was let in keeps its place before those that wait for it, for acceptors that
//! serve one migration at a time. Pure: no clock.

use std::time::{Duration, Instant};

/// How long a source that has greeted may take for its next word while another one waits.
const PATIENCE: Duration = Duration::from_millis(500);

/// What is known of a source that was let in.
///
/// One that has said nothing is anybody, and so is one that has greeted, was answered, and says
/// nothing more: whoever speaks takes its place. A source answers the *welcome* at once; from then on
/// either side may be busy for long (with registration), and it keeps its place whatever it says.
#[derive(Debug, Default, Clone, Copy)]
pub struct Standing {
    heard: bool,
    settled: bool,
    owes_since: Option<Instant>,
}

impl Standing {
    /// It has said something.
    pub fn hear(&mut self) {
        self.heard = true;
        self.owes_since = None;
    }

    /// It was told something, and owes an answer if it does not already.
    pub fn tell(&mut self, now: Instant) {
        self.owes_since.get_or_insert(now);
    }

    /// The greetings are over: guest memory is registered for it.
    pub fn settle(&mut self) {
        self.settled = true;
    }

    /// Whether others are told to come later.
    pub fn keeps_place(&self, now: Instant) -> bool {
        let owes = self.owes_since.map_or(Duration::ZERO, |since| now.duration_since(since));
        self.heard && (self.settled || owes < PATIENCE)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn whoever_greets_has_a_place_and_owes_an_answer() {
        let now = Instant::now();
        let mut source = Standing::default();
        assert!(!source.keeps_place(now), "it has said nothing");
        source.hear();
        let late = now + 100 * PATIENCE;
        assert!(source.keeps_place(late), "it waits for an answer");
        source.tell(late);
        assert!(source.keeps_place(late + PATIENCE / 2));
        // Another word is no reason to wait for longer.
        source.tell(late + PATIENCE / 2);
        assert!(!source.keeps_place(late + PATIENCE));
        source.hear();
        assert!(source.keeps_place(late + 100 * PATIENCE));
    }

    #[test]
    fn a_source_whose_memory_is_registered_keeps_its_place() {
        let now = Instant::now();
        let mut source = Standing::default();
        source.hear();
        source.tell(now);
        source.settle();
        assert!(source.keeps_place(now + 100 * PATIENCE));
    }
}
