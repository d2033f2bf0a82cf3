//! Pages over a transport, both ends on one thread: what one sends the other takes in before the
//! next, so that the same calls are made in every run. A destination whose memory the source writes has
//! nothing to take in, and waits on a thread of its own.

use std::hint::black_box;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pageferry::memory::{GuestMemory, PAGE_BYTES, PageRange};
use pageferry::transport::{
    ChannelCounters, DestinationLink, PageReceiver, PageSender, Received, Run, RunKind, SourceLink,
};
use pageferry_cli::outcome::Failure;
use pageferry_cli::transport::ZeroCopyChoice;
use pageferry_rust_vmm::guest_memory;
use pageferry_vmm::ram::{Backing, Ram};
use vm_memory::{Bytes, GuestAddress};

use super::Counts;
use crate::links::{Listener, Way, connect};
use crate::random::Random;

const MEMORY_PAGES: u64 = 1024;
/// Batches of a unit of work.
pub(crate) const BATCHES: u32 = 64;
/// Runs of a batch, and pages of a run: fewer bytes than a socket takes at once, and enough that they
/// may be sent zero-copy.
const RUNS: u64 = 4;
const RUN_PAGES: u32 = 8;
/// From one run to the next: they do not touch.
const STRIDE_PAGES: u64 = 16;
/// For what answers at once where all is well.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) fn pages(
    way: Way,
    zero_copy: ZeroCopyChoice,
    work: u32,
) -> Result<impl FnMut() -> Result<Counts, Failure>, Failure> {
    let (from_ram, from) = memory(1)?;
    let (to_ram, to) = memory(2)?;
    let (source, mut sender, destination, receiver) = ends(way, zero_copy, &from, &to)?;
    let mut receiver = if source.capabilities().one_sided_write {
        drain_apart(receiver);
        None
    } else {
        Some(receiver)
    };
    let batches: Vec<Vec<Run>> = (0..MEMORY_PAGES / (RUNS * STRIDE_PAGES)).map(batch).collect();
    // What grows at first has grown before anybody counts.
    exchange(&mut *sender, &mut receiver, &batches, 2 * BATCHES)?;
    Ok(move || {
        // All of it stays open, and mapped.
        black_box((&from_ram, &to_ram));
        black_box((&source, &destination));
        let before = counters(&*sender, receiver.as_deref());
        exchange(&mut *sender, &mut receiver, &batches, work * BATCHES)?;
        Ok(counts(before, counters(&*sender, receiver.as_deref())))
    })
}

/// Has a thread wait at the destination until the program ends.
fn drain_apart(mut receiver: Box<dyn PageReceiver>) {
    thread::spawn(move || while let Ok(Received::Batch(_)) = receiver.receive() {});
}

/// Of both ends, as far as they are here.
fn counters(sender: &dyn PageSender, receiver: Option<&dyn PageReceiver>) -> ChannelCounters {
    let mut sum = sender.counters();
    if let Some(receiver) = receiver {
        sum.add(&receiver.counters());
    }
    sum
}

fn memory(seed: u64) -> Result<(Ram, Arc<GuestMemory>), Failure> {
    let ram = Ram::allocate(&[(0, MEMORY_PAGES * PAGE_BYTES)], Backing::Memfd)?;
    let mut page = vec![0; usize::try_from(PAGE_BYTES)?];
    let mut random = Random::new(seed);
    for number in 0..MEMORY_PAGES {
        random.fill(&mut page);
        ram.memory().write_slice(&page, GuestAddress(number * PAGE_BYTES))?;
    }
    let memory = Arc::new(guest_memory(Arc::clone(ram.memory()))?);
    Ok((ram, memory))
}

fn batch(number: u64) -> Vec<Run> {
    let run = |index: u64| {
        let first_page = (number * RUNS + index) * STRIDE_PAGES;
        Run { range: PageRange { region: 0, first_page, pages: RUN_PAGES }, kind: RunKind::Data }
    };
    (0..RUNS).map(run).collect()
}

type Ends =
    (Box<dyn SourceLink>, Box<dyn PageSender>, Box<dyn DestinationLink>, Box<dyn PageReceiver>);

/// Both ends of one data channel. They find each other by two threads, of which one is left.
fn ends(
    way: Way,
    zero_copy: ZeroCopyChoice,
    from: &Arc<GuestMemory>,
    to: &Arc<GuestMemory>,
) -> Result<Ends, Failure> {
    let listener = Listener::bind(way)?;
    let address = listener.address();
    thread::scope(|scope| {
        let there = scope.spawn(|| -> Result<_, Failure> {
            let mut link = listener.accept()?;
            link.register(to)?;
            let receiver = link.open_receivers(1, PATIENCE)?.pop();
            Ok((link, receiver.ok_or("there is no data channel")?))
        });
        let mut source = connect(way, zero_copy, address)?;
        source.register(from)?;
        let sender = source.open_senders(1)?.pop().ok_or("there is no data channel")?;
        let (destination, receiver) =
            there.join().map_err(|_| "the thread of the destination panicked")??;
        Ok((source, sender, destination, receiver))
    })
}

fn exchange(
    sender: &mut dyn PageSender,
    receiver: &mut Option<Box<dyn PageReceiver>>,
    batches: &[Vec<Run>],
    count: u32,
) -> Result<(), Failure> {
    for batch in batches.iter().cycle().take(count as usize) {
        let ticket = sender.send(batch)?;
        if let Some(receiver) = receiver {
            // Has it under way, and asks for its acknowledgement, which cannot be there yet.
            sender.watermarks(Some(Duration::ZERO))?;
            match receiver.receive()? {
                Received::Batch(_) => {}
                Received::End => return Err("the channel ended".into()),
            }
        }
        // Now it is: what is still missing then is a matter of the kernel's time.
        while sender.watermarks(Some(PATIENCE))?.landed < ticket {}
    }
    Ok(())
}

fn counts(before: ChannelCounters, after: ChannelCounters) -> Counts {
    Counts {
        system_calls: after.system_calls - before.system_calls,
        user_copied_bytes: after.user_copied_bytes - before.user_copied_bytes,
        wire_bytes: after.wire_bytes - before.wire_bytes,
        zero_copy: after.zero_copy.into(),
        posted: after.work_requests.posted - before.work_requests.posted,
        signalled: after.work_requests.signalled - before.work_requests.signalled,
        doorbells: after.work_requests.doorbells - before.work_requests.doorbells,
        ..Counts::default()
    }
}
