//! One page there, one page back, over and over, as ib_write_lat does it: each side waits for the
//! other's by looking at its own memory. Both sides are threads of this process; their packets take
//! the same way as those of two.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::memory::{GuestMemory, PageRange};
use pageferry::transport::{
    DestinationLink, Link, PageReceiver, PageSender, Received, Run, RunKind, SourceLink,
};
use pageferry_cli::outcome::Failure;
use pageferry_rdma::{RdmaAcceptor, RdmaOptions, connect};
use pageferry_report::document::median;
use pageferry_rust_vmm::guest_memory;
use pageferry_vmm::ram::{Backing, Ram};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::cpus;

const PAGE_BYTES: u64 = super::PAGE_BYTES as u64;

/// For a page to come, before somebody is assumed to be gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// Rounds that are not counted.
const WARM_UP: u32 = 50;

/// A side's memory: page 0 goes there, page 1 comes back.
struct Side {
    ram: Ram,
    memory: Arc<GuestMemory>,
}

impl Side {
    fn new() -> Result<Self, Failure> {
        let ram = Ram::allocate(&[(0, 16 * PAGE_BYTES)], Backing::Anonymous)?;
        let memory = Arc::new(guest_memory(Arc::clone(ram.memory()))?);
        Ok(Self { ram, memory })
    }
}

/// Both ends.
type Links = (Box<dyn SourceLink>, Box<dyn DestinationLink>);

/// A link one way, with one channel.
struct Way {
    /// The channel before the links.
    sender: Box<dyn PageSender>,
    receiver: Box<dyn PageReceiver>,
    _links: Links,
}

impl Way {
    fn open(
        address: IpAddr,
        options: &RdmaOptions,
        from: &Side,
        to: &Side,
    ) -> Result<Self, Failure> {
        let acceptor = RdmaAcceptor::bind((address, 0), options.clone())?;
        let at = acceptor.local_addr();
        let panicked = |_| "a thread panicked";
        thread::scope(|scope| {
            let destination = scope.spawn(move || -> Result<_, Failure> {
                let mut link = acceptor.accept(Some(PATIENCE))?;
                link.register(&to.memory)?;
                let receiver = link.open_receivers(1, PATIENCE)?.pop().ok_or("no channel")?;
                Ok((link, receiver))
            });
            let mut source = connect(at, options.clone())?;
            source.register(&from.memory)?;
            let sender = source.open_senders(1)?.pop().ok_or("no channel")?;
            let (destination, receiver) = destination.join().map_err(panicked)??;
            let links: Links = (Box::new(source), Box::new(destination));
            Ok(Self { sender, receiver, _links: links })
        })
    }
}

/// Where the pages' last words are: a page is there when its end is.
fn word(page: u64) -> GuestAddress {
    GuestAddress((page + 1) * PAGE_BYTES - 8)
}

/// Writes a number to a page and sends it.
fn send(
    sender: &mut dyn PageSender,
    memory: &GuestMemoryMmap<()>,
    page: u64,
    number: u64,
) -> Result<(), Failure> {
    memory.store(number, word(page), Ordering::Release)?;
    let range = PageRange { region: 0, first_page: page, pages: 1 };
    sender.send(&[Run { range, kind: RunKind::Data }])?;
    Ok(())
}

/// Looks until a number is there, or nobody sends it any more.
fn see(
    memory: &GuestMemoryMmap<()>,
    page: u64,
    number: u64,
    given_up: &AtomicBool,
) -> Result<(), Failure> {
    let began = Instant::now();
    let mut looks = 0_u32;
    while memory.load::<u64>(word(page), Ordering::Acquire)? != number {
        looks = looks.wrapping_add(1);
        let late = looks.is_multiple_of(1 << 16) && began.elapsed() > PATIENCE;
        if late || given_up.load(Ordering::Relaxed) {
            given_up.store(true, Ordering::Relaxed);
            return Err("a page that was sent never came".into());
        }
        std::hint::spin_loop();
    }
    Ok(())
}

/// Half the time there and back, in microseconds: the median.
pub(super) fn measure(address: IpAddr, options: &RdmaOptions, writes: u32) -> Result<f64, Failure> {
    let (here, there) = (Side::new()?, Side::new()?);
    let mut out = Way::open(address, options, &here, &there)?;
    let mut back = Way::open(address, options, &there, &here)?;
    let (here, there) = (here.ram.memory(), there.ram.memory());
    let given_up = &AtomicBool::new(false);
    let rounds = u64::from(WARM_UP + writes);
    thread::scope(|scope| {
        // They have nothing to do but to say what they saw.
        let (out_sender, back_sender) = (&mut out.sender, &mut back.sender);
        for receiver in [&mut out.receiver, &mut back.receiver] {
            scope.spawn(|| while let Ok(Received::Batch(_)) = receiver.receive() {});
        }
        let answering = scope.spawn(move || {
            cpus::of_side(1, || {
                for number in 1..=rounds {
                    see(there, 0, number, given_up)?;
                    send(&mut **back_sender, there, 1, number)?;
                    back_sender.watermarks(None)?;
                }
                Ok(back_sender.finish()?)
            })
        });
        let result = cpus::of_side(0, || {
            let mut write_us = Vec::new();
            for number in 1..=rounds {
                let began = Instant::now();
                send(&mut **out_sender, here, 0, number)?;
                see(here, 1, number, given_up)?;
                write_us.push(began.elapsed().as_secs_f64() * 1e6 / 2.0);
                out_sender.watermarks(None)?;
            }
            out_sender.finish()?;
            let counted = write_us.iter().skip(WARM_UP as usize).copied();
            median(counted).ok_or_else(|| "nothing was measured".into())
        });
        if result.is_err() {
            // The other side waits no longer, and neither do those who only receive.
            given_up.store(true, Ordering::Relaxed);
            let _ = out_sender.finish();
        }
        let answered = answering.join().map_err(|_| "a thread panicked")?;
        let took = result?;
        answered.map(|()| took)
    })
}
