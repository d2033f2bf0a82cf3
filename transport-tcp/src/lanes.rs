//! Lanes for reads: the destination asks on one direction of a connection, and is answered by batches on the other.

use std::sync::Arc;

use pageferry::memory::{GuestMemory, PageRange};
use pageferry::transport::reads::{answer, check_request};
use pageferry::transport::stream::{self, HEADER_BYTES, LEAD_BYTES, MAX_HEAD_BYTES, Request};
use pageferry::transport::{
    ChannelCounters, Interrupt, PageRequests, PageSender, PageServer, Run, Ticket, TransportError,
};
use rustix::net::{RecvFlags, SendFlags};

use crate::CAPABILITIES;
use crate::connection::Connection;
use crate::options::TcpOptions;
use crate::sender::TcpPageSender;

const ASKING: &str = "ask for pages";
const SERVING: &str = "hear what is read";

/// The destination's half that asks.
#[derive(Debug)]
pub(crate) struct TcpPageRequests {
    connection: Arc<Connection>,
    memory: Arc<GuestMemory>,
    asked: Ticket,
    record: Vec<u8>,
    finished: bool,
    counters: ChannelCounters,
}

impl TcpPageRequests {
    pub(crate) fn new(connection: Arc<Connection>, memory: Arc<GuestMemory>) -> Self {
        let (record, counters) = (Vec::new(), ChannelCounters::default());
        Self { connection, memory, asked: 0, record, finished: false, counters }
    }

    /// Sends the record.
    fn say(&mut self) -> Result<(), TransportError> {
        let mut left = &self.record[..];
        while !left.is_empty() {
            self.counters.system_calls += 1;
            match self.connection.send(left, SendFlags::empty()) {
                Ok(sent) => {
                    left = &left[sent..];
                    self.counters.wire_bytes += sent as u64;
                }
                Err(errno) => return Err(self.connection.failed(ASKING, errno.into())),
            }
        }
        let flushed = self.connection.flush(None);
        flushed.map(drop).map_err(|errno| self.connection.failed(ASKING, errno.into()))
    }

    fn check(&self) -> Result<(), TransportError> {
        self.connection.check()?;
        if self.finished {
            return Err(TransportError::OutOfOrder("the lane is finished"));
        }
        Ok(())
    }
}

impl PageRequests for TcpPageRequests {
    fn request(&mut self, ranges: &[PageRange]) -> Result<Ticket, TransportError> {
        self.check()?;
        let runs = check_request(&CAPABILITIES, &self.memory, ranges)?;
        let ticket = self.asked + 1;
        stream::encode_read(ticket, &runs, &mut self.record);
        self.connection.check_key(ASKING)?;
        self.say()?;
        self.asked = ticket;
        Ok(ticket)
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        self.check()?;
        stream::encode_end(&mut self.record);
        self.say()?;
        self.finished = true;
        Ok(())
    }

    fn counters(&self) -> ChannelCounters {
        self.counters
    }
}

impl Drop for TcpPageRequests {
    fn drop(&mut self) {
        if !self.finished {
            self.connection.break_off();
        }
    }
}

/// The source's end.
#[derive(Debug)]
pub(crate) struct TcpPageServer {
    connection: Arc<Connection>,
    memory: Arc<GuestMemory>,
    answers: TcpPageSender,
    /// Header and table of a request; the first `filled` bytes are there.
    head: Box<[u8; MAX_HEAD_BYTES]>,
    filled: usize,
    asked: Ticket,
    runs: Vec<Run>,
    counters: ChannelCounters,
}

impl TcpPageServer {
    pub(crate) fn new(
        connection: Arc<Connection>,
        memory: &Arc<GuestMemory>,
        options: &TcpOptions,
    ) -> Result<Self, TransportError> {
        let answers = TcpPageSender::of_lane(Arc::clone(&connection), Arc::clone(memory), options)?;
        Ok(Self {
            connection,
            memory: Arc::clone(memory),
            answers,
            head: Box::new([0; MAX_HEAD_BYTES]),
            filled: 0,
            asked: 0,
            runs: Vec::new(),
            counters: ChannelCounters::default(),
        })
    }

    /// Receives bytes of a request until so many are there.
    fn receive(&mut self, end: usize) -> Result<(), TransportError> {
        while self.filled < end {
            self.counters.system_calls += 1;
            let room = &mut self.head[self.filled..end];
            match self.connection.receive(room, RecvFlags::WAITALL) {
                Ok(0) => return Err(self.connection.ended(SERVING)),
                Ok(received) => {
                    self.filled += received;
                    self.counters.wire_bytes += received as u64;
                }
                Err(errno) => return Err(self.connection.failed(SERVING, errno.into())),
            }
        }
        Ok(())
    }

    /// Hears one request; false where nothing more is asked for.
    fn hear(&mut self) -> Result<bool, TransportError> {
        self.filled = 0;
        self.receive(LEAD_BYTES)?;
        // There are that many.
        let lead = self.head.first_chunk::<LEAD_BYTES>().unwrap_or(&[0; LEAD_BYTES]);
        let header = match stream::decode_request(lead, self.asked + 1)? {
            Request::Read(header) => header,
            Request::End => return Ok(false),
        };
        let end = HEADER_BYTES + header.table_bytes();
        self.receive(end)?;
        let table = &self.head[HEADER_BYTES..end];
        let (layout, most) = (self.memory.layout(), CAPABILITIES.max_batch_bytes);
        stream::decode_asked(&header, table, layout, most, &mut self.runs)?;
        self.asked += 1;
        Ok(true)
    }

    fn serve_all(&mut self) -> Result<(), TransportError> {
        self.connection.check()?;
        while self.hear()? {
            let runs = answer(&self.memory, &self.runs, CAPABILITIES.max_batch_runs)?;
            self.answers.send(&runs)?;
        }
        self.answers.finish()
    }
}

impl PageServer for TcpPageServer {
    fn serve(&mut self) -> Result<(), TransportError> {
        self.serve_all().inspect_err(|_| self.connection.break_off())
    }

    fn counters(&self) -> ChannelCounters {
        let mut counters = self.answers.counters();
        counters.add(&self.counters);
        counters
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.connection.interrupter()
    }
}
