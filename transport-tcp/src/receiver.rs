//! The destination's end of a data channel.
//!
//! Page bytes go from the socket into guest memory by `recvmsg`; only headers and tables touch
//! buffers of ours. Every batch has at least one run, so after a batch [`READ_AHEAD_BYTES`] more
//! can be asked for without ever getting page bytes: they come with the end of the payload in one
//! call, mostly, and a batch of one run costs no call for its head.
//!
//! # When batches are acknowledged
//!
//! - When the sender asks for it.
//! - When a batch has landed and not a byte of the next has come. That is known without a
//!   further system call, from how much the last `recvmsg` returned. After it this side blocks
//!   for want of bytes, so it can never sleep on batches that have landed and are not
//!   acknowledged; what arrives between the look and the acknowledgement is a batch of its own
//!   and gets its own turn.
//!
//! Acknowledgements are sent without blocking. They are cumulative, so where the sender does not
//! read them the newest replaces all that did not fit, and two sides that both only write cannot
//! get stuck.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use pageferry::transport::stream::{
    self, ACK_BYTES, BatchHeader, HEADER_BYTES, Header, MAX_HEAD_BYTES, RUN_BYTES, StreamError,
};
use pageferry::transport::{
    ChannelCounters, PageCounts, PageReceiver, Received, Run, RunKind, Ticket, TransportError,
};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::connection::Connection;
use crate::raw_io::GuestVectors;

/// Header and first run: what every batch has, and so what never contains page bytes.
const READ_AHEAD_BYTES: usize = HEADER_BYTES + RUN_BYTES;
/// The end of a payload that is received together with the next head, when the sender is not
/// ahead of us. It mostly comes in the packet that ends what was waited for.
const TAIL_BYTES: usize = 4096;

const RECEIVING: &str = "receive pages";

#[derive(Debug)]
pub(crate) struct TcpPageReceiver {
    connection: Arc<Connection>,
    vectors: GuestVectors,
    /// Header and table; the first `head_filled` bytes are there.
    head: Box<[u8; MAX_HEAD_BYTES]>,
    head_filled: usize,
    runs: Vec<Run>,
    landed: Ticket,
    acks: AckSender,
    ended: bool,
    broken: Option<StreamError>,
    /// Failed, perhaps in the middle of a batch: what comes next would be misread.
    lost: bool,
    counters: ChannelCounters,
}

impl TcpPageReceiver {
    pub(crate) fn new(connection: Arc<Connection>, memory: Arc<GuestMemory>) -> Self {
        Self {
            connection,
            vectors: GuestVectors::new(memory),
            head: Box::new([0; MAX_HEAD_BYTES]),
            head_filled: 0,
            runs: Vec::new(),
            landed: 0,
            acks: AckSender::default(),
            ended: false,
            broken: None,
            lost: false,
            counters: ChannelCounters::default(),
        }
    }

    /// The other side sent what no peer sends; it stays said.
    fn malformed(&mut self, error: StreamError) -> TransportError {
        self.broken = Some(error);
        error.into()
    }

    /// Receives bytes of the head up to `end`, at least one.
    fn receive_head(&mut self, end: usize, flags: RecvFlags) -> Result<(), TransportError> {
        self.counters.system_calls += 1;
        match self.connection.receive(&mut self.head[self.head_filled..end], flags) {
            Ok(0) => Err(self.connection.ended(RECEIVING)),
            Ok(received) => {
                self.head_filled += received;
                self.counters.wire_bytes += received as u64;
                Ok(())
            }
            Err(errno) => Err(self.connection.failed(RECEIVING, errno.into())),
        }
    }

