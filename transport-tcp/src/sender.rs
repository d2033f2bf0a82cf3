//! The source's end of a data channel.
//!
//! Pages go from guest memory into the socket by `sendmsg`: one call a batch, unless the kernel
//! takes it in pieces. The kernel copies them into its own buffers, so a batch is *released* as
//! soon as it is sent; unless it was sent zero-copy, then it is when the kernel says so
//! ([`crate::zero_copy`]).
//!
//! # Acknowledgements
//!
//! Now and then a batch asks for one ([`AckSchedule`]). The receiver answers when it has the lead
//! of the next record too, so [`PageSender::watermarks`] with a wait sends a request where no
//! batch followed. It is sent without blocking, since the call is bound by time; what does not fit
//! goes out later, at the latest before the next record.
//!
//! A batch counts as landed only when it is released as well: its memory may be put to other use
//! then, and the kernel may still have packets of it to send again.

use std::io;
use std::mem;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::memory::GuestMemory;
use pageferry::transport::stream::{self, ACK_BYTES, AckSchedule};
use pageferry::transport::{
    ChannelCounters, Interrupt, PageSender, Run, Ticket, TransportError, Watermarks,
};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::connection::{Connection, LINGER};
use crate::copies::pieces;
use crate::options::TcpOptions;
use crate::raw_io::GuestVectors;
use crate::waiting::{deadline_after, is_past};
use crate::wire::Seal;
use crate::zero_copy::ZeroCopier;

/// Acknowledgements read with one call.
const ACKS_AT_ONCE: usize = 64;

const SENDING: &str = "send pages";
const AWAITING_ACKS: &str = "receive acknowledgements";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// The end record is out.
    Finished,
    /// Something failed, perhaps in the middle of a batch: nothing can follow.
    Broken,
}

#[derive(Debug)]
pub(crate) struct TcpPageSender {
    connection: Arc<Connection>,
    vectors: GuestVectors,
    /// Header and table of the batch at hand.
    head: Vec<u8>,
    phase: Phase,
    sent: Ticket,
    /// As acknowledged, released or not.
    landed: Ticket,
    /// The last landed watermark that was handed out.
    told: Ticket,
    schedule: AckSchedule,
    /// The end of a request for which the socket had no room.
    owed: Vec<u8>,
    zero_copy: ZeroCopier,
    /// Of pages that are encrypted in this process.
    copy: Vec<u8>,
    /// Acknowledgements come in; the first `acks_filled` bytes are an incomplete one.
    acks: [u8; ACKS_AT_ONCE * ACK_BYTES],
    acks_filled: usize,
    counters: ChannelCounters,
}

impl TcpPageSender {
    pub(crate) fn new(
        connection: Arc<Connection>,
        memory: Arc<GuestMemory>,
        options: &TcpOptions,
    ) -> Result<Self, TransportError> {
        Ok(Self {
            zero_copy: ZeroCopier::new(options, &connection)?,
            connection,
            vectors: GuestVectors::new(memory),
            head: Vec::new(),
            phase: Phase::Open,
            sent: 0,
            landed: 0,
            told: 0,
            schedule: AckSchedule::default(),
            owed: Vec::new(),
            copy: Vec::new(),
            acks: [0; ACKS_AT_ONCE * ACK_BYTES],
            acks_filled: 0,
            counters: ChannelCounters::default(),
        })
    }

    /// Of a lane, whose batches are answers.
    pub(crate) fn of_lane(
        connection: Arc<Connection>,
        memory: Arc<GuestMemory>,
        options: &TcpOptions,
    ) -> Result<Self, TransportError> {
        let mut sender = Self::new(connection, memory, options)?;
        sender.schedule = AckSchedule::never();
        Ok(sender)
    }

