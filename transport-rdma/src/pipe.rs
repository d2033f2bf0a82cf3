//! Messages one way over a queue pair, with credits the other way.
//!
//! The inlet posts [`RECEIVES`] receives of [`SLOT_BYTES`] each, and the outlet sends no more
//! messages than that before the inlet said that it took some. So a message never meets a receiver
//! that is not ready. The inlet's words are eight bytes: how many messages it has taken so far,
//! little-endian. They come when half of the room is used up, at once after a mark, and after
//! [`KEEPALIVE`] without anything to say, which finds out whether the other side still answers.
//!
//! A **mark** is a message without bytes: a write with immediate data that writes nothing, or an
//! empty send where the provider has no such writes (siw). It arrives after all that was written
//! before it on the queue pair is in memory, so a mark that was taken says that all of that landed.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::transport::TransportError;

use crate::connection::Connection;
use crate::verbs::{Access, Completion, MemoryRegion, ProtectionDomain, Request, Span, Verb};

/// Messages under way at most.
pub(crate) const RECEIVES: u32 = 32;

/// Most bytes of a message.
pub(crate) const SLOT_BYTES: usize = 8192;

/// Acknowledgements that may be under way: one for each message that asks for it, and those at
/// half of the room.
pub(crate) const ACKS: u32 = RECEIVES + 4;

const ACK_BYTES: usize = 8;

/// How long an inlet hears nothing before it asks whether anybody is there.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// Tells receives from sends among completions.
const RECEIVE: u64 = 1 << 63;

/// A wait that only ends when something happens, taken in turns: what ends it wakes it up.
const TURN: Duration = Duration::from_secs(3600);

/// Bytes here, and where they go or come from on the other side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Transfer {
    pub(crate) span: Span,
    pub(crate) address: u64,
    pub(crate) key: u32,
}

/// Why a queue pair failed.
fn lost(operation: &'static str, completion: &Completion) -> TransportError {
    let kind = if completion.is_unanswered() {
        io::ErrorKind::TimedOut
    } else {
        io::ErrorKind::ConnectionReset
    };
    TransportError::Lost { operation, cause: io::Error::new(kind, completion.reason()) }
}

/// The work requests of writes, after so many others.
pub(crate) fn write_requests(
    writes: &[Transfer],
    posted: u64,
    signal_every: u64,
) -> impl Iterator<Item = Request> + '_ {
    let count = writes.len() as u64;
    (1..).zip(writes).map(move |(index, write)| {
        let work = posted + index;
        Request {
            work,
            verb: Verb::Write { address: write.address, key: write.key },
            span: Some(write.span),
            // The last in a full queue, so that its end is heard of.
            signalled: index.is_multiple_of(signal_every) || index == count,
        }
    })
}

fn slot_bytes(slot: usize, len_bytes: usize) -> usize {
    slot * len_bytes
}

fn failed(cause: io::Error) -> TransportError {
    TransportError::Io { operation: "post a work request", cause }
}

fn span(region: &MemoryRegion, slot: usize, slot_len: usize, len_bytes: usize) -> Span {
    Span {
        address: region.address() + slot_bytes(slot, slot_len) as u64,
        len_bytes: u32::try_from(len_bytes).unwrap_or(0),
        key: region.local_key(),
    }
}

/// The end that messages, and writes, go into.
#[derive(Debug)]
pub(crate) struct Outlet {
    pub(crate) connection: Connection,
    slots: MemoryRegion,
    acks: MemoryRegion,
    /// Whether marks are writes with immediate data.
    immediate: bool,
    signal_every: u64,
    depth: u64,
    /// Requests given to the send queue, and those of them that are complete.
    posted: u64,
    done: u64,
    /// Messages sent, and taken there.
    sent: u64,
    taken: u64,
    /// For each message slot the request that used it last.
    used_by: Vec<u64>,
    found: Vec<Completion>,
}

impl Outlet {
    /// Over a queue pair that is not connected yet.
    pub(crate) fn new(
        connection: Connection,
        pd: &Arc<ProtectionDomain>,
        depth: u32,
        signal_every: u32,
        immediate: bool,
    ) -> Result<Self, TransportError> {
        let register = |cause| TransportError::Io { operation: "register message buffers", cause };
        let slots = MemoryRegion::own(pd, RECEIVES as usize * SLOT_BYTES, Access::Local);
        let acks = MemoryRegion::own(pd, ACKS as usize * ACK_BYTES, Access::LocalWrite);
        let outlet = Self {
            connection,
            slots: slots.map_err(register)?,
            acks: acks.map_err(register)?,
            immediate,
            signal_every: u64::from(signal_every.clamp(1, depth / 2)),
            depth: u64::from(depth),
            posted: 0,
            done: 0,
            sent: 0,
            taken: 0,
            used_by: vec![0; RECEIVES as usize],
            found: Vec::new(),
        };
        for slot in 0..ACKS as usize {
            outlet.post_ack(slot)?;
        }
        Ok(outlet)
    }

