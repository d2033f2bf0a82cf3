//! Lanes: requests one way, and the batches that answer them the other.

use std::sync::Arc;

use super::half::Half;
use super::pages::Pages;
use super::{ByteStream, CAPABILITIES};
use crate::pages::memory::{GuestMemory, PageRange};
use crate::transport::reads::{answer, check_request};
use crate::transport::stream::{self, HEADER_BYTES, LEAD_BYTES, Request};
use crate::transport::{
    ChannelCounters, Interrupt, PageRequests, PageSender, PageServer, Ticket, TransportError,
};

/// The destination's half that asks.
pub(super) struct Requests<S> {
    half: Half<S>,
    memory: Arc<GuestMemory>,
    asked: Ticket,
    record: Vec<u8>,
}

impl<S> Requests<S> {
    pub(super) fn new(half: Half<S>, memory: Arc<GuestMemory>) -> Self {
        Self { half, memory, asked: 0, record: Vec::new() }
    }
}

impl<S: ByteStream> PageRequests for Requests<S> {
    fn request(&mut self, ranges: &[PageRange]) -> Result<Ticket, TransportError> {
        let runs = check_request(&CAPABILITIES, &self.memory, ranges)?;
        let ticket = self.asked + 1;
        stream::encode_read(ticket, &runs, &mut self.record);
        self.half.write(&self.record)?;
        self.asked = ticket;
        Ok(ticket)
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        stream::encode_end(&mut self.record);
        self.half.write(&self.record)
    }

    fn counters(&self) -> ChannelCounters {
        self.half.counters
    }
}

/// The source's end.
pub(super) struct Server<S> {
    requests: Half<S>,
    answers: Pages<S>,
    memory: Arc<GuestMemory>,
    asked: Ticket,
}

impl<S> Server<S> {
    pub(super) fn new(half: Half<S>, memory: Arc<GuestMemory>) -> Self {
        let answers = Pages::of_lane(half.clone(), Arc::clone(&memory));
        Self { requests: half, answers, memory, asked: 0 }
    }
}

impl<S: ByteStream> PageServer for Server<S> {
    fn serve(&mut self) -> Result<(), TransportError> {
        let mut asked = Vec::new();
        loop {
            let due = self.asked + 1;
            self.requests.fill(LEAD_BYTES, None)?;
            let mut lead = [0; LEAD_BYTES];
            lead.copy_from_slice(self.requests.held());
            let header = match stream::decode_request(&lead, due)? {
                Request::Read(header) => header,
                Request::End => return self.answers.finish(),
            };
            self.requests.fill(HEADER_BYTES + header.table_bytes(), None)?;
            let table = &self.requests.held()[HEADER_BYTES..];
            let (layout, most) = (self.memory.layout(), CAPABILITIES.max_batch_bytes);
            stream::decode_asked(&header, table, layout, most, &mut asked)?;
            self.requests.clear();
            let runs = answer(&self.memory, &asked, CAPABILITIES.max_batch_runs)?;
            self.answers.send(&runs)?;
            self.asked = due;
        }
    }

    fn counters(&self) -> ChannelCounters {
        let mut counters = PageSender::counters(&self.answers);
        counters.add(&self.requests.counters);
        counters
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.requests.stop) as Arc<dyn Interrupt>
    }
}
