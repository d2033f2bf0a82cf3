//! The destination's end of a data channel.
//!
//! Page bytes go from the socket into guest memory by `recvmsg`; only headers and tables touch
//! buffers of ours. No record is shorter than a lead ([`LEAD_BYTES`]), so the rest of a batch and
//! the lead of the next record are received by one call that waits for all of it, and a batch of
//! up to [`LEAD_RUNS`](stream::LEAD_RUNS) runs costs no other. A sender that has nothing more to send and
//! waits for news sends a request or the end, so that call never waits for longer than the sender does.
//!
//! # When batches are acknowledged
//!
//! When the sender asks for it, and never otherwise: by a flag on a batch, by a request, or by the
//! end of the channel.
//!
//! Acknowledgements are sent without blocking. They are cumulative, so where the sender does not
//! read them the newest replaces all that did not fit, and two sides that both only write cannot
//! get stuck. While one is waiting for room, nothing is received ahead: the sender may be waiting
//! for just that one, and not send a byte more.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use pageferry::transport::stream::{
    self, AckWriter, BatchHeader, HEADER_BYTES, Header, LEAD_BYTES, MAX_HEAD_BYTES, StreamError,
};
use pageferry::transport::{
    ChannelCounters, Interrupt, LandingWatch, PageCounts, PageReceiver, Received, Run, RunKind,
    Ticket, TransportError,
};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::connection::Connection;
use crate::copies::pieces;
use crate::raw_io::GuestVectors;
use crate::wire::Seal;

const RECEIVING: &str = "receive pages";

