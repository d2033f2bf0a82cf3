//! Who may say how much on a pipe: its arithmetic, without a device.

use pageferry::transport::TransportError;

use super::{ACKS, QUESTIONS, RECEIVES};

/// Set in a word that asks for an answer.
const QUESTION: u64 = 1 << 63;

/// The outlet's side: what it may send.
#[derive(Debug, Default)]
pub(super) struct Giving {
    /// Messages sent, and taken there.
    sent: u64,
    taken: u64,
    /// The other side asks whether anybody is here, and nothing was sent since.
    asked: bool,
}

impl Giving {
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Messages sent so far, so the number of the last one.
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    pub(super) fn has_credit(&self) -> bool {
        self.sent - self.taken < u64::from(RECEIVES)
    }

    /// Whether a mark is due, to say that somebody is here.
    pub(super) fn owes_answer(&self) -> bool {
        self.asked && self.has_credit()
    }

    /// Counts a message that goes out.
    pub(super) fn send(&mut self) -> u64 {
        self.sent += 1;
        self.asked = false;
        self.sent
    }

    /// Takes a word of the inlet's in.
    pub(super) fn hear(&mut self, word: u64) -> Result<(), TransportError> {
        let taken = word & !QUESTION;
        if taken < self.taken || taken > self.sent {
            return Err(TransportError::Violation("an acknowledgement of what was never sent"));
        }
        self.taken = taken;
        self.asked |= word & QUESTION != 0;
        Ok(())
    }
}

/// The inlet's side: what it has to say, and whether the other side keeps to what it was told.
#[derive(Debug, Default)]
pub(super) struct Taking {
    /// Messages that came, those dealt with, and how many of them the other side was told of.
    came: u64,
    taken: u64,
    told: u64,
    /// A word is due; and it is a question.
    due: bool,
    asking: bool,
    /// Questions since the last message.
    questions: u32,
}

impl Taking {
    /// A message came. One that nobody had room for is the other side's fault: it does not wait for
    /// credits, and what waits here would have no bound.
    pub(super) fn come(&mut self) -> Result<(), TransportError> {
        self.came += 1;
        self.questions = 0;
        if self.came - self.told > u64::from(RECEIVES) {
            return Err(TransportError::Violation("more messages than there was room for"));
        }
        Ok(())
    }

    /// A message was dealt with.
    pub(super) fn take(&mut self) {
        self.taken += 1;
        self.due |= self.taken - self.told >= u64::from(RECEIVES / 2);
    }

    /// All that was dealt with is to be told of now.
    pub(super) fn acknowledge(&mut self) {
        self.due |= self.told < self.taken;
    }

    /// Nothing was heard for a while. Not asked more often than the other side has room for words
    /// that nobody there reads: who does not answer is stopped, or has nothing to do.
    pub(super) fn ask(&mut self) {
        if self.questions < QUESTIONS {
            self.questions += 1;
            self.asking = true;
        }
    }

