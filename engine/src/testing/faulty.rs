//! A wrapper around any transport that makes trouble by a seed.
//!
//! What it does stays within the port's contract, so an engine and a guest must survive it:
//! delays, batches cut into smaller ones, channels that overtake each other, a link that breaks
//! after so many bytes. Short reads and writes below the port are a matter of each transport's
//! own tests.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Random;
use crate::pages::memory::GuestMemory;
use crate::transport::{
    Capabilities, ChannelCounters, ControlChannel, ControlReceiver, ControlSender, Interrupt, Link,
    PageSender, PageServer, Registration, Run, SourceLink, Ticket, TransportError, Watermarks,
};

/// Which trouble to make. The default makes none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// Random delays before batches and control frames, up to this long.
    pub delay_at_most: Duration,
    /// Cut batches into pieces of at most so many pages (short I/O at the level of the port).
    pub pieces_of_pages: Option<u32>,
    /// Hold batches of random channels back while the others go ahead, up to so many at a time.
    pub reorder_depth: usize,
    /// Break this data channel, and no other, once so many page bytes have gone out on it.
    pub lose_channel: Option<(u16, u64)>,
    /// Once so many page bytes have gone out on this data channel, take no more of it and let nothing
    /// land: as a path that swallows packets, also those that tell the other side of its end.
    pub silent_channel: Option<(u16, u64)>,
    /// Let each batch of this data channel take so much longer.
    pub slow_channel: Option<(u16, Duration)>,
    /// Page bytes a second that all data channels share, a page at a time.
    pub rate: Option<u64>,
    /// Hold up the first control frame of more than so many bytes, once, for so long.
    pub stall_frame: Option<(usize, Duration)>,
    /// Break the link once so many page bytes have gone out, over all channels.
    pub cut_after_page_bytes: Option<u64>,
    /// Break the link once so many control frames have gone out.
    pub cut_after_frames: Option<u64>,
    /// Break the link instead of sending a control message of this type: its first two bytes, see
    /// `docs/protocol.md`.
    pub cut_before_message: Option<u16>,
}

/// A source's end that misbehaves.
pub struct FaultySource {
    inner: Box<dyn SourceLink>,
    faults: Faults,
    random: Random,
    trouble: Arc<Trouble>,
    memory: Option<Arc<GuestMemory>>,
}

impl std::fmt::Debug for FaultySource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FaultySource").field("faults", &self.faults).finish_non_exhaustive()
    }
}

/// How far the link is from breaking; shared by its channels.
struct Trouble {
    page_bytes_left: AtomicU64,
    frames_left: AtomicU64,
    interrupt: Arc<dyn Interrupt>,
    /// When the next page may go out, where there is a rate.
    next_page: Mutex<Instant>,
    /// Channels that have fallen silent and ended here. Their other sides see nothing of it.
    swallowed: Mutex<Vec<Box<dyn PageSender>>>,
}

impl Trouble {
    /// Takes from an allowance; breaks the link when it is used up.
    fn spend(&self, left: &AtomicU64, amount: u64) -> Result<(), TransportError> {
        let spent = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
            if left == u64::MAX { Some(left) } else { left.checked_sub(amount) }
        });
        spent.map(drop).map_err(|_| {
            left.store(0, Ordering::SeqCst);
            self.cut()
        })
    }

    /// Waits until it is the turn of so many page bytes.
    fn wait_for_turn(&self, bytes: u64, rate: u64) {
        let turn = {
            let mut next = self.next_page.lock().unwrap_or_else(PoisonError::into_inner);
            let turn = (*next).max(Instant::now());
            *next = turn + Duration::from_secs_f64(bytes as f64 / rate as f64);
            turn
        };
        std::thread::sleep(turn.saturating_duration_since(Instant::now()));
    }

    /// Breaks the link.
    fn cut(&self) -> TransportError {
        self.interrupt.interrupt();
        TransportError::Lost {
            operation: "survive an injected fault",
            cause: io::ErrorKind::ConnectionReset.into(),
        }
    }
}

impl FaultySource {
    /// Wraps a source's end. The same seed makes the same trouble, as far as threads allow.
    pub fn new(inner: Box<dyn SourceLink>, faults: Faults, seed: u64) -> Self {
        let trouble = Arc::new(Trouble {
            page_bytes_left: AtomicU64::new(faults.cut_after_page_bytes.unwrap_or(u64::MAX)),
            frames_left: AtomicU64::new(faults.cut_after_frames.unwrap_or(u64::MAX)),
            interrupt: inner.interrupter(),
            next_page: Mutex::new(Instant::now()),
            swallowed: Mutex::default(),
        });
        Self { inner, faults, random: Random::new(seed), trouble, memory: None }
    }
}