    /// Receives the header, and the first run where it is there already.
    fn receive_header(&mut self) -> Result<Header, TransportError> {
        // Rare: the last acknowledgement did not fit. It must get out while we wait.
        while self.head_filled == 0 && self.acks.is_stuck() {
            self.counters.system_calls += 1;
            let ready = self.connection.wait(PollFlags::IN | PollFlags::OUT, None)?;
            self.acks.send(self.landed, &self.connection, SendFlags::DONTWAIT, &mut self.counters);
            if ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                break;
            }
        }
        while self.head_filled < HEADER_BYTES {
            self.receive_head(READ_AHEAD_BYTES, RecvFlags::empty())?;
        }
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(&self.head[..HEADER_BYTES]);
        stream::decode_header(&header, self.landed + 1).map_err(|error| self.malformed(error))
    }

    /// Receives the table, checks it, and gets the vectors ready for the payload.
    fn receive_table(&mut self, header: &BatchHeader) -> Result<PageCounts, TransportError> {
        let end = HEADER_BYTES + header.table_bytes();
        while self.head_filled < end {
            self.receive_head(end, RecvFlags::WAITALL)?;
        }
        let table = &self.head[HEADER_BYTES..end];
        let layout = self.vectors.memory().layout();
        let counts = stream::decode_table(header, table, layout, &mut self.runs)
            .map_err(|error| self.malformed(error))?;
        self.vectors.load(&self.runs)?;
        Ok(counts)
    }

    /// Receives the payload into guest memory, and the next head behind it as far as it is there.
    fn receive_payload(&mut self, sender_is_ahead: bool) -> Result<(), TransportError> {
        // A sender that is ahead has probably filled the socket with the whole payload and the
        // next head: one call for both. Otherwise waiting for nearly everything first saves
        // being woken for every few packets.
        let mut all_at_once = sender_is_ahead;
        while self.vectors.left_bytes() > 0 {
            self.counters.system_calls += 1;
            let left_bytes = self.vectors.left_bytes();
            let result = if all_at_once || left_bytes <= TAIL_BYTES {
                let room = &mut self.head[self.head_filled..READ_AHEAD_BYTES];
                self.vectors.receive_with_head(&self.connection, room).map(|moved| {
                    self.head_filled += moved.head_bytes;
                    moved.head_bytes + moved.guest_bytes
                })
            } else {
                self.vectors.receive_all(&self.connection, left_bytes - TAIL_BYTES)
            };
            all_at_once = false;
            match result {
                Ok(0) => return Err(self.connection.ended(RECEIVING)),
                Ok(received) => self.counters.wire_bytes += received as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.connection.failed(RECEIVING, error)),
            }
        }
        Ok(())
    }

    /// Looks whether the next head is there, without waiting. What is wrong with the
    /// connection, if anything, the next batch will find out.
    fn look_ahead(&mut self) {
        self.counters.system_calls += 1;
        let room = &mut self.head[self.head_filled..READ_AHEAD_BYTES];
        if let Ok(received) = self.connection.receive(room, RecvFlags::DONTWAIT) {
            self.head_filled += received;
            self.counters.wire_bytes += received as u64;
        }
    }

    fn place(
        &mut self,
        header: &BatchHeader,
        sender_is_ahead: bool,
    ) -> Result<Received, TransportError> {
        let counts = self.receive_table(header)?;
        // Zeroes first: meanwhile the kernel receives the payload. A batch names no page twice.
        for run in self.runs.iter().filter(|run| run.kind == RunKind::Zero) {
            self.vectors.memory().fill_zero(run.range)?;
        }
        self.head_filled = 0;
        if header.payload_bytes > 0 {
            self.receive_payload(sender_is_ahead)?;
        }
        self.landed = header.ticket;
        if header.payload_bytes == 0 && !header.ack {
            self.look_ahead();
        }
        if header.ack || self.head_filled == 0 {
            self.acks.send(self.landed, &self.connection, SendFlags::DONTWAIT, &mut self.counters);
        }
        Ok(Received::Batch(counts))
    }

    fn receive_next(&mut self) -> Result<Received, TransportError> {
        let sender_is_ahead = self.head_filled > 0;
        match self.receive_header()? {
            Header::Batch(header) => self.place(&header, sender_is_ahead),
            Header::End => Ok(self.end()),
        }
    }

    /// The source ended the channel: acknowledge all, and end our direction too.
    fn end(&mut self) -> Received {
        if self.acks.is_due(self.landed) {
            self.acks.send(self.landed, &self.connection, SendFlags::empty(), &mut self.counters);
        }
        self.connection.shutdown(Shutdown::Write);
        self.ended = true;
        Received::End
    }
}

impl PageReceiver for TcpPageReceiver {
    fn receive(&mut self) -> Result<Received, TransportError> {
        self.connection.check()?;
        if let Some(error) = self.broken {
            return Err(error.into());
        }
        if self.ended {
            return Ok(Received::End);
        }
        if self.lost {
            return Err(self.connection.ended(RECEIVING));
        }
        let result = self.receive_next();
        if result.is_err() {
            self.lost = true;
            self.connection.shutdown(Shutdown::Both);
        }
        result
    }

    fn counters(&self) -> ChannelCounters {
        self.counters
    }
}

impl Drop for TcpPageReceiver {
    fn drop(&mut self) {
        if !self.ended {
            self.connection.shutdown(Shutdown::Both);
        }
    }
}

/// Sends acknowledgements, the newest only, and keeps what did not fit.
///
/// That one cannot be sent is no error here: a source that finished and went away at once does
/// not want them, and one that was lost shows when the next header is read.
#[derive(Debug, Default)]
struct AckSender {
    /// The acknowledgement on its way, of which `unsent` bytes at the end are not out yet.
    bytes: [u8; ACK_BYTES],
    unsent: usize,
    /// The ticket in `bytes`.
    acknowledged: Ticket,
    /// It did not fit; try again before sleeping.
    stuck: bool,
    dead: bool,
}

impl AckSender {
    fn is_due(&self, landed: Ticket) -> bool {
        !self.dead && (self.unsent > 0 || self.acknowledged < landed)
    }

    fn is_stuck(&self) -> bool {
        self.stuck
    }

    fn send(
        &mut self,
        landed: Ticket,
        connection: &Connection,
        flags: SendFlags,
        counters: &mut ChannelCounters,
    ) {
        self.stuck = false;
        while self.is_due(landed) {
            if self.unsent == 0 {
                self.bytes = landed.to_le_bytes();
                self.unsent = ACK_BYTES;
                self.acknowledged = landed;
            }
            counters.system_calls += 1;
            match connection.send(&self.bytes[ACK_BYTES - self.unsent..], flags) {
                Ok(sent) => {
                    self.unsent -= sent;
                    counters.wire_bytes += sent as u64;
                }
                Err(Errno::AGAIN) => {
                    self.stuck = true;
                    return;
                }
                Err(_) => {
                    self.dead = true;
                    return;
                }
            }
        }
    }
}