    fn post_ack(&self, slot: usize) -> Result<(), TransportError> {
        let span = span(&self.acks, slot, ACK_BYTES, ACK_BYTES);
        self.connection.qp.post_receive(RECEIVE | slot as u64, span).map_err(failed)
    }

    pub(crate) fn check(&self) -> Result<(), TransportError> {
        self.connection.check()
    }

    /// Requests posted so far.
    pub(crate) fn posted(&self) -> u64 {
        self.posted
    }

    /// Requests complete: their memory is not read any more.
    pub(crate) fn done(&self) -> u64 {
        self.done
    }

    /// Messages taken there.
    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    pub(crate) fn system_calls(&self) -> u64 {
        self.connection.system_calls
    }

    /// Takes completions; waits for one until `deadline` if there is one.
    pub(crate) fn pump(&mut self, deadline: Option<Instant>) -> Result<(), TransportError> {
        let mut found = std::mem::take(&mut self.found);
        let result = self.connection.completions(&mut found, deadline);
        let noted = found.iter().try_for_each(|completion| self.note(completion));
        found.clear();
        self.found = found;
        result.and(noted)
    }

    fn note(&mut self, completion: &Completion) -> Result<(), TransportError> {
        if completion.is_error() {
            self.connection.check()?;
            return Err(lost("send", completion));
        }
        if completion.work & RECEIVE == 0 {
            self.done = completion.work;
            return Ok(());
        }
        let slot = usize::try_from(completion.work & !RECEIVE).unwrap_or(0);
        let bytes = self.acks.take(slot * ACK_BYTES, ACK_BYTES);
        let taken = bytes.try_into().map_or(u64::MAX, u64::from_le_bytes);
        if completion.len_bytes as usize != ACK_BYTES || taken < self.taken || taken > self.sent {
            return Err(TransportError::Violation("an acknowledgement of what was never sent"));
        }
        self.taken = taken;
        self.post_ack(slot)
    }

    /// Waits until a condition holds; false if the deadline comes first.
    fn pump_until(
        &mut self,
        deadline: Option<Instant>,
        holds: impl Fn(&Self) -> bool,
    ) -> Result<bool, TransportError> {
        while !holds(self) {
            let now = Instant::now();
            if deadline.is_some_and(|deadline| now >= deadline) {
                return Ok(false);
            }
            let turn = now + TURN;
            self.pump(Some(deadline.map_or(turn, |deadline| deadline.min(turn))))?;
        }
        Ok(true)
    }