    /// Sends what is owed, the head, and what the vectors hold for this batch.
    fn send_all(&mut self, ticket: Ticket, runs: &[Run]) -> Result<(), TransportError> {
        if !self.owed.is_empty() {
            self.head.splice(0..0, self.owed.drain(..));
        }
        if self.connection.seal() == Seal::Process {
            return self.send_by_copies(runs).inspect_err(|_| self.give_up());
        }
        let mut head_sent = 0;
        let mut result = Ok(());
        if self.zero_copy.takes(self.vectors.left_bytes()) {
            result = self.send_zero_copy(ticket, &mut head_sent);
        }
        while result.is_ok() && (head_sent < self.head.len() || self.vectors.left_bytes() > 0) {
            self.counters.system_calls += 1;
            match self.vectors.send(&self.connection, &self.head[head_sent..]) {
                Ok(moved) => {
                    head_sent += moved.head_bytes;
                    let sent = moved.head_bytes + moved.guest_bytes;
                    self.connection.note_sent(sent);
                    self.counters.wire_bytes += sent as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => result = Err(self.connection.failed(SENDING, error)),
            }
        }
        result.inspect_err(|_| self.give_up())
    }

    /// The same, where it is encrypted in this process.
    fn send_by_copies(&mut self, runs: &[Run]) -> Result<(), TransportError> {
        let mut copy = mem::take(&mut self.copy);
        let head = mem::take(&mut self.head);
        let mut sent = self.put(&head);
        self.head = head;
        for piece in pieces(runs) {
            sent = sent.and_then(|()| {
                self.vectors.memory().copy_out(piece, &mut copy)?;
                self.counters.user_copied_bytes += copy.len() as u64;
                self.put(&copy)
            });
        }
        self.copy = copy;
        sent?;
        let flushed = self.connection.flush(None);
        flushed.map(drop).map_err(|errno| self.connection.failed(SENDING, errno.into()))
    }

    fn put(&mut self, mut bytes: &[u8]) -> Result<(), TransportError> {
        while !bytes.is_empty() {
            self.counters.system_calls += 1;
            match self.connection.send(bytes, SendFlags::empty()) {
                Ok(sent) => {
                    bytes = &bytes[sent..];
                    self.counters.wire_bytes += sent as u64;
                }
                Err(errno) => return Err(self.connection.failed(SENDING, errno.into())),
            }
        }
        Ok(())
    }

    /// Something failed in the middle of a record.
    fn give_up(&mut self) {
        self.vectors.clear();
        self.owed.clear();
        self.phase = Phase::Broken;
        self.connection.break_off();
    }

    /// Sends the head with a copy, since its buffer is used again, and the pages without. What it
    /// leaves is to be sent plainly.
    fn send_zero_copy(
        &mut self,
        ticket: Ticket,
        head_sent: &mut usize,
    ) -> Result<(), TransportError> {
        while *head_sent < self.head.len() {
            self.counters.system_calls += 1;
            match self.connection.send(&self.head[*head_sent..], SendFlags::MORE) {
                Ok(sent) => {
                    *head_sent += sent;
                    self.counters.wire_bytes += sent as u64;
                }
                Err(errno) => return Err(self.connection.failed(SENDING, errno.into())),
            }
        }
        while self.vectors.left_bytes() > 0 {
            self.counters.system_calls += 1;
            match self.vectors.send_zero_copy(&self.connection) {
                Ok(sent) => {
                    self.counters.wire_bytes += sent as u64;
                    self.zero_copy.sent(ticket, sent);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => {
                    if !self.make_room(&error)? {
                        return Ok(());
                    }
                }
                Err(error) => return Err(self.connection.failed(SENDING, error)),
            }
        }
        Ok(())
    }

    /// Waits until some zero-copy send is complete, so that there is room for another; false if
    /// there will be none.
    fn make_room(&mut self, cause: &io::Error) -> Result<bool, TransportError> {
        loop {
            if self.look()? {
                return Ok(true);
            }
            if self.zero_copy.is_done() {
                let bytes = self.vectors.left_bytes();
                self.zero_copy.give_up(&self.connection, bytes, cause)?;
                return Ok(false);
            }
            self.counters.system_calls += 1;
            let ready = self.connection.wait_for_completion(None)?;
            if self.look()? {
                return Ok(true);
            }
            // Nothing is complete: then it was the connection that ended the wait.
            let error = self.connection.socket().take_error().ok().flatten();
            if let Some(error) = error {
                return Err(self.connection.failed(SENDING, error));
            }
            if ready.contains(PollFlags::HUP) {
                return Err(self.connection.ended(SENDING));
            }
        }
    }

    /// Takes the completions of zero-copy sends that are there; whether there were any.
    fn look(&mut self) -> Result<bool, TransportError> {
        let looked = self.zero_copy.look(&self.connection, &mut self.counters.system_calls);
        self.counters.zero_copy = self.zero_copy.counts();
        looked
    }

    /// Sends what is owed as far as there is room.
    fn send_owed(&mut self) -> Result<(), TransportError> {
        while !self.owed.is_empty() {
            self.counters.system_calls += 1;
            match self.connection.send(&self.owed, SendFlags::DONTWAIT) {
                Ok(sent) => {
                    self.owed.drain(..sent);
                    self.counters.wire_bytes += sent as u64;
                }
                Err(Errno::AGAIN) => break,
                Err(errno) => {
                    self.owed.clear();
                    return Err(self.connection.failed(AWAITING_ACKS, errno.into()));
                }
            }
        }
        Ok(())
    }

    /// Waits until acknowledgements or completions may be there; false when the time is over.
    fn wait(&mut self, deadline: Option<Instant>) -> Result<bool, TransportError> {
        self.counters.system_calls += 1;
        if self.landed == self.sent {
            // Only completions are missing. The other side may have ended its direction.
            return Ok(!self.connection.wait_for_completion(deadline)?.is_empty());
        }
        let owing = if self.owed.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        Ok(!self.connection.wait(PollFlags::IN | owing, deadline)?.is_empty())
    }

    fn check_open(&self) -> Result<(), TransportError> {
        self.connection.check()?;
        match self.phase {
            Phase::Open => Ok(()),
            Phase::Finished => Err(TransportError::OutOfOrder("the data channel is finished")),
            Phase::Broken => Err(self.connection.failed(SENDING, Errno::NOTCONN.into())),
        }
    }

    /// Takes the acknowledgements that are there.
    fn take_acks(&mut self) -> Result<(), TransportError> {
        loop {
            self.counters.system_calls += 1;
            let room = &mut self.acks[self.acks_filled..];
            let room_bytes = room.len();
            let received = match self.connection.receive(room, RecvFlags::DONTWAIT) {
                Ok(0) => return Err(self.connection.ended(AWAITING_ACKS)),
                Ok(received) => received,
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(self.connection.failed(AWAITING_ACKS, errno.into())),
            };
            self.counters.wire_bytes += received as u64;
            let filled = self.acks_filled + received;
            let (acks, partial) = self.acks[..filled].as_chunks::<ACK_BYTES>();
            self.acks_filled = partial.len();
            for ack in acks {
                match stream::decode_ack(*ack, self.sent, self.landed) {
                    Ok(landed) => self.landed = landed,
                    Err(error) => {
                        self.phase = Phase::Broken;
                        self.connection.break_off();
                        return Err(error.into());
                    }
                }
            }
            let partial_at = filled - self.acks_filled;
            self.acks.copy_within(partial_at..filled, 0);
            if received < room_bytes {
                return Ok(());
            }
        }
    }

    fn marks(&self) -> Watermarks {
        let released = self.zero_copy.released(self.sent);
        Watermarks { released, landed: self.landed.min(released) }
    }

    /// Takes what is there. What landed before the link was lost is worth knowing: then it is no
    /// failure yet, the next call fails.
    fn take_news(&mut self, look: bool) -> Result<(), TransportError> {
        if look {
            self.look()?;
        }
        if !self.schedule.expects_more(self.landed) {
            return Ok(());
        }
        match self.take_acks() {
            Err(TransportError::Lost { .. }) if self.has_news() => Ok(()),
            result => result,
        }
    }

    fn has_news(&self) -> bool {
        self.marks().landed > self.told
    }
}

impl PageSender for TcpPageSender {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        self.check_open()?;
        if runs.is_empty() {
            let cause = io::Error::new(io::ErrorKind::InvalidInput, "the batch has no runs");
            return Err(TransportError::Io { operation: SENDING, cause });
        }
        crate::CAPABILITIES.check(runs)?;
        self.vectors.load(runs)?;

        let ticket = self.sent + 1;
        let ask = self.schedule.flag_next(ticket, runs);
        stream::encode_batch(ticket, runs, ask, &mut self.head);
        self.connection.check_key(SENDING)?;
        self.send_all(ticket, runs)?;
        self.sent = ticket;
        if self.zero_copy.look_is_due() {
            self.look()?;
        }
        Ok(ticket)
    }

    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
        self.connection.check()?;
        let deadline = deadline_after(wait);
        // Once everything has landed nothing can come, and waiting would be in vain.
        while self.told < self.sent {
            self.take_news(wait.is_some())?;
            if wait.is_none() || self.has_news() {
                break;
            }
            if self.landed < self.sent && !self.schedule.expects_more(self.landed) {
                stream::encode_ack_request(&mut self.owed);
                self.schedule.requested(self.sent);
            }
            let waited = self.send_owed().and_then(|()| self.wait(deadline));
            match waited {
                // After a hang-up this may go on: waits are over at once, and neither the time nor
                // an interrupt shows elsewhere.
                Ok(true) if !is_past(deadline) => self.connection.check()?,
                Ok(_) => {
                    self.take_news(true)?;
                    break;
                }
                Err(error) => {
                    self.take_news(true)?;
                    if self.has_news() {
                        break;
                    }
                    return Err(error);
                }
            }
        }
        let marks = self.marks();
        self.told = marks.landed;
        Ok(marks)
    }

