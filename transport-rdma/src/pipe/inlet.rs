//! The end that messages come out of.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::transport::TransportError;

use super::credits::Taking;
use super::{
    ACK_BYTES, ACKS, KEEPALIVE, RECEIVE, RECEIVES, SLOT_BYTES, Transfer, failed, lost, span,
};
use crate::connection::Connection;
use crate::verbs::{Access, Completion, MemoryRegion, ProtectionDomain, Request, Verb};

/// What comes out of an inlet.
#[derive(Debug)]
pub(crate) enum Message {
    Mark,
    Bytes(Vec<u8>),
}

/// The end that messages come out of.
#[derive(Debug)]
pub(crate) struct Inlet {
    pub(crate) connection: Connection,
    slots: MemoryRegion,
    acks: MemoryRegion,
    /// Messages that came and were not given out, as many as there are credits for.
    waiting: VecDeque<Message>,
    /// Why there are no more, for who has taken those.
    failed: Option<TransportError>,
    credits: Taking,
    /// Whether the one that was given out last counts as dealt with by the next call.
    in_hand: bool,
    /// Requests posted, and those of them that are complete: words, and reads.
    posted: u64,
    done: u64,
    /// When the other side was last heard of, or asked.
    heard: Instant,
    found: Vec<Completion>,
}

impl Inlet {
    /// Over a queue pair that is not connected yet.
    pub(crate) fn new(
        connection: Connection,
        pd: &Arc<ProtectionDomain>,
    ) -> Result<Self, TransportError> {
        let register = |cause| TransportError::Io { operation: "register message buffers", cause };
        let slots = MemoryRegion::own(pd, RECEIVES as usize * SLOT_BYTES, Access::LocalWrite);
        let acks = MemoryRegion::own(pd, ACKS as usize * ACK_BYTES, Access::Local);
        let inlet = Self {
            connection,
            slots: slots.map_err(register)?,
            acks: acks.map_err(register)?,
            waiting: VecDeque::new(),
            failed: None,
            credits: Taking::default(),
            in_hand: false,
            posted: 0,
            done: 0,
            heard: Instant::now(),
            found: Vec::new(),
        };
        for slot in 0..RECEIVES as usize {
            inlet.post_receive(slot)?;
        }
        Ok(inlet)
    }

    fn post_receive(&self, slot: usize) -> Result<(), TransportError> {
        let span = span(&self.slots, slot, SLOT_BYTES, SLOT_BYTES);
        self.connection.qp.post_receive(RECEIVE | slot as u64, span).map_err(failed)
    }

    pub(crate) fn system_calls(&self) -> u64 {
        self.connection.system_calls
    }

    /// The next message; `None` if none came until `deadline` (without one: for as long as it
    /// takes). The one before is acknowledged, when due.
    pub(crate) fn next(
        &mut self,
        deadline: Option<Instant>,
    ) -> Result<Option<Message>, TransportError> {
        self.settle()?;
        loop {
            if let Some(message) = self.waiting.pop_front() {
                self.in_hand = true;
                return Ok(Some(message));
            }
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            let now = Instant::now();
            if deadline.is_some_and(|deadline| now >= deadline) {
                self.failed = self.pump(None).err();
                if self.waiting.is_empty() && self.failed.is_none() {
                    return Ok(None);
                }
                continue;
            }
            let keepalive = self.heard + KEEPALIVE;
            let until = deadline.map_or(keepalive, |deadline| deadline.min(keepalive));
            self.failed = self.pump(Some(until)).and_then(|()| self.ask_if_silent()).err();
        }
    }

    /// Asks whether anybody is there, if nothing was heard for a while.
    pub(crate) fn ask_if_silent(&mut self) -> Result<(), TransportError> {
        if self.heard.elapsed() < KEEPALIVE {
            return Ok(());
        }
        self.heard = Instant::now();
        // One that is not complete asks already.
        if self.posted > self.done {
            return Ok(());
        }
        self.credits.ask();
        self.speak()
    }