#[derive(Debug)]
pub(crate) struct TcpPageReceiver {
    connection: Arc<Connection>,
    vectors: GuestVectors,
    /// Header and table, and with a batch of no payload the next lead behind it; the first
    /// `head_filled` bytes are there.
    head: Box<[u8; MAX_HEAD_BYTES + LEAD_BYTES]>,
    head_filled: usize,
    runs: Vec<Run>,
    /// Of pages that are decrypted in this process.
    copy: Vec<u8>,
    watch: LandingWatch,
    landed: Ticket,
    acks: AckWriter,
    /// Whether more follows each record soon, if only a request for an acknowledgement: not where batches are answers.
    reads_ahead: bool,
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
            head: Box::new([0; MAX_HEAD_BYTES + LEAD_BYTES]),
            head_filled: 0,
            runs: Vec::new(),
            copy: Vec::new(),
            watch: LandingWatch::default(),
            landed: 0,
            acks: AckWriter::default(),
            reads_ahead: true,
            ended: false,
            broken: None,
            lost: false,
            counters: ChannelCounters::default(),
        }
    }

    /// Of a lane, whose batches are answers.
    pub(crate) fn of_lane(connection: Arc<Connection>, memory: Arc<GuestMemory>) -> Self {
        let mut receiver = Self::new(connection, memory);
        receiver.reads_ahead = false;
        receiver
    }

    /// The other side sent what no peer sends; it stays said.
    fn malformed(&mut self, error: StreamError) -> TransportError {
        self.broken = Some(error);
        error.into()
    }

    /// Receives bytes of the head up to `end`; fewer only if a signal comes, at least one.
    fn receive_head(&mut self, end: usize) -> Result<(), TransportError> {
        self.counters.system_calls += 1;
        let room = &mut self.head[self.head_filled..end];
        match self.connection.receive(room, RecvFlags::WAITALL) {
            Ok(0) => Err(self.connection.ended(RECEIVING)),
            Ok(received) => {
                self.head_filled += received;
                self.counters.wire_bytes += received as u64;
                Ok(())
            }
            Err(errno) => Err(self.connection.failed(RECEIVING, errno.into())),
        }
    }

    /// How much of the next record is received with the rest of this one.
    fn ahead_bytes(&self) -> usize {
        if self.acks.is_stuck() || !self.reads_ahead { 0 } else { LEAD_BYTES }
    }

    /// Receives the lead of a record, as far as it is not there.
    fn receive_lead(&mut self) -> Result<Header, TransportError> {
        // Rare: the last acknowledgement did not fit. It must get out while we wait.
        while self.head_filled == 0 && self.acks.is_stuck() {
            self.counters.system_calls += 1;
            let ready = self.connection.wait(PollFlags::IN | PollFlags::OUT, None)?;
            self.acknowledge(SendFlags::DONTWAIT);
            if ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                break;
            }
        }
        loop {
            if let Some(header) = self.next_header() {
                return header.map_err(|error| self.malformed(error));
            }
            self.receive_head(LEAD_BYTES)?;
        }
    }

    /// The header of the next record, if its lead is there.
    fn next_header(&self) -> Option<Result<Header, StreamError>> {
        let lead = self.head[..self.head_filled].first_chunk::<LEAD_BYTES>()?;
        Some(stream::decode_header(lead, self.landed + 1))
    }

    /// Receives the table, checks it, and gets the vectors ready for the payload. If there is no
    /// payload, what follows is the next lead: it is received too, as far as it comes.
    fn receive_table(&mut self, header: &BatchHeader) -> Result<PageCounts, TransportError> {
        let end = HEADER_BYTES + header.table_bytes();
        let ahead_bytes = if header.payload_bytes == 0 { self.ahead_bytes() } else { 0 };
        while self.head_filled < end {
            self.receive_head(end + ahead_bytes)?;
        }
        let table = &self.head[HEADER_BYTES..end];
        let layout = self.vectors.memory().layout();
        let counts = stream::decode_table(header, table, layout, &mut self.runs)
            .map_err(|error| self.malformed(error))?;
        self.vectors.load(&self.runs)?;
        self.head.copy_within(end..self.head_filled, 0);
        self.head_filled -= end;
        Ok(counts)
    }

    /// Receives the payload into guest memory, and the next lead behind it as far as it comes.
    fn receive_payload(&mut self) -> Result<(), TransportError> {
        let ahead_bytes = self.ahead_bytes();
        while self.vectors.left_bytes() > 0 {
            self.counters.system_calls += 1;
            let room = &mut self.head[self.head_filled..ahead_bytes];
            match self.vectors.receive_with_head(&self.connection, room) {
                Ok(moved) => {
                    let received = moved.head_bytes + moved.guest_bytes;
                    if received == 0 {
                        return Err(self.connection.ended(RECEIVING));
                    }
                    self.head_filled += moved.head_bytes;
                    self.counters.wire_bytes += received as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.connection.failed(RECEIVING, error)),
            }
        }
        Ok(())
    }

    /// The same, where it is decrypted in this process.
    fn receive_by_copies(&mut self) -> Result<(), TransportError> {
        for piece in pieces(&self.runs) {
            let memory = self.vectors.memory();
            self.copy.resize(memory.span(piece)?.len_bytes, 0);
            let mut filled = 0;
            while filled < self.copy.len() {
                self.counters.system_calls += 1;
                match self.connection.receive(&mut self.copy[filled..], RecvFlags::empty()) {
                    Ok(0) => return Err(self.connection.ended(RECEIVING)),
                    Ok(received) => {
                        filled += received;
                        self.counters.wire_bytes += received as u64;
                    }
                    Err(errno) => return Err(self.connection.failed(RECEIVING, errno.into())),
                }
            }
            memory.copy_in(piece, &self.copy)?;
            self.counters.user_copied_bytes += self.copy.len() as u64;
        }
        Ok(())
    }

    /// Says what has landed, if that is news and there is room.
    fn acknowledge(&mut self, flags: SendFlags) {
        while self.acks.is_due(self.landed) {
            self.counters.system_calls += 1;
            match self.connection.send(self.acks.next(self.landed), flags) {
                Ok(sent) => {
                    self.acks.sent(sent);
                    self.counters.wire_bytes += sent as u64;
                }
                Err(Errno::AGAIN) => return self.acks.no_room(),
                Err(_) => return self.acks.nobody(),
            }
        }
    }

    fn place(&mut self, header: &BatchHeader) -> Result<Received, TransportError> {
        let counts = self.receive_table(header)?;
        // Zeroes first: meanwhile the kernel receives the payload. A batch names no page twice.
        for run in self.runs.iter().filter(|run| run.kind == RunKind::Zero) {
            self.vectors.memory().fill_zero_while(run.range, || self.connection.check())?;
        }
        if self.connection.seal() == Seal::Process {
            self.receive_by_copies()?;
        } else {
            self.receive_payload()?;
        }
        self.watch.landed(&self.runs);
        self.landed = header.ticket;
        // A request behind it is answered now, not when the caller comes back.
        if header.ack || matches!(self.next_header(), Some(Ok(Header::AckRequest))) {
            self.acknowledge(SendFlags::DONTWAIT);
        }
        Ok(Received::Batch(counts))
    }

    fn receive_next(&mut self) -> Result<Received, TransportError> {
        loop {
            match self.receive_lead()? {
                Header::Batch(header) => return self.place(&header),
                Header::End => return Ok(self.end()),
                Header::AckRequest => {
                    self.head_filled = 0;
                    self.acknowledge(SendFlags::DONTWAIT);
                }
            }
        }
    }

    /// The source ended the channel: acknowledge all, and end our direction too.
    fn end(&mut self) -> Received {
        self.acknowledge(SendFlags::empty());
        // Should it fail, nobody waits for that any more.
        let _ = self.connection.flush(None);
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
            self.connection.break_off();
        }
        result
    }

    fn watch_landings(&mut self, watch: LandingWatch) -> Result<(), TransportError> {
        self.watch = watch;
        Ok(())
    }

    fn counters(&self) -> ChannelCounters {
        self.counters
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.connection.interrupter()
    }
}

impl Drop for TcpPageReceiver {
    fn drop(&mut self) {
        if !self.ended {
            self.connection.break_off();
        }
    }
}
