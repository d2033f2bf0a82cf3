//! What cases are built of.

use std::time::{Duration, Instant};

use super::{PROMPT, Trial};
use crate::pages::memory::{PAGE_BYTES, PageRange};
use crate::testing::TestMemory;
pub(super) use crate::testing::{data, zero};
use crate::transport::{
    ControlChannel, ControlReceiver, ControlSender, DestinationLink, PageCounts, PageReceiver,
    PageSender, Received, Run, RunKind, SourceLink, TransportError, Watermarks,
};

pub(super) type Sender = Box<dyn PageSender>;
pub(super) type Receiver = Box<dyn PageReceiver>;

/// As long as any wait may be: who waits it out has not noticed something else.
pub(super) const VERY_LONG: Duration = Duration::MAX;

pub(super) const REGION_PAGES: [u64; 3] = [700, 1, 1300];

/// Opened data channels with memory on both sides.
pub(super) struct Opened {
    // Dropped in this order: channels before links, as the port says.
    pub(super) senders: Vec<Sender>,
    pub(super) receivers: Vec<Receiver>,
    pub(super) control: (ControlChannel, ControlChannel),
    pub(super) source: Box<dyn SourceLink>,
    pub(super) destination: Box<dyn DestinationLink>,
    pub(super) here: TestMemory,
    pub(super) there: TestMemory,
}

impl Trial {
    /// Both control channels of a fresh pair, and the pair.
    pub(super) fn control(
        &self,
    ) -> (ControlChannel, ControlChannel, Box<dyn SourceLink>, Box<dyn DestinationLink>) {
        let (mut source, mut destination) = self.pair();
        let here = source.control().expect("the source's control channel");
        let there = destination.control().expect("the destination's control channel");
        (here, there, source, destination)
    }

    pub(super) fn open(&self, channels: u16) -> Opened {
        self.open_with(channels, &REGION_PAGES)
    }

    /// With regions of so many pages.
    pub(super) fn open_with(&self, channels: u16, region_pages: &[u64]) -> Opened {
        let (from_source, from_destination, mut source, mut destination) = self.control();
        let here = TestMemory::new(region_pages);
        let there = TestMemory::new(region_pages);
        source.register(here.memory()).expect("source memory registers");
        destination.register(there.memory()).expect("destination memory registers");
        let (senders, receivers) = self.watch.together(|crew| {
            let accept = crew.spawn(|| destination.open_receivers(channels, PROMPT));
            let senders = source.open_senders(channels).expect("channels open");
            (senders, accept.join().expect("channels are accepted"))
        });
        assert_eq!(senders.len(), usize::from(channels), "number of senders");
        assert_eq!(receivers.len(), usize::from(channels), "number of receivers");
        let control = (from_source, from_destination);
        Opened { senders, receivers, control, source, destination, here, there }
    }

    /// One channel.
    pub(super) fn open_one(&self) -> (Opened, Sender, Receiver) {
        let mut opened = self.open(1);
        let (sender, receiver) = (opened.senders.remove(0), opened.receivers.remove(0));
        (opened, sender, receiver)
    }
}

impl Opened {
    /// Page bytes that a batch takes, in pages, at most those of the largest region.
    pub(super) fn batch_pages(&self) -> u64 {
        (self.source.capabilities().max_batch_bytes / PAGE_BYTES).clamp(1, REGION_PAGES[2])
    }

    pub(super) fn tells_landings(&self) -> bool {
        self.destination.capabilities().tells_landings
    }

    pub(super) fn one_sided(&self) -> bool {
        self.source.capabilities().one_sided_write
    }
}

pub(super) fn run(region: u16, first_page: u64, pages: u32, kind: RunKind) -> Run {
    Run { range: PageRange { region, first_page, pages }, kind }
}

/// Splits `pages` pages of a region into batches of at most `most` pages.
pub(super) fn batches(most: u64, region: u16, pages: u64) -> Vec<Vec<Run>> {
    let first_pages = (0..pages).step_by(usize::try_from(most).expect("small"));
    let pages_from = |first| u32::try_from(most.min(pages - first)).expect("small");
    first_pages.map(|first| vec![data(region, first, pages_from(first))]).collect()
}

/// Receives until the channel ends.
pub(super) fn drain(receiver: &mut Receiver) -> PageCounts {
    let mut counts = PageCounts::default();
    while let Received::Batch(batch) = receiver.receive().expect("a batch or the end") {
        counts.add(&batch);
    }
    counts
}

pub(super) fn send(sender: &mut Sender, runs: &[Run]) -> u64 {
    sender.send(runs).expect("a batch goes out")
}

pub(super) fn look(sender: &mut Sender) -> Watermarks {
    sender.watermarks(None).expect("watermarks")
}

pub(super) fn wait(sender: &mut Sender, time: Duration) -> Watermarks {
    sender.watermarks(Some(time)).expect("watermarks")
}

/// Waits until all has landed, up to the last ticket.
pub(super) fn settle(sender: &mut Sender, last: u64) {
    let began = Instant::now();
    let mut before = look(sender);
    while before.landed < last {
        assert!(began.elapsed() < PROMPT, "batch {last} never landed: {before:?}");
        let marks = wait(sender, Duration::from_millis(100));
        check_marks(before, marks, last);
        before = marks;
    }
    assert!(before.released >= last, "landed and not released: {before:?}");
}

pub(super) fn check_marks(before: Watermarks, marks: Watermarks, sent: u64) {
    let grown = marks.landed >= before.landed && marks.released >= before.released;
    assert!(grown, "watermarks went back from {before:?} to {marks:?}");
    assert!(marks.landed <= sent && marks.released <= sent, "{marks:?} after {sent} batches");
    assert!(marks.landed <= marks.released, "landed and not released: {marks:?}");
}

/// Waits until a batch is released.
pub(super) fn release(sender: &mut Sender, ticket: u64) {
    let began = Instant::now();
    while look(sender).released < ticket {
        assert!(began.elapsed() < PROMPT, "batch {ticket} was never released");
        wait(sender, Duration::from_millis(10));
    }
}

pub(super) fn say(sender: &mut Box<dyn ControlSender>, frame: &[u8]) {
    sender.send(frame, PROMPT).expect("a frame goes out");
}

pub(super) fn hear(receiver: &mut Box<dyn ControlReceiver>) -> Vec<u8> {
    receiver.receive(Some(PROMPT)).expect("a frame comes in")
}

pub(super) fn is_zero(memory: &TestMemory, region: u16, page: u64) -> bool {
    memory.read(region, page).iter().all(|byte| *byte == 0)
}

/// Fails unless the call was interrupted.
pub(super) fn interrupted<T>(result: Result<T, TransportError>, what: &str) {
    let result = result.map(drop);
    assert!(matches!(result, Err(TransportError::Interrupted)), "{what}: {result:?}");
}

/// Fails unless the call says that the link is lost.
pub(super) fn lost<T>(result: Result<T, TransportError>, what: &str) {
    let result = result.map(drop);
    assert!(matches!(result, Err(TransportError::Lost { .. })), "{what}: {result:?}");
}