    fn counters(&self) -> ChannelCounters {
        self.counters
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        if self.phase == Phase::Finished {
            return self.connection.check();
        }
        self.check_open()?;
        stream::encode_end(&mut self.head);
        self.send_all(self.sent, &[])?;
        // The end is a request too.
        self.schedule.requested(self.sent);
        self.phase = Phase::Finished;
        // Before the connection is shut down: the wait is a real one only until then.
        let deadline = Instant::now() + LINGER;
        while !self.zero_copy.is_done() {
            self.look()?;
            if self.zero_copy.is_done() || Instant::now() >= deadline {
                break;
            }
            self.counters.system_calls += 1;
            self.connection.wait_for_completion(Some(deadline))?;
            self.connection.check()?;
        }
        self.connection.shutdown(Shutdown::Write);
        Ok(())
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.connection.interrupter()
    }
}

impl Drop for TcpPageSender {
    fn drop(&mut self) {
        if self.phase != Phase::Finished {
            self.connection.break_off();
        } else if self.landed < self.sent || !self.zero_copy.is_done() {
            // The last batches may still be in this side's send buffer. The link holds the
            // socket open; tell it to be patient when it goes.
            self.connection.ask_to_linger();
        }
        if let Some(unreleased) = self.zero_copy.take_unreleased(self.vectors.memory()) {
            self.connection.leave_unreleased(unreleased);
        }
    }
}