impl Link for FaultySource {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn control(&mut self) -> Result<ControlChannel, TransportError> {
        let ControlChannel { sender, receiver } = self.inner.control()?;
        let sender = FaultyControl {
            inner: sender,
            delay_at_most: self.faults.delay_at_most,
            stall: self.faults.stall_frame,
            cut_before: self.faults.cut_before_message,
            random: Random::new(self.random.next_u64()),
            trouble: Arc::clone(&self.trouble),
        };
        let receiver: Box<dyn ControlReceiver> = receiver;
        Ok(ControlChannel { sender: Box::new(sender), receiver })
    }

    fn register(&mut self, memory: &Arc<GuestMemory>) -> Result<Registration, TransportError> {
        self.memory = Some(Arc::clone(memory));
        self.inner.register(memory)
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        self.inner.interrupter()
    }
}

impl SourceLink for FaultySource {
    fn open_senders(&mut self, channels: u16) -> Result<Vec<Box<dyn PageSender>>, TransportError> {
        let senders = self.inner.open_senders(channels)?;
        let memory =
            self.memory.clone().ok_or(TransportError::OutOfOrder("memory is not registered"))?;
        let capabilities = self.inner.capabilities();
        Ok((0..)
            .zip(senders)
            .map(|(channel, inner)| -> Box<dyn PageSender> {
                Box::new(FaultySender {
                    interrupt: inner.interrupter(),
                    inner: Some(inner),
                    page_bytes_left: self
                        .faults
                        .lose_channel
                        .and_then(|lost| (lost.0 == channel).then_some(lost.1)),
                    bytes_to_silence: self
                        .faults
                        .silent_channel
                        .and_then(|silent| (silent.0 == channel).then_some(silent.1)),
                    slow_by: self
                        .faults
                        .slow_channel
                        .and_then(|slow| (slow.0 == channel).then_some(slow.1)),
                    faults: self.faults,
                    random: Random::new(self.random.next_u64()),
                    trouble: Arc::clone(&self.trouble),
                    memory: Arc::clone(&memory),
                    capabilities,
                    held: Vec::new(),
                    given: 0,
                    translation: Vec::new(),
                })
            })
            .collect())
    }

    fn serve_reads(&mut self, lanes: u16) -> Result<Vec<Box<dyn PageServer>>, TransportError> {
        self.inner.serve_reads(lanes)
    }
}

fn delay(random: &mut Random, at_most: Duration) {
    let nanos = u64::try_from(at_most.as_nanos()).unwrap_or(u64::MAX);
    if nanos > 0 {
        std::thread::sleep(Duration::from_nanos(random.below(nanos)));
    }
}

struct FaultyControl {
    inner: Box<dyn ControlSender>,
    delay_at_most: Duration,
    stall: Option<(usize, Duration)>,
    cut_before: Option<u16>,
    random: Random,
    trouble: Arc<Trouble>,
}

impl ControlSender for FaultyControl {
    fn send(&mut self, frame: &[u8], timeout: Duration) -> Result<(), TransportError> {
        self.trouble.spend(&self.trouble.frames_left, 1)?;
        if self.cut_before.is_some_and(|message| frame.starts_with(&message.to_le_bytes())) {
            return Err(self.trouble.cut());
        }
        delay(&mut self.random, self.delay_at_most);
        if let Some((_, stall)) = self.stall.take_if(|(bytes, _)| frame.len() > *bytes) {
            std::thread::sleep(stall);
        }
        self.inner.send(frame, timeout)
    }
}

struct FaultySender {
    /// `None` once the channel is lost.
    inner: Option<Box<dyn PageSender>>,
    interrupt: Arc<dyn Interrupt>,
    /// Until the channel is to be lost.
    page_bytes_left: Option<u64>,
    /// Until the channel falls silent.
    bytes_to_silence: Option<u64>,
    slow_by: Option<Duration>,
    faults: Faults,
    random: Random,
    trouble: Arc<Trouble>,
    memory: Arc<GuestMemory>,
    capabilities: Capabilities,
    /// Batches taken and not given to the transport yet, with the tickets given out for them.
    held: Vec<(Ticket, Vec<Run>)>,
    /// Tickets given out.
    given: Ticket,
    /// For each ticket given out and under way: the transport's ticket of its last piece.
    translation: Vec<(Ticket, Ticket)>,
}

impl FaultySender {
    fn inner(&mut self) -> Result<&mut dyn PageSender, TransportError> {
        match &mut self.inner {
            Some(inner) => Ok(&mut **inner),
            None => Err(channel_lost()),
        }
    }

    /// Counts down to the loss of the channel, at which the other side sees it end.
    fn spend(&mut self, bytes: u64) -> Result<(), TransportError> {
        if let Some(left) = &mut self.page_bytes_left {
            let Some(rest) = left.checked_sub(bytes) else {
                self.inner = None;
                return Err(channel_lost());
            };
            *left = rest;
        }
        Ok(())
    }