    /// Writes spans to the other side's memory, in order. Waits for room in the send queue.
    pub(crate) fn write(&mut self, writes: &[Transfer]) -> Result<(), TransportError> {
        let mut rest = writes;
        while !rest.is_empty() {
            self.pump_until(None, |outlet| outlet.posted - outlet.done < outlet.depth)?;
            let room = usize::try_from(self.depth - (self.posted - self.done)).unwrap_or(1);
            let (now, later) = rest.split_at(room.min(rest.len()));
            self.connection
                .qp
                .post(write_requests(now, self.posted, self.signal_every))
                .map_err(failed)?;
            self.posted += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    /// Posts one signalled request.
    fn post(&mut self, verb: Verb, span: Option<Span>) -> Result<u64, TransportError> {
        self.pump_until(None, |outlet| outlet.posted - outlet.done < outlet.depth)?;
        let work = self.posted + 1;
        let request = Request { work, verb, span, signalled: true };
        self.connection.qp.post([request]).map_err(failed)?;
        self.posted = work;
        Ok(work)
    }

    /// Sends a message of 1 to [`SLOT_BYTES`] bytes; returns its number. Waits for a credit.
    pub(crate) fn message(&mut self, bytes: &[u8]) -> Result<u64, TransportError> {
        self.message_until(bytes, None).map(|_| self.sent)
    }

    /// As [`Self::message`]; false if the deadline comes before a credit. Once that is there, it is
    /// the NICs that are waited for, and they give up by themselves.
    pub(crate) fn message_until(
        &mut self,
        bytes: &[u8],
        deadline: Option<Instant>,
    ) -> Result<bool, TransportError> {
        let has_credit = |outlet: &Self| outlet.sent - outlet.taken < u64::from(RECEIVES);
        if !self.pump_until(deadline, has_credit)? {
            return Ok(false);
        }
        let slot = usize::try_from(self.sent % u64::from(RECEIVES)).unwrap_or(0);
        let user = self.used_by[slot];
        self.pump_until(None, |outlet| outlet.done >= user)?;
        self.slots.put(slot * SLOT_BYTES, bytes);
        let span = span(&self.slots, slot, SLOT_BYTES, bytes.len());
        self.used_by[slot] = self.post(Verb::Send, Some(span))?;
        self.sent += 1;
        Ok(true)
    }

    /// Whether there is a credit for a message.
    pub(crate) fn has_room(&mut self) -> Result<bool, TransportError> {
        self.pump(None)?;
        Ok(self.sent - self.taken < u64::from(RECEIVES))
    }

    /// As [`Self::message`], but gives up where there is no credit.
    pub(crate) fn try_message(&mut self, bytes: &[u8]) -> Result<u64, TransportError> {
        if !self.has_room()? {
            let operation = "send a last message";
            return Err(TransportError::TimedOut { operation, after: Duration::ZERO });
        }
        self.message(bytes)
    }

    /// Sends a mark; returns its number as a message. Waits for a credit.
    pub(crate) fn mark(&mut self) -> Result<u64, TransportError> {
        self.pump_until(None, |outlet| outlet.sent - outlet.taken < u64::from(RECEIVES))?;
        let verb =
            if self.immediate { Verb::WriteWithImmediate { immediate: 0 } } else { Verb::Send };
        self.post(verb, None)?;
        self.sent += 1;
        Ok(self.sent)
    }

    /// Waits until the other side's NIC has all that was posted, at most for so long.
    pub(crate) fn flush(&mut self, within: Duration) -> Result<(), TransportError> {
        let deadline = Instant::now() + within;
        while self.done < self.posted && Instant::now() < deadline {
            self.pump(Some(deadline))?;
        }
        Ok(())
    }
}

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
    /// Messages that came and were not given out.
    waiting: VecDeque<Message>,
    /// Messages dealt with, and how many of them the other side knows of.
    taken: u64,
    told: u64,
    /// Whether the one that was given out last counts as dealt with by the next call.
    in_hand: bool,
    /// Requests posted, and those of them that are complete: acknowledgements, and reads.
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
            taken: 0,
            told: 0,
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
            let now = Instant::now();
            if deadline.is_some_and(|deadline| now >= deadline) {
                self.pump(None)?;
                if self.waiting.is_empty() {
                    return Ok(None);
                }
                continue;
            }
            let keepalive = self.heard + KEEPALIVE;
            self.pump(Some(deadline.map_or(keepalive, |deadline| deadline.min(keepalive))))?;
            if self.heard.elapsed() >= KEEPALIVE {
                self.heard = Instant::now();
                // One that is not complete asks already.
                if self.posted == self.done {
                    self.tell()?;
                }
            }
        }
    }

    /// The message in hand is dealt with.
    pub(crate) fn settle(&mut self) -> Result<(), TransportError> {
        if std::mem::take(&mut self.in_hand) {
            self.taken += 1;
            if self.taken - self.told >= u64::from(RECEIVES / 2) {
                self.tell()?;
            }
        }
        Ok(())
    }

    /// Says how many messages were dealt with, also the one in hand.
    pub(crate) fn acknowledge(&mut self) -> Result<(), TransportError> {
        self.settle()?;
        if self.told < self.taken { self.tell() } else { Ok(()) }
    }

    fn tell(&mut self) -> Result<(), TransportError> {
        // Each is as good as all before it, but one whose bytes are on their way must not change.
        while self.posted - self.done >= u64::from(ACKS) {
            self.pump(Some(Instant::now() + TURN))?;
        }
        let slot = usize::try_from(self.posted % u64::from(ACKS)).unwrap_or(0);
        self.acks.put(slot * ACK_BYTES, &self.taken.to_le_bytes());
        let work = self.posted + 1;
        let span = span(&self.acks, slot, ACK_BYTES, ACK_BYTES);
        let request = Request { work, verb: Verb::Send, span: Some(span), signalled: true };
        self.connection.qp.post([request]).map_err(failed)?;
        self.posted = work;
        self.told = self.taken;
        Ok(())
    }

    /// Reads the other side's memory, and waits until all is here.
    pub(crate) fn read(&mut self, reads: &[Transfer]) -> Result<(), TransportError> {
        for some in reads.chunks(ACKS as usize) {
            while self.posted - self.done > u64::from(ACKS) - some.len() as u64 {
                self.pump(Some(Instant::now() + TURN))?;
            }
            let (posted, count) = (self.posted, some.len() as u64);
            let requests = (1..).zip(some).map(|(index, read)| Request {
                work: posted + index,
                verb: Verb::Read { address: read.address, key: read.key },
                span: Some(read.span),
                signalled: index == count,
            });
            self.connection.qp.post(requests).map_err(failed)?;
            self.posted += count;
        }
        while self.done < self.posted {
            self.pump(Some(Instant::now() + TURN))?;
        }
        Ok(())
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
        result.and(noted)
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