    /// The word that is due, if there is room for it, with so many under way. Each is as good as all
    /// before it, so one that has to wait is not missed.
    pub(super) fn word(&mut self, under_way: u64) -> Option<u64> {
        if !(self.due || self.asking) || under_way >= u64::from(ACKS) {
            return None;
        }
        self.due = false;
        self.told = self.taken;
        let question = if std::mem::take(&mut self.asking) { QUESTION } else { 0 };
        Some(self.taken | question)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use pageferry::testing::Random;

    use super::*;

    /// Both sides, and what is on its way between them.
    #[derive(Default)]
    struct Pipe {
        giving: Giving,
        taking: Taking,
        messages: u64,
        /// Messages that came and were not dealt with.
        waiting: u64,
        /// Words on their way, and words that have arrived and that nobody has read.
        flying: VecDeque<u64>,
        unread: VecDeque<u64>,
    }

    impl Pipe {
        fn read_words(&mut self) {
            while let Some(word) = self.unread.pop_front() {
                self.giving.hear(word).unwrap();
            }
        }

        fn send(&mut self) -> bool {
            self.read_words();
            let may = self.giving.has_credit();
            if may {
                self.giving.send();
                self.messages += 1;
            }
            may
        }

        fn arrive(&mut self) {
            if self.messages > 0 {
                self.messages -= 1;
                self.taking.come().unwrap();
                self.waiting += 1;
            }
        }

        fn deal(&mut self, at_once: bool) {
            if self.waiting > 0 {
                self.waiting -= 1;
                self.taking.take();
                if at_once {
                    self.taking.acknowledge();
                }
            }
        }

        fn speak(&mut self) {
            self.flying.extend(self.taking.word(self.flying.len() as u64));
        }
    }

    /// However the two are scheduled: no honest message is one too many, no word meets a receiver
    /// without room, and all gets through.
    #[test]
    fn honest_sides_never_exceed_what_they_have() {
        for seed in 0..2_000 {
            let mut random = Random::new(seed);
            let mut pipe = Pipe::default();
            for _ in 0..2_000 {
                match random.below(8) {
                    0 | 1 => drop(pipe.send()),
                    2 | 3 => pipe.arrive(),
                    4 => {
                        pipe.deal(random.below(2) == 0);
                    }
                    5 => pipe.unread.extend(pipe.flying.pop_front()),
                    6 => pipe.read_words(),
                    // A silence, after which nothing is on its way any more.
                    _ if pipe.messages == 0 && pipe.flying.is_empty() => pipe.taking.ask(),
                    _ => {}
                }
                pipe.speak();
                assert!(pipe.unread.len() <= ACKS as usize, "seed {seed}");
                assert!(pipe.waiting <= u64::from(RECEIVES), "seed {seed}");
            }
            while pipe.waiting + pipe.messages > 0 {
                pipe.arrive();
                pipe.deal(false);
            }
            pipe.speak();
            pipe.unread.extend(pipe.flying.drain(..));
            assert!(pipe.send(), "seed {seed}: stuck");
        }
    }

    /// Who takes no word in, and sends as if he had.
    #[test]
    fn a_peer_without_room_for_words_is_found_out_and_costs_no_more_than_its_credits() {
        let mut taking = Taking::default();
        let mut under_way = 0;
        let mut told = 0;
        let came = (1..10_000).find(|_| {
            let come = taking.come();
            // As for a mark: all at once, and none of it is ever complete.
            taking.take();
            taking.acknowledge();
            if let Some(word) = taking.word(under_way) {
                under_way += 1;
                told = word;
            }
            come.is_err()
        });
        assert!(under_way <= u64::from(ACKS), "{under_way} words under way");
        assert_eq!(came, Some(told + u64::from(RECEIVES) + 1));
    }

    #[test]
    fn a_word_that_had_no_room_is_said_once_there_is() {
        let mut taking = Taking::default();
        for _ in 0..3 {
            taking.come().unwrap();
            taking.take();
            taking.acknowledge();
        }
        assert_eq!(taking.word(u64::from(ACKS)), None);
        assert_eq!(taking.word(u64::from(ACKS) - 1), Some(3));
        assert_eq!(taking.word(0), None);
    }

    #[test]
    fn a_message_that_was_given_no_credit_is_refused() {
        let mut taking = Taking::default();
        for _ in 0..RECEIVES {
            taking.come().unwrap();
        }
        assert!(matches!(taking.come(), Err(TransportError::Violation(_))));
    }

    #[test]
    fn questions_end_where_nobody_answers_and_begin_anew_with_an_answer() {
        let mut taking = Taking::default();
        for _ in 0..2 {
            let ask = |_: &i32| {
                taking.ask();
                taking.word(0).is_some()
            };
            assert_eq!((0..100).filter(ask).count(), QUESTIONS as usize);
            taking.come().unwrap();
        }
    }

    #[test]
    fn a_question_is_answered_once() {
        let (mut giving, mut taking) = (Giving::default(), Taking::default());
        taking.ask();
        giving.hear(taking.word(0).unwrap()).unwrap();
        assert!(giving.owes_answer());
        giving.send();
        assert!(!giving.owes_answer());
        taking.come().unwrap();
        assert_eq!(taking.word(0), None, "an answer is not answered");
    }

    #[test]
    fn words_that_count_back_or_ahead_are_refused() {
        let mut giving = Giving::default();
        giving.send();
        giving.hear(1).unwrap();
        for word in [0, 2, QUESTION, QUESTION | 2, u64::MAX] {
            assert!(matches!(giving.hear(word), Err(TransportError::Violation(_))), "{word:#x}");
        }
    }
}