    /// Counts down to the silence of the channel, and waits in it for the interrupt.
    fn fall_silent(&mut self, bytes: u64) -> Result<(), TransportError> {
        let Some(left) = &mut self.bytes_to_silence else { return Ok(()) };
        *left = left.saturating_sub(bytes);
        while self.is_silent() {
            // Nothing of it lands; but it says when it was interrupted.
            self.inner()?.watermarks(None)?;
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn is_silent(&self) -> bool {
        self.bytes_to_silence == Some(0)
    }

    /// Gives held batches to the transport, oldest first, until `keep` are left.
    fn let_go(&mut self, keep: usize) -> Result<(), TransportError> {
        while self.held.len() > keep {
            let (ticket, runs) = self.held.remove(0);
            let mut last = 0;
            let pages = self.faults.rate.map_or(self.faults.pieces_of_pages, |_| Some(1));
            for piece in pieces(&runs, pages) {
                let bytes: u64 = piece.iter().map(Run::payload_bytes).sum();
                self.trouble.spend(&self.trouble.page_bytes_left, bytes)?;
                self.spend(bytes)?;
                self.fall_silent(bytes)?;
                delay(&mut self.random, self.faults.delay_at_most);
                if let Some(rate) = self.faults.rate {
                    self.trouble.wait_for_turn(bytes, rate);
                }
                last = self.inner()?.send(&piece)?;
            }
            self.translation.push((ticket, last));
        }
        Ok(())
    }
}

impl PageSender for FaultySender {
    fn send(&mut self, runs: &[Run]) -> Result<Ticket, TransportError> {
        // What the transport would refuse must be refused now, not when it is let go.
        self.capabilities.check(runs)?;
        runs.iter().try_for_each(|run| self.memory.span(run.range).map(drop))?;
        self.given += 1;
        // Guest memory is read when the batch is let go, later than the caller thinks: within
        // the contract as long as it is not released.
        self.held.push((self.given, runs.to_vec()));
        if let Some(slow_by) = self.slow_by {
            std::thread::sleep(slow_by);
        }
        let keep = self.random.below(self.faults.reorder_depth as u64 + 1);
        self.let_go(usize::try_from(keep).unwrap_or(0))?;
        Ok(self.given)
    }

    fn watermarks(&mut self, wait: Option<Duration>) -> Result<Watermarks, TransportError> {
        if wait.is_some() {
            self.let_go(0)?;
        }
        let inner = self.inner()?.watermarks(wait)?;
        let upto = |mark: Ticket| {
            let under_way = self.translation.iter().rev();
            under_way.clone().find(|(_, theirs)| *theirs <= mark).map_or(0, |(ours, _)| *ours)
        };
        let marks = Watermarks { released: upto(inner.released), landed: upto(inner.landed) };
        Ok(marks)
    }

    fn counters(&self) -> ChannelCounters {
        self.inner.as_ref().map_or_else(ChannelCounters::default, |inner| inner.counters())
    }

    fn finish(&mut self) -> Result<(), TransportError> {
        self.let_go(0)?;
        self.inner()?.finish()
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.interrupt)
    }
}

impl Drop for FaultySender {
    fn drop(&mut self) {
        if self.is_silent()
            && let Some(inner) = self.inner.take()
        {
            self.trouble.swallowed.lock().unwrap_or_else(PoisonError::into_inner).push(inner);
        }
    }
}

fn channel_lost() -> TransportError {
    TransportError::Lost {
        operation: "keep an unlucky channel",
        cause: io::ErrorKind::ConnectionReset.into(),
    }
}

/// Cuts a batch into batches of at most `pages` pages, in order.
fn pieces(runs: &[Run], pages: Option<u32>) -> Vec<Vec<Run>> {
    let Some(most) = pages.filter(|pages| *pages > 0) else { return vec![runs.to_vec()] };
    let mut pieces = Vec::new();
    for run in runs {
        let mut rest = run.range;
        while rest.pages > 0 {
            let mut range = rest;
            range.pages = rest.pages.min(most);
            rest.first_page += u64::from(range.pages);
            rest.pages -= range.pages;
            pieces.push(vec![Run { range, kind: run.kind }]);
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::memory::{PAGE_BYTES, PageRange};
    use crate::transport::RunKind;

    #[test]
    fn pieces_are_the_same_pages_in_order() {
        let run = |first_page, pages, kind| Run {
            range: PageRange { region: 0, first_page, pages },
            kind,
        };
        let runs = [run(10, 5, RunKind::Data), run(1, 2, RunKind::Zero)];
        let cut = pieces(&runs, Some(2));
        let expected = [
            vec![run(10, 2, RunKind::Data)],
            vec![run(12, 2, RunKind::Data)],
            vec![run(14, 1, RunKind::Data)],
            vec![run(1, 2, RunKind::Zero)],
        ];
        assert_eq!(cut, expected);
        let bytes: u64 = cut.iter().flatten().map(Run::payload_bytes).sum();
        assert_eq!(bytes, 5 * PAGE_BYTES);
    }
}
