//! The source's end of a data channel.
//!
//! Pages go from guest memory into the socket by `sendmsg`: one call a batch, unless the kernel
//! takes it in pieces. The kernel copies them into its own buffers, so a batch is *released* as
//! soon as it is sent.
//!
//! # Acknowledgements
//!
//! A batch asks for one when [`ACK_EVERY_BYTES`] of guest memory have been sent since the last
//! that did. A flag on an older batch cannot be set afterwards, so it is the receiver that makes
//! [`PageSender::watermarks`] with a wait work: it also acknowledges before it would block
//! for want of bytes. `send` returns only when the kernel has the whole batch, hence nothing
//! needs to be flushed here, and all that was sent is acknowledged sooner or later.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::Duration;

use pageferry::memory::GuestMemory;
use pageferry::transport::stream::{self, ACK_BYTES};
use pageferry::transport::{
    ChannelCounters, MAX_BATCH_RUNS, PageSender, Run, Ticket, TransportError, Watermarks,
};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::connection::{Connection, deadline_after};
use crate::raw_io::GuestVectors;

/// Most page bytes in one batch.
pub(crate) const MAX_BATCH_BYTES: u64 = 4 << 20;
/// Guest memory sent, as data or as zeroes, after which an acknowledgement is asked for.
const ACK_EVERY_BYTES: u64 = 4 << 20;
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
    landed: Ticket,
    unasked_bytes: u64,
    /// Acknowledgements come in; the first `acks_filled` bytes are an incomplete one.
    acks: [u8; ACKS_AT_ONCE * ACK_BYTES],
    acks_filled: usize,
    counters: ChannelCounters,
}

impl TcpPageSender {
    pub(crate) fn new(connection: Arc<Connection>, memory: Arc<GuestMemory>) -> Self {
        Self {
            connection,
            vectors: GuestVectors::new(memory),
            head: Vec::new(),
            phase: Phase::Open,
            sent: 0,
            landed: 0,
            unasked_bytes: 0,
            acks: [0; ACKS_AT_ONCE * ACK_BYTES],
            acks_filled: 0,
            counters: ChannelCounters::default(),
        }
    }

    /// Sends the head and what the vectors hold.
    fn send_all(&mut self) -> Result<(), TransportError> {
        let mut head_sent = 0;
        while head_sent < self.head.len() || self.vectors.left_bytes() > 0 {
            self.counters.system_calls += 1;
            match self.vectors.send(&self.connection, &self.head[head_sent..]) {
                Ok(moved) => {
                    head_sent += moved.head_bytes;
                    self.counters.wire_bytes += (moved.head_bytes + moved.guest_bytes) as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.vectors.clear();
                    self.phase = Phase::Broken;
                    let error = self.connection.failed(SENDING, error);
                    self.connection.shutdown(Shutdown::Both);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn check_open(&self) -> Result<(), TransportError> {
        self.connection.check()?;
        match self.phase {
            Phase::Open => Ok(()),
            Phase::Finished => Err(TransportError::OutOfOrder("the data channel is finished")),
            Phase::Broken => Err(TransportError::Lost {
                operation: SENDING,
                cause: io::ErrorKind::NotConnected.into(),
            }),
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
                        self.connection.shutdown(Shutdown::Both);
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
        Watermarks { released: self.sent, landed: self.landed }
    }
}

impl PageSender for TcpPageSender {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        self.check_open()?;
        if runs.is_empty() {
            let cause = io::Error::new(io::ErrorKind::InvalidInput, "the batch has no runs");
            return Err(TransportError::Io { operation: SENDING, cause });
        }
        let too_large = |what, size, limit| TransportError::TooLarge { what, size, limit };
        if runs.len() > MAX_BATCH_RUNS {
            let (size, limit) = (runs.len() as u64, MAX_BATCH_RUNS as u64);
            return Err(too_large("number of runs in a batch", size, limit));
        }
        let payload_bytes: u64 = runs.iter().map(Run::payload_bytes).sum();
        if payload_bytes > MAX_BATCH_BYTES {
            return Err(too_large("batch in bytes", payload_bytes, MAX_BATCH_BYTES));
        }
        self.vectors.load(runs)?;

        let covered_bytes: u64 = runs.iter().map(|run| run.range.len_bytes()).sum();
        self.unasked_bytes = self.unasked_bytes.saturating_add(covered_bytes);
        let ask = self.unasked_bytes >= ACK_EVERY_BYTES;
        if ask {
            self.unasked_bytes = 0;
        }
        let ticket = self.sent + 1;
        stream::encode_batch(ticket, runs, ask, &mut self.head);
        self.send_all()?;
        self.sent = ticket;
        Ok(ticket)
    }

    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
        self.connection.check()?;
        let before = self.landed;
        if before == self.sent {
            // Nothing is under way: nothing can come, and waiting would be in vain.
            return Ok(self.marks());
        }
        let deadline = deadline_after(wait);
        loop {
            match self.take_acks() {
                // What landed before the link was lost is worth knowing; the next call fails.
                Err(TransportError::Lost { .. }) if self.landed > before => break,
                result => result?,
            }
            if wait.is_none() || self.landed > before {
                break;
            }
            self.counters.system_calls += 1;
            if self.connection.wait(PollFlags::IN, deadline)?.is_empty() {
                break;
            }
        }
        Ok(self.marks())
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
        self.send_all()?;
        self.phase = Phase::Finished;
        self.connection.shutdown(Shutdown::Write);
        Ok(())
    }
}

impl Drop for TcpPageSender {
    fn drop(&mut self) {
        if self.phase != Phase::Finished {
            self.connection.shutdown(Shutdown::Both);
        } else if self.landed < self.sent {
            // The last batches may still be in this side's send buffer. The link holds the
            // socket open; tell it to be patient when it goes.
            self.connection.ask_to_linger();
        }
    }
}
