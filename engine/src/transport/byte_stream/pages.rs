//! Data channels: batches one way, acknowledgements the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::half::Half;
use super::{ByteStream, CAPABILITIES};
use crate::pages::memory::{GuestMemory, PageRange};
use crate::transport::stream::{self, ACK_BYTES, AckSchedule, HEADER_BYTES, Header, LEAD_BYTES};
use crate::transport::{
    ChannelCounters, Interrupt, LandingWatch, PageReceiver, PageSender, Received, Run, RunKind,
    Ticket, TransportError, Watermarks,
};

/// Page bytes are placed in pieces of so many pages, however long a run the other side announces:
/// what it can have this side allocate is a frame ([`MAX_FRAME_BYTES`](crate::transport::MAX_FRAME_BYTES)).
const PIECE_PAGES: u32 = 64;

/// One end of a data channel.
pub(super) struct Pages<S> {
    half: Half<S>,
    memory: Arc<GuestMemory>,
    user_copied_bytes: u64,
    /// At the source. At the destination `landed` counts what was placed, and `released` what was
    /// acknowledged.
    marks: Watermarks,
    /// At the source.
    acks: AckSchedule,
    scratch: Vec<u8>,
    /// At the destination.
    watch: LandingWatch,
}

impl<S> Pages<S> {
    pub(super) fn new(half: Half<S>, memory: Arc<GuestMemory>) -> Self {
        Self {
            half,
            memory,
            user_copied_bytes: 0,
            marks: Watermarks::default(),
            acks: AckSchedule::default(),
            scratch: Vec::new(),
            watch: LandingWatch::default(),
        }
    }

    /// For a lane, whose batches are answers.
    pub(super) fn of_lane(half: Half<S>, memory: Arc<GuestMemory>) -> Self {
        Self { acks: AckSchedule::never(), ..Self::new(half, memory) }
    }

    fn all_counters(&self) -> ChannelCounters {
        ChannelCounters { user_copied_bytes: self.user_copied_bytes, ..self.half.counters }
    }
}

impl<S: ByteStream> Pages<S> {
    /// At the destination: says what has landed, if that is news.
    fn acknowledge(&mut self) -> Result<(), TransportError> {
        if self.marks.released < self.marks.landed {
            self.marks.released = self.marks.landed;
            self.half.write(&stream::encode_ack(self.marks.landed))?;
        }
        Ok(())
    }
}

impl<S: ByteStream> PageSender for Pages<S> {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        CAPABILITIES.check(runs)?;
        runs.iter().try_for_each(|run| self.memory.span(run.range).map(drop))?;
        let ticket = self.marks.released + 1;
        let ask = self.acks.flag_next(ticket, runs);
        stream::encode_batch(ticket, runs, ask, &mut self.scratch);
        self.half.write(&self.scratch)?;
        for run in runs.iter().filter(|run| run.kind == RunKind::Data) {
            self.memory.copy_out(run.range, &mut self.scratch)?;
            self.user_copied_bytes += run.payload_bytes();
            self.half.write(&self.scratch)?;
        }
        self.marks.released = ticket;
        Ok(ticket)
    }

    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
        let outstanding = self.marks.landed < self.marks.released;
        let Some(wait) = wait.filter(|_| outstanding) else {
            // A look without waiting is not in every stream's power: acknowledgements wait.
            return self.half.check("", Ok(self.marks));
        };
        if !self.acks.expects_more(self.marks.landed) {
            stream::encode_ack_request(&mut self.scratch);
            self.half.write(&self.scratch)?;
            self.acks.requested(self.marks.released);
        }
        if self.half.fill(ACK_BYTES, Instant::now().checked_add(wait))? {
            let ack = self.half.take();
            self.marks.landed = stream::decode_ack(ack, self.marks.released, self.marks.landed)?;
        }
        Ok(self.marks)
    }

    fn counters(&self) -> ChannelCounters {
        self.all_counters()
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        stream::encode_end(&mut self.scratch);
        self.half.write(&self.scratch)
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.half.stop) as Arc<dyn Interrupt>
    }
}

impl<S: ByteStream> PageReceiver for Pages<S> {
    fn receive(&mut self) -> Result<Received, TransportError> {
        let due = self.marks.landed + 1;
        let header = loop {
            self.half.fill(LEAD_BYTES, None)?;
            let mut lead = [0; LEAD_BYTES];
            lead.copy_from_slice(self.half.held());
            match stream::decode_header(&lead, due)? {
                Header::Batch(header) => break header,
                Header::End => return Ok(Received::End),
                Header::AckRequest => {
                    self.half.clear();
                    self.acknowledge()?;
                }
            }
        };
        self.half.fill(HEADER_BYTES + header.table_bytes(), None)?;
        let mut runs = Vec::new();
        let table = &self.half.held()[HEADER_BYTES..];
        let counts = stream::decode_table(&header, table, self.memory.layout(), &mut runs)?;
        self.half.clear();
        for run in &runs {
            if run.kind == RunKind::Zero {
                let half = &self.half;
                self.memory.fill_zero_while(run.range, || half.check("", Ok(())))?;
                continue;
            }
            let mut rest = run.range;
            while rest.pages > 0 {
                let piece = PageRange { pages: rest.pages.min(PIECE_PAGES), ..rest };
                self.half.fill(self.memory.span(piece)?.len_bytes, None)?;
                self.memory.copy_in(piece, self.half.held())?;
                self.half.clear();
                rest.first_page += u64::from(piece.pages);
                rest.pages -= piece.pages;
            }
        }
        self.user_copied_bytes += header.payload_bytes;
        self.watch.landed(&runs);
        self.marks.landed = due;
        if header.ack {
            self.acknowledge()?;
        }
        Ok(Received::Batch(counts))
    }

    fn watch_landings(&mut self, watch: LandingWatch) -> Result<(), TransportError> {
        self.watch = watch;
        Ok(())
    }

    fn counters(&self) -> ChannelCounters {
        self.all_counters()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.half.stop) as Arc<dyn Interrupt>
    }
}
