//! What these tests have in common: a link with a channel, and what the device holds.

use std::error::Error;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::memory::{PAGE_BYTES, PageRange};
use pageferry::testing::{TestMemory, open_channel};
use pageferry::transport::{Link, PageReceiver, PageSender, Registration, Run, RunKind};
use pageferry_rdma::{
    RdmaAcceptor, RdmaDestinationLink, RdmaOptions, RdmaSourceLink, RegistrationMode,
};

use crate::support::{SOON, address, linked, of_anyone};

pub(crate) const CHUNK_BYTES: u64 = 1 << 20;
pub(crate) const CHUNK_PAGES: u64 = CHUNK_BYTES / PAGE_BYTES;
pub(crate) const CHUNKS: u64 = 8;
pub(crate) const MEMORY_BYTES: u64 = CHUNKS * CHUNK_BYTES;

/// One test at a time: they count what the device holds.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn options(registration: RegistrationMode) -> RdmaOptions {
    RdmaOptions { registration, chunk_bytes: CHUNK_BYTES, ..RdmaOptions::default() }
}

pub(crate) fn memory() -> TestMemory {
    TestMemory::new(&[CHUNKS * CHUNK_PAGES])
}

pub(crate) fn data(first_page: u64, pages: u32) -> Run {
    Run { range: PageRange { region: 0, first_page, pages }, kind: RunKind::Data }
}

/// A link with one channel and memory on both sides.
pub(crate) struct Opened {
    pub(crate) sender: Box<dyn PageSender>,
    pub(crate) receiver: Box<dyn PageReceiver>,
    pub(crate) source: RdmaSourceLink,
    pub(crate) destination: RdmaDestinationLink,
    pub(crate) here: TestMemory,
    pub(crate) there: TestMemory,
    /// What registering cost before the channels opened, at the source and at the destination.
    pub(crate) costs: (Registration, Registration),
}

pub(crate) fn open(
    address: &str,
    source: RegistrationMode,
    destination: RegistrationMode,
) -> Opened {
    let (mut source, mut destination) = linked(address, &options(source), &options(destination));
    let (here, there) = (memory(), memory());
    let costs = (
        source.register(here.memory()).expect("source memory registers"),
        destination.register(there.memory()).expect("destination memory registers"),
    );
    let (sender, receiver) = open_channel(&mut source, &mut destination);
    Opened { sender, receiver, source, destination, here, there, costs }
}

/// An error and its causes, in one line.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let causes =
        std::iter::successors(Some(error), |error: &&(dyn Error + 'static)| (*error).source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// How many of each kind of object the device holds, as the kernel counts them.
pub(crate) fn resources() -> String {
    // librdmacm opens the device when it is first used, and keeps its context until the process ends.
    static OPENED: Once = Once::new();
    OPENED.call_once(|| {
        let address = address().expect("a device");
        drop(
            RdmaAcceptor::bind((&*address, 0), of_anyone(RdmaOptions::default())).expect("listens"),
        );
    });
    let shown = Command::new("rdma").args(["resource", "show"]).output().expect("rdma of iproute2");
    assert!(shown.status.success(), "{shown:?}");
    String::from_utf8(shown.stdout).expect("text")
}

/// The kernel lets go of closed connections a little later (TIMEWAIT).
pub(crate) fn expect_resources(before: &str) {
    let began = Instant::now();
    while resources() != before {
        assert!(began.elapsed() < SOON, "left behind: {} instead of {before}", resources());
        thread::sleep(Duration::from_millis(50));
    }
}

/// The network interface below the device.
pub(crate) fn interface() -> String {
    let shown = Command::new("rdma").args(["link", "show"]).output().expect("rdma of iproute2");
    let shown = String::from_utf8(shown.stdout).expect("text");
    let words: Vec<_> = shown.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "netdev").expect("a device of Ethernet");
    words[at + 1].to_owned()
}
