//! The end that messages, and writes, go into.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::transport::TransportError;

use super::credits::Giving;
use super::{
    ACK_BYTES, ACKS, RECEIVE, RECEIVES, SLOT_BYTES, TURN, Transfer, failed, lost, span,
    write_requests,
};
use crate::connection::Connection;
use crate::verbs::{Access, Completion, MemoryRegion, ProtectionDomain, Request, Span, Verb};

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
    credits: Giving,
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
            credits: Giving::default(),
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
        self.credits.taken()
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

    /// Takes what is there, and answers if the other side asks whether anybody is here. To be
    /// called now and then by who has nothing to send.
    pub(crate) fn attend(&mut self) -> Result<(), TransportError> {
        self.pump(None)?;
        if self.credits.owes_answer() && self.has_slot() {
            // Empty, and no write: only queue pairs for pages let the other side do that.
            self.post(Verb::Send, None)?;
            self.credits.send();
        }
        Ok(())
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
        if completion.len_bytes as usize != ACK_BYTES {
            return Err(TransportError::Violation("an acknowledgement out of form"));
        }
        self.credits.hear(bytes.try_into().map_or(u64::MAX, u64::from_le_bytes))?;
        self.post_ack(slot)
    }

    /// Waits until a condition holds, at most until `deadline`.
    fn pump_until(
        &mut self,
        deadline: Option<Instant>,
        holds: impl Fn(&Self) -> bool,
    ) -> Result<(), TransportError> {
        let began = Instant::now();
        while !holds(self) {
            let now = Instant::now();
            if deadline.is_some_and(|deadline| now >= deadline) {
                let operation = "send a message";
                return Err(TransportError::TimedOut { operation, after: now - began });
            }
            self.pump(Some(deadline.unwrap_or(now + TURN)))?;
        }
        Ok(())
    }

    /// Whether the send queue takes one more request.
    fn has_slot(&self) -> bool {
        self.posted - self.done < self.depth
    }

    /// Writes spans to the other side's memory, in order. Waits for room in the send queue.
    pub(crate) fn write(&mut self, writes: &[Transfer]) -> Result<(), TransportError> {
        let mut rest = writes;
        while !rest.is_empty() {
            self.pump_until(None, Self::has_slot)?;
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

    /// Posts one signalled request, for which there is room.
    fn post(&mut self, verb: Verb, span: Option<Span>) -> Result<u64, TransportError> {
        let work = self.posted + 1;
        let request = Request { work, verb, span, signalled: true };
        self.connection.qp.post([request]).map_err(failed)?;
        self.posted = work;
        Ok(work)
    }

    /// Sends a message of 1 to [`SLOT_BYTES`] bytes; returns its number. Waits for a credit, at most
    /// until `deadline`.
    pub(crate) fn message(
        &mut self,
        bytes: &[u8],
        deadline: Option<Instant>,
    ) -> Result<u64, TransportError> {
        // What has come is taken first, so that there is room for the words about this one.
        self.pump(None)?;
        self.pump_until(deadline, |outlet| outlet.has_room_at_once() && outlet.has_slot())?;
        let slot = self.next_slot();
        self.slots.put(slot * SLOT_BYTES, bytes);
        let span = span(&self.slots, slot, SLOT_BYTES, bytes.len());
        self.used_by[slot] = self.post(Verb::Send, Some(span))?;
        Ok(self.credits.send())
    }

    /// Sends a message, if there is room at once, and waits until the other side's NIC has it, at most for
    /// so long: also where the link was interrupted.
    pub(crate) fn last_word(
        &mut self,
        bytes: &[u8],
        within: Duration,
    ) -> Result<(), TransportError> {
        if !self.has_room_at_once() || !self.has_slot() {
            return Ok(());
        }
        let slot = self.next_slot();
        self.slots.put(slot * SLOT_BYTES, bytes);
        let span = span(&self.slots, slot, SLOT_BYTES, bytes.len());
        self.post(Verb::Send, Some(span))?;
        self.credits.send();
        let (deadline, mut found) = (Instant::now() + within, Vec::new());
        while self.done < self.posted && Instant::now() < deadline {
            self.connection.qp.completions.poll(&mut found).map_err(failed)?;
            found.drain(..).try_for_each(|completion| self.note(&completion))?;
            std::thread::yield_now();
        }
        Ok(())
    }

    fn next_slot(&self) -> usize {
        usize::try_from(self.credits.sent() % u64::from(RECEIVES)).unwrap_or(0)
    }

    /// Whether there is a credit for a message, and a slot that no request uses.
    fn has_room_at_once(&self) -> bool {
        self.credits.has_credit() && self.done >= self.used_by[self.next_slot()]
    }

    /// Whether a message would not wait.
    pub(crate) fn has_room(&mut self) -> Result<bool, TransportError> {
        self.attend()?;
        Ok(self.has_room_at_once() && self.has_slot())
    }

    /// Sends a mark; returns its number as a message. Waits for a credit, at most until `deadline`.
    pub(crate) fn mark(&mut self, deadline: Option<Instant>) -> Result<u64, TransportError> {
        self.pump(None)?;
        self.pump_until(deadline, |outlet| outlet.credits.has_credit() && outlet.has_slot())?;
        let verb =
            if self.immediate { Verb::WriteWithImmediate { immediate: 0 } } else { Verb::Send };
        self.post(verb, None)?;
        Ok(self.credits.send())
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
