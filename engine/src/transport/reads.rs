//! Reads: after the guest has changed hands the destination fetches what it misses, and the source sends nothing by itself.
//!
//! Each lane has a connection of its own, so that what is urgent on one is not behind what is not on another.

use std::fmt;
use std::sync::Arc;

use super::{
    Capabilities, ChannelCounters, Interrupt, PageReceiver, Run, RunKind, Ticket, TransportError,
};
use crate::pages::memory::{GuestMemory, OutOfRange, PageRange};

/// Most lanes of a link: as many as [data channels](crate::MAX_CHANNELS).
pub const MAX_LANES: u16 = crate::config::MAX_CHANNELS;

/// The destination's end of a lane, cut into its two directions so that each can have its thread: who asks is never
/// kept by what has been asked for.
pub struct ReadLane {
    /// Asks for pages.
    pub requests: Box<dyn PageRequests>,
    /// Where they land: a batch for each request, in order; and the end, once that was asked for.
    pub landings: Box<dyn PageReceiver>,
}

impl fmt::Debug for ReadLane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadLane").finish_non_exhaustive()
    }
}

/// Asks for pages of the source's memory; used by one thread at a time.
pub trait PageRequests: Send {
    /// Asks for pages, which land in the same place of the memory that the lane was opened for, as they are when the
    /// source is asked. Returns when that is asked for; may wait for room, which whoever takes the landings makes. The
    /// number is that of the request on its lane, from 1.
    ///
    /// `ranges` is not empty, at most [`Capabilities::max_batch_runs`] long and holds at most
    /// [`Capabilities::max_batch_bytes`]. No range is empty, and no page in two.
    fn request(&mut self, ranges: &[PageRange]) -> Result<Ticket, TransportError>;

    /// Ends the lane in order: what was asked for lands still.
    fn finish(&mut self) -> Result<(), TransportError>;

    /// What this half has done.
    fn counters(&self) -> ChannelCounters;
}

/// The source's end of a lane; used by one thread at a time.
pub trait PageServer: Send {
    /// Serves what the destination asks for, until that ends the lane. One-sided transports only wait for that, and may
    /// not know whether it was in order: what was read is said on the control channel.
    fn serve(&mut self) -> Result<(), TransportError>;

    /// What this lane has done.
    fn counters(&self) -> ChannelCounters;

    /// A handle that ends this lane at this end, and no other.
    fn interrupter(&self) -> Arc<dyn Interrupt>;
}

/// Refuses a request that is over the limits, or outside of memory.
pub fn check_request(
    capabilities: &Capabilities,
    memory: &GuestMemory,
    ranges: &[PageRange],
) -> Result<Vec<Run>, TransportError> {
    if ranges.is_empty() {
        let cause = std::io::Error::new(std::io::ErrorKind::InvalidInput, "the request is empty");
        return Err(TransportError::Io { operation: "ask for pages", cause });
    }
    let runs: Vec<_> =
        ranges.iter().map(|range| Run { range: *range, kind: RunKind::Data }).collect();
    capabilities.check(&runs)?;
    ranges.iter().try_for_each(|range| memory.span(*range).map(drop))?;
    Ok(runs)
}

/// What a request is answered with: its pages in order, those that are zero as such. As they were asked for where that
/// would be more than so many runs.
pub fn answer(memory: &GuestMemory, asked: &[Run], most: usize) -> Result<Vec<Run>, OutOfRange> {
    let mut runs: Vec<Run> = Vec::new();
    for Run { range, .. } in asked {
        for page in range.first_page..range.first_page + u64::from(range.pages) {
            let is_zero = memory.is_zero(range.region, page)?;
            add(&mut runs, range.region, page, if is_zero { RunKind::Zero } else { RunKind::Data });
            if runs.len() > most {
                return Ok(asked.to_vec());
            }
        }
    }
    Ok(runs)
}

/// Adds a page to runs, to the last one if it goes on there.
fn add(runs: &mut Vec<Run>, region: u16, page: u64, kind: RunKind) {
    if let Some(Run { range, kind: before }) = runs.last_mut()
        && (*before, range.region) == (kind, region)
        && range.first_page + u64::from(range.pages) == page
    {
        range.pages += 1;
        return;
    }
    runs.push(Run { range: PageRange { region, first_page: page, pages: 1 }, kind });
}

#[cfg(all(test, feature = "test-support", not(loom)))]
mod tests {
    use super::*;
    use crate::testing::TestMemory;

    fn run(first_page: u64, pages: u32, kind: RunKind) -> Run {
        Run { range: PageRange { region: 0, first_page, pages }, kind }
    }

    #[test]
    fn an_answer_has_zero_pages_apart_unless_that_is_too_many_runs() {
        let memory = TestMemory::new(&[16]);
        (1..3).for_each(|page| memory.fill_page(0, page, 7));
        memory.fill_page(0, 5, 7);
        let asked = [run(0, 4, RunKind::Data), run(5, 1, RunKind::Data)];
        let zero = RunKind::Zero;
        let expected =
            [run(0, 1, zero), run(1, 2, RunKind::Data), run(3, 1, zero), run(5, 1, RunKind::Data)];
        assert_eq!(answer(memory.memory(), &asked, 4).unwrap(), expected);
        assert_eq!(answer(memory.memory(), &asked, 3).unwrap(), asked);
        answer(memory.memory(), &[run(15, 2, RunKind::Data)], 9).unwrap_err();
    }
}
