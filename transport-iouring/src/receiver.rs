//! The destination's end of a data channel.
//!
//! One request receives the pages of a batch, straight into guest memory, and the lead of the
//! next record behind them: no record is shorter than a lead, so that never holds page bytes. The
//! kernel goes on with it until all is there, so a batch of one run costs one system call,
//! however long it is. The acknowledgement, if the batch asks for one, is a request behind it.
//!
//! The kernel has no receive into registered buffers that waits for all bytes
//! (`IORING_OP_READ_FIXED` returns with what is there, `IORING_OP_RECV` takes no such buffers), so
//! the requests name addresses. What registration is good for here is that all pages are there
//! and stay: the kernel finds each without a fault.
//!
//! Acknowledgements are sent without waiting for room. They are cumulative, so where the sender
//! does not read them the newest replaces all that did not fit, and two sides that both only
//! write cannot get stuck.

use std::io;
use std::sync::Arc;

use pageferry::memory::GuestMemory;
use pageferry::transport::stream::{
    self, AckWriter, BatchHeader, HEADER_BYTES, Header, LEAD_BYTES, MAX_HEAD_BYTES, StreamError,
};
use pageferry::transport::{
    ChannelCounters, Interrupt, LandingWatch, PageCounts, PageReceiver, Received, Run, RunKind,
    Ticket, TransportError,
};
use pageferry_tcp::DataSocket;
use rustix::event::{PollFd, PollFlags, poll};

use crate::chain::{Chain, Until};
use crate::ring::Ring;
use crate::vectors::Incoming;

const RECEIVING: &str = "receive pages";

#[derive(Debug)]
pub(crate) struct IoUringPageReceiver {
    ring: Ring,
    socket: DataSocket,
    incoming: Incoming,
    /// Header and table; the first `head_filled` bytes are there.
    head: Box<[u8; MAX_HEAD_BYTES]>,
    head_filled: usize,
    runs: Vec<Run>,
    watch: LandingWatch,
    landed: Ticket,
    acks: AckWriter,
    ended: bool,
    broken: Option<StreamError>,
    /// Failed, perhaps in the middle of a batch: what comes next would be misread.
    lost: bool,
    wire_bytes: u64,
    /// Calls past the ring.
    system_calls: u64,
}

impl IoUringPageReceiver {
    pub(crate) fn new(socket: DataSocket, memory: Arc<GuestMemory>, ring: Ring) -> Self {
        Self {
            ring,
            socket,
            incoming: Incoming::new(memory),
            head: Box::new([0; MAX_HEAD_BYTES]),
            head_filled: 0,
            runs: Vec::new(),
            watch: LandingWatch::default(),
            landed: 0,
            acks: AckWriter::default(),
            ended: false,
            broken: None,
            lost: false,
            wire_bytes: 0,
            system_calls: 0,
        }
    }

    /// The other side sent what no peer sends; it stays said.
    fn malformed(&mut self, error: StreamError) -> TransportError {
        self.broken = Some(error);
        error.into()
    }

    /// What a receive came to: bytes, or nothing if it is to be repeated.
    fn received(&mut self, result: i32) -> Result<usize, TransportError> {
        match usize::try_from(result) {
            Ok(0) => Err(self.socket.ended(RECEIVING)),
            Ok(bytes) => {
                self.wire_bytes += bytes as u64;
                Ok(bytes)
            }
            // The thread that began it is gone, or a signal came: nothing was received.
            Err(_) if [libc::EINTR, libc::EAGAIN, libc::ECANCELED].contains(&-result) => Ok(0),
            Err(_) => Err(self.socket.failed(RECEIVING, io::Error::from_raw_os_error(-result))),
        }
    }

    /// Receives the head up to `end`.
    fn receive_head(&mut self, end: usize) -> Result<(), TransportError> {
        while self.head_filled < end {
            self.socket.check()?;
            let mut chain = Chain::new();
            chain.receive(&mut self.head[self.head_filled..end], Until::All);
            let result = self.ring.run(&self.socket, &mut chain);
            let result = result.map_err(|cause| self.socket.failed(RECEIVING, cause))?[0];
            self.head_filled += self.received(result)?;
        }
        Ok(())
    }