    /// The message in hand is dealt with.
    pub(crate) fn settle(&mut self) -> Result<(), TransportError> {
        if std::mem::take(&mut self.in_hand) {
            self.credits.take();
        }
        self.speak()
    }

    /// Says how many messages were dealt with, also the one in hand.
    pub(crate) fn acknowledge(&mut self) -> Result<(), TransportError> {
        self.settle()?;
        self.credits.acknowledge();
        self.speak()
    }

    /// Says what is due, as soon as there is room for it.
    fn speak(&mut self) -> Result<(), TransportError> {
        let Some(word) = self.credits.word(self.posted - self.done) else { return Ok(()) };
        let slot = usize::try_from(self.posted % u64::from(ACKS)).unwrap_or(0);
        self.acks.put(slot * ACK_BYTES, &word.to_le_bytes());
        let span = Some(span(&self.acks, slot, ACK_BYTES, ACK_BYTES));
        let request = Request { work: self.posted + 1, verb: Verb::Send, span, signalled: true };
        self.connection.qp.post([request]).map_err(failed)?;
        self.posted += 1;
        Ok(())
    }

    /// Reads the other side's memory, as far as there is room: so many of them. The last one that is posted ends in a
    /// completion.
    pub(crate) fn post_reads(&mut self, reads: &[Transfer]) -> Result<usize, TransportError> {
        self.pump(None)?;
        // Words have room too.
        let room = u64::from(RECEIVES).saturating_sub(self.posted - self.done);
        let count = usize::try_from(room).unwrap_or(0).min(reads.len());
        let (posted, last) = (self.posted, count as u64);
        let requests = (1..).zip(&reads[..count]).map(|(index, read)| Request {
            work: posted + index,
            verb: Verb::Read { address: read.address, key: read.key },
            span: Some(read.span),
            signalled: index == last,
        });
        if count > 0 {
            self.connection.qp.post(requests).map_err(failed)?;
            self.posted += last;
        }
        Ok(count)
    }

    /// Work requests posted so far, and those of them that are complete.
    pub(crate) fn posted(&self) -> u64 {
        self.posted
    }

    pub(crate) fn done(&self) -> u64 {
        self.done
    }

    /// Takes what there is, without waiting.
    pub(crate) fn take_completions(&mut self) -> Result<(), TransportError> {
        self.pump(None)
    }

    /// Says what was dealt with once more.
    pub(crate) fn acknowledge_anew(&mut self) -> Result<(), TransportError> {
        self.credits.ask();
        self.speak()
    }

    /// Waits until the other side's NIC has all acknowledgements, at most for so long.
    pub(crate) fn flush(&mut self, within: Duration) -> Result<(), TransportError> {
        let deadline = Instant::now() + within;
        while self.done < self.posted && Instant::now() < deadline {
            self.pump(Some(deadline))?;
        }
        Ok(())
    }

    fn pump(&mut self, deadline: Option<Instant>) -> Result<(), TransportError> {
        let mut found = std::mem::take(&mut self.found);
        let result = self.connection.completions(&mut found, deadline);
        let noted = found.iter().try_for_each(|completion| self.note(completion));
        found.clear();
        self.found = found;
        result.and(noted)?;
        // There may be room for it by now.
        self.speak()
    }

    fn note(&mut self, completion: &Completion) -> Result<(), TransportError> {
        if completion.is_error() {
            self.connection.check()?;
            return Err(lost("receive", completion));
        }
        self.heard = Instant::now();
        if completion.work & RECEIVE == 0 {
            self.done = completion.work;
            return Ok(());
        }
        self.credits.come()?;
        let slot = usize::try_from(completion.work & !RECEIVE).unwrap_or(0);
        let len_bytes = completion.len_bytes as usize;
        self.waiting.push_back(if completion.with_immediate || len_bytes == 0 {
            Message::Mark
        } else {
            Message::Bytes(self.slots.take(slot * SLOT_BYTES, len_bytes))
        });
        self.post_receive(slot)
    }
}
