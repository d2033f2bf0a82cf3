//! Support for tests of transports and embedders, behind the feature `test-support`:
//!
//! - [`conformance`]: the suite every transport passes, third parties' too;
//! - [`hot`]: a sender's inner loop without its thread, for who counts what it costs;
//! - [`memory_transport`]: a transport inside one process, without sockets;
//! - [`faulty`]: a wrapper that makes any transport slow, choppy, unordered between channels, or
//!   breaks it, by a seed;
//! - [`WrappedLink`] and [`WrappedChannel`]: as another link or channel in all but what a test wants otherwise;
//! - [`IdleMachine`]: a machine that is nothing but its memory;
//! - [`TestMemory`]: guest memory of its own, with a pattern to compare;
//! - [`open_channel`], [`data`] and [`zero`], [`drain`] and [`settle`]: data channels, and what they carry, to
//!   their end and until it has landed;
//! - [`say`] and [`hear`]: a side of the control channel that is no engine;
//! - [`greeting`]: what makes a source one, for acceptors;
//! - [`lock_at_most`]: a process that may lock little memory;
//! - [`Random`]: numbers by a seed;
//! - [`until_asleep`]: for tests of what ends a wait.

pub mod conformance;
pub mod faulty;
pub mod hot;
pub mod memory_transport;

mod idle;
mod test_memory;
mod wrapped;

use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use crate::control::protocol::{Hello, Message, MigrationKey};
use crate::pages::memory::{Layout, PageRange, RegionLayout};
use crate::transport::{
    ControlChannel, DestinationLink, LinkId, PageReceiver, PageSender, Received, Run, RunKind,
    SourceLink, Ticket,
};

pub use idle::IdleMachine;
pub use test_memory::TestMemory;
pub use wrapped::{
    ChannelCall, LinkCall, WrappedChannel, WrappedDestination, WrappedLink, WrappedSource,
};

/// Longer than anything takes that is to happen, on a machine that has other things to do.
const SOON: Duration = Duration::from_secs(60);

/// Receives until the channel ends; the number of batches.
///
/// # Panics
///
/// If it is lost.
pub fn drain(receiver: &mut dyn PageReceiver) -> u64 {
    let mut batches = 0;
    while let Received::Batch(_) = receiver.receive().expect("a batch or the end") {
        batches += 1;
    }
    batches
}

/// Waits until a batch has landed.
///
/// # Panics
///
/// If the channel is lost, or that takes for ever.
pub fn settle(sender: &mut dyn PageSender, ticket: Ticket) {
    let began = Instant::now();
    while sender.watermarks(Some(Duration::from_millis(10))).expect("watermarks").landed < ticket {
        assert!(began.elapsed() < SOON, "batch {ticket} never landed");
    }
}

/// Opens the one data channel of a link whose memory is registered, at both ends meanwhile.
///
/// # Panics
///
/// If it does not open.
pub fn open_channel(
    source: &mut dyn SourceLink,
    destination: &mut dyn DestinationLink,
) -> (Box<dyn PageSender>, Box<dyn PageReceiver>) {
    std::thread::scope(|scope| {
        let accepted = scope.spawn(|| destination.open_receivers(1, SOON));
        let mut senders = source.open_senders(1).expect("a channel opens");
        let mut receivers = accepted.join().expect("no panic").expect("a channel is accepted");
        (senders.remove(0), receivers.remove(0))
    })
}

/// A run of pages with bytes.
pub fn data(region: u16, first_page: u64, pages: u32) -> Run {
    Run { range: PageRange { region, first_page, pages }, kind: RunKind::Data }
}

/// A run of pages that are zero.
pub fn zero(region: u16, first_page: u64, pages: u32) -> Run {
    Run { range: PageRange { region, first_page, pages }, kind: RunKind::Zero }
}

/// Leaves this process so many bytes to lock at most, and this thread no privilege to exceed that.
///
/// # Panics
///
/// If the kernel refuses.
pub fn lock_at_most(bytes: u64) {
    let before = getrlimit(Resource::Memlock);
    let current = Some(before.maximum.map_or(bytes, |most| most.min(bytes)));
    setrlimit(Resource::Memlock, Rlimit { current, ..before }).expect("a lower limit");
    let mut sets = capabilities(None).expect("what this thread may do");
    sets.effective.remove(CapabilitySet::IPC_LOCK);
    set_capabilities(None, sets).expect("less than before");
}

/// Says something to the other side.
///
/// # Panics
///
/// If it does not listen.
pub fn say(control: &mut ControlChannel, message: &Message) {
    control.sender.send(&message.encode(), SOON).expect("the other side listens");
}

/// What the other side says next.
///
/// # Panics
///
/// If it says nothing, or what is no message.
pub fn hear(control: &mut ControlChannel) -> Message {
    let frame = control.receiver.receive(Some(SOON)).expect("a frame");
    Message::decode(&frame).expect("a message")
}

/// A source's first control frame, of a small guest with this description: what makes it a source
/// ([`check_greeting`](crate::transport::check_greeting)).
#[expect(clippy::missing_panics_doc, reason = "the layout makes sense")]
pub fn greeting(description: Vec<u8>) -> Vec<u8> {
    let region = RegionLayout { guest_addr: 0, len_bytes: 4096, backing_page_bytes: 4096 };
    let layout = Layout::new(vec![region]).expect("a layout");
    Message::Hello(Hello::new(MigrationKey::of_a_test(), layout, 1, false, description)).encode()
}

/// Waits until a thread of this process sleeps in the kernel (state `S` in proc_pid_stat(5)).
///
/// # Panics
///
/// If there is no such thread.
pub fn until_asleep(thread: rustix::thread::Pid) {
    let path = format!("/proc/self/task/{}/stat", thread.as_raw_nonzero());
    // "tid (name) state …"; the name may hold anything, so look from its end.
    let sleeps = |stat: &str| stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" S"));
    while !sleeps(&std::fs::read_to_string(&path).expect("the thread is there")) {
        std::thread::yield_now();
    }
}

/// A small deterministic random generator (splitmix64), so that a seed says it all.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed; the same seed gives the same numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// From the seed in `PAGEFERRY_TEST_SEED`, or a fresh one; printed, so that a failure of `what` can be
    /// repeated.
    ///
    /// # Panics
    ///
    /// If the operating system has no random numbers.
    pub fn seeded(what: &str) -> Self {
        let told = std::env::var("PAGEFERRY_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = told.unwrap_or_else(|| {
            let LinkId(fresh) = LinkId::random().expect("random numbers");
            fresh.iter().fold(0, |seed, byte| seed << 8 | u64::from(*byte))
        });
        eprintln!("{what}: PAGEFERRY_TEST_SEED={seed}");
        Self::new(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }
}