    fn receive_lead(&mut self) -> Result<Header, TransportError> {
        // Rare: the last acknowledgement did not fit. It must get out while we wait.
        while self.head_filled == 0 && self.acks.is_stuck() {
            let events = PollFlags::IN | PollFlags::OUT;
            let mut polled = [PollFd::new(&self.socket, events)];
            self.system_calls += 1;
            match poll(&mut polled, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(self.socket.failed(RECEIVING, errno.into())),
            }
            let ready = polled[0].revents();
            self.acknowledge()?;
            if ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                break;
            }
        }
        self.receive_head(LEAD_BYTES)?;
        self.decode_lead().map_err(|error| self.malformed(error))
    }

    fn decode_lead(&self) -> Result<Header, StreamError> {
        let mut lead = [0; LEAD_BYTES];
        lead.copy_from_slice(&self.head[..LEAD_BYTES]);
        stream::decode_header(&lead, self.landed + 1)
    }

    /// Receives the table, checks it, and gets ready for the pages.
    fn receive_table(&mut self, header: &BatchHeader) -> Result<PageCounts, TransportError> {
        let end = HEADER_BYTES + header.table_bytes();
        self.receive_head(end)?;
        let table = &self.head[HEADER_BYTES..end];
        let layout = self.incoming.memory().layout();
        let counts = stream::decode_table(header, table, layout, &mut self.runs)
            .map_err(|error| self.malformed(error))?;
        self.incoming.load(&self.runs)?;
        Ok(counts)
    }

    /// Receives the pages and the next lead, and acknowledges `landed` behind them if that is
    /// asked for.
    fn receive_pages(&mut self, landed: Option<Ticket>) -> Result<(), TransportError> {
        self.head_filled = 0;
        while self.incoming.left_bytes() > 0 {
            self.socket.check()?;
            let mut chain = Chain::new();
            let room = &mut self.head[self.head_filled..LEAD_BYTES];
            self.incoming.request(room, &mut chain);
            // Half an acknowledgement that is still to come goes first.
            let wanted = landed.filter(|_| self.acks.is_between());
            if let Some(landed) = wanted {
                chain.then().send_now(self.acks.next(landed));
            }
            let results = self.ring.run(&self.socket, &mut chain);
            let results = results.map_err(|cause| self.socket.failed(RECEIVING, cause))?;
            let (received, told) = (results[0], results.get(1).copied());
            if let Some(result) = told {
                if result == -libc::ECANCELED {
                    // Not all came, so it was not sent.
                    self.acks.withdraw();
                } else {
                    self.told(result);
                }
            }
            let bytes = match self.received(received) {
                Ok(bytes) => bytes,
                Err(error) => {
                    self.incoming.advance(0);
                    return Err(error);
                }
            };
            self.head_filled += self.incoming.advance(bytes);
        }
        Ok(())
    }

    /// What the request for an acknowledgement came to.
    fn told(&mut self, result: i32) {
        match usize::try_from(result) {
            Ok(sent) => {
                self.acks.sent(sent);
                self.wire_bytes += sent as u64;
            }
            Err(_) if [libc::EAGAIN, libc::EINTR, libc::ECANCELED].contains(&-result) => {
                self.acks.no_room();
            }
            Err(_) => self.acks.nobody(),
        }
    }

    /// Says what has landed, if that is news and there is room.
    fn acknowledge(&mut self) -> Result<(), TransportError> {
        while self.acks.is_due(self.landed) {
            let mut chain = Chain::new();
            chain.send_now(self.acks.next(self.landed));
            let result = self.ring.run(&self.socket, &mut chain);
            let result = result.map_err(|cause| self.socket.failed(RECEIVING, cause))?[0];
            self.told(result);
            if self.acks.is_stuck() {
                break;
            }
        }
        Ok(())
    }

    fn place(&mut self, header: &BatchHeader) -> Result<Received, TransportError> {
        let counts = self.receive_table(header)?;
        // Zeroes first: meanwhile the kernel receives the payload. A batch names no page twice.
        for run in self.runs.iter().filter(|run| run.kind == RunKind::Zero) {
            self.incoming.memory().fill_zero_while(run.range, || self.socket.check())?;
        }
        // Who is told of it is told before the source is.
        let at_once = header.ack && !self.watch.is_set();
        self.receive_pages(at_once.then_some(header.ticket))?;
        self.watch.landed(&self.runs);
        self.landed = header.ticket;
        // A request that came behind the pages is answered before the caller is told of them.
        let asked =
            self.head_filled == LEAD_BYTES && matches!(self.decode_lead(), Ok(Header::AckRequest));
        if asked {
            self.head_filled = 0;
        }
        if asked || header.ack {
            self.acknowledge()?;
        }
        Ok(Received::Batch(counts))
    }

    fn receive_next(&mut self) -> Result<Received, TransportError> {
        loop {
            match self.receive_lead()? {
                Header::Batch(header) => return self.place(&header),
                Header::End => return self.end(),
                Header::AckRequest => {
                    self.head_filled = 0;
                    self.acknowledge()?;
                }
            }
        }
    }

    /// The source ended the channel: acknowledge all, and end our direction too.
    fn end(&mut self) -> Result<Received, TransportError> {
        self.acknowledge()?;
        self.socket.finish();
        self.ended = true;
        Ok(Received::End)
    }
}

impl PageReceiver for IoUringPageReceiver {
    fn receive(&mut self) -> Result<Received, TransportError> {
        self.socket.check()?;
        if let Some(error) = self.broken {
            return Err(error.into());
        }
        if self.ended {
            return Ok(Received::End);
        }
        if self.lost {
            return Err(self.socket.ended(RECEIVING));
        }
        let result = self.receive_next();
        if result.is_err() {
            self.lost = true;
            self.socket.break_off();
        }
        result
    }

    fn watch_landings(&mut self, watch: LandingWatch) -> Result<(), TransportError> {
        self.watch = watch;
        Ok(())
    }

    fn counters(&self) -> ChannelCounters {
        ChannelCounters {
            wire_bytes: self.wire_bytes,
            system_calls: self.system_calls + self.ring.system_calls(),
            ..ChannelCounters::default()
        }
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.socket.interrupter()
    }
}

impl Drop for IoUringPageReceiver {
    fn drop(&mut self) {
        if !self.ended {
            self.socket.break_off();
        }
    }
}
