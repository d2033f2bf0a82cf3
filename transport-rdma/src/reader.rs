//! One-sided reads: the destination fetches pages of the source by itself.

use std::sync::Arc;

use pageferry::memory::PageRange;
use pageferry::transport::{ChannelCounters, PageReader, ReadGrant, Registration, TransportError};

use crate::memory::{Registered, transfers};
use crate::pipe::{Inlet, Outlet};
use crate::table::RemoteTable;

/// The source's end: a queue pair that lets the other side read.
#[derive(Debug)]
pub(crate) struct RdmaReadGrant {
    _outlet: Outlet,
    /// After the queue pair: nothing is read any more when it goes.
    _registered: Arc<Registered>,
}

impl RdmaReadGrant {
    pub(crate) fn new(outlet: Outlet, registered: Arc<Registered>) -> Self {
        Self { _outlet: outlet, _registered: registered }
    }
}

impl ReadGrant for RdmaReadGrant {}

/// The destination's end.
#[derive(Debug)]
pub(crate) struct RdmaPageReader {
    inlet: Inlet,
    /// After the queue pair: nothing is written any more when it goes.
    here: Arc<Registered>,
    there: RemoteTable,
    slice_bytes: u64,
    registered: Registration,
    wire_bytes: u64,
}

impl RdmaPageReader {
    pub(crate) fn new(
        inlet: Inlet,
        here: Arc<Registered>,
        there: RemoteTable,
        slice_bytes: u64,
    ) -> Self {
        let registered = Registration::default();
        Self { inlet, here, there, slice_bytes, registered, wire_bytes: 0 }
    }
}

impl PageReader for RdmaPageReader {
    fn read(&mut self, ranges: &[PageRange]) -> Result<(), TransportError> {
        self.inlet.connection.check()?;
        ranges.iter().try_for_each(|range| self.here.memory.span(*range).map(drop))?;
        let mut reads = Vec::new();
        let mut bytes = 0;
        for range in ranges {
            let there = |region, page| self.there.known(region, page);
            let (memory, cost) = (&self.here, &mut self.registered);
            let here = |region, page| memory.piece(region, page, cost);
            bytes += transfers(*range, here, there, self.slice_bytes, &mut reads)?;
        }
        self.inlet.read(&reads)?;
        self.wire_bytes += bytes;
        Ok(())
    }

    fn counters(&self) -> ChannelCounters {
        ChannelCounters {
            wire_bytes: self.wire_bytes,
            system_calls: self.inlet.system_calls(),
            work_requests: self.inlet.connection.work_requests(),
            registered: self.registered,
            ..ChannelCounters::default()
        }
    }
}
