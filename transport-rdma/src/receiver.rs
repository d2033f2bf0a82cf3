//! The destination's end of a connection for pages. Pages come by themselves; it only makes those
//! zero that are mentioned, tells the source what it has seen, and registers guest memory ahead of
//! it, where that was left to it.

use std::sync::Arc;
use std::time::Instant;

use pageferry::memory::PageRange;
use pageferry::transport::{
    ChannelCounters, Interrupt, PageCounts, PageReceiver, Received, Registration, TransportError,
};

use crate::announce::Announcer;
use crate::dial::LINGER;
use crate::memory::Registered;
use crate::pipe::{Inlet, Message};
use crate::zeros::{self, Said};

/// The destination's end of a data channel.
#[derive(Debug)]
pub(crate) struct RdmaPageReceiver {
    inlet: Inlet,
    /// After the queue pair: nothing is written any more when it goes.
    registered: Arc<Registered>,
    announcer: Arc<Announcer>,
    /// What this thread registered.
    cost: Registration,
    wire_bytes: u64,
    ended: bool,
}

impl RdmaPageReceiver {
    pub(crate) fn new(
        inlet: Inlet,
        registered: Arc<Registered>,
        announcer: Arc<Announcer>,
    ) -> Self {
        let cost = Registration::default();
        Self { inlet, registered, announcer, cost, wire_bytes: 0, ended: false }
    }

    /// The next message. What came goes before what is to be registered.
    fn next(&mut self) -> Result<Option<Message>, TransportError> {
        if let Some(message) = self.inlet.next(Some(Instant::now()))? {
            return Ok(Some(message));
        }
        let until = self.announcer.go_ahead(&mut self.cost)?;
        self.inlet.next(until)
    }

    /// Makes pages zero. All are checked before a byte is written.
    fn zero(&self, ranges: &[PageRange]) -> Result<PageCounts, TransportError> {
        let memory = &self.registered.memory;
        let outside = TransportError::Violation("a mention of pages outside guest memory");
        if ranges.iter().any(|range| memory.span(*range).is_err()) {
            return Err(outside);
        }
        for range in ranges {
            memory.fill_zero_while(*range, || self.inlet.connection.check())?;
        }
        let zero = ranges.iter().map(|range| u64::from(range.pages)).sum();
        Ok(PageCounts { zero, ..PageCounts::default() })
    }
}

impl PageReceiver for RdmaPageReceiver {
    fn receive(&mut self) -> Result<Received, TransportError> {
        self.inlet.connection.check()?;
        while !self.ended {
            match self.next()? {
                None => {}
                // All that was written before it is in memory: the source wants to know.
                Some(Message::Mark) => self.inlet.acknowledge()?,
                Some(Message::Bytes(message)) => {
                    self.wire_bytes += message.len() as u64;
                    match zeros::decode(&message)? {
                        Said::End => self.ended = true,
                        Said::Zeros(ranges) => return self.zero(&ranges).map(Received::Batch),
                    }
                }
            }
        }
        self.inlet.acknowledge()?;
        // The source may be gone by now: it has ended the channel, and needs no answer.
        let _ = self.inlet.flush(LINGER);
        Ok(Received::End)
    }

    fn counters(&self) -> ChannelCounters {
        ChannelCounters {
            wire_bytes: self.wire_bytes,
            system_calls: self.inlet.system_calls(),
            work_requests: self.inlet.connection.work_requests(),
            registered: self.cost,
            ..ChannelCounters::default()
        }
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inlet.connection.interrupter()
    }
}
