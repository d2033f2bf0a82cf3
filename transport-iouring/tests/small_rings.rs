//! A user who may not lock what rings need. On its own, for the limit is the process's.

use std::thread;
use std::time::{Duration, Instant};

use pageferry::memory::PageRange;
use pageferry::testing::TestMemory;
use pageferry::transport::{Admission, DestinationLink, Link, Received, Run, RunKind, SourceLink};
use pageferry_iouring::{IoUringOptions, Rings};
use pageferry_tcp::{TcpAcceptor, TcpOptions, connect};
use rustix::process::{Resource, Rlimit, geteuid, getpid, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities, set_thread_res_uid};

const SOON: Duration = Duration::from_secs(20);
const PAGES: u32 = 1000;
const CHANNELS: u16 = 8;

/// From here on this thread, and those that it starts, are a user who has locked nothing yet, if
/// they may become one, without the privilege to exceed the limit.
fn become_somebody() {
    if geteuid().is_root() {
        let pid = getpid().as_raw_nonzero().get().unsigned_abs();
        let somebody = rustix::process::Uid::from_raw(1_000_000 + pid);
        set_thread_res_uid(somebody, somebody, somebody).expect("another user");
    }
    let mut sets = capabilities(None).expect("what this thread may do");
    sets.effective.remove(CapabilitySet::IPC_LOCK);
    set_capabilities(None, sets).expect("less than before");
}

fn limit(bytes: u64) {
    let before = getrlimit(Resource::Memlock);
    setrlimit(Resource::Memlock, Rlimit { current: Some(bytes), ..before }).expect("a limit");
}

#[test]
fn rings_that_do_not_fit_are_refused_by_name_or_done_without() {
    become_somebody();
    limit(16 << 10);
    let refused = Rings::new(IoUringOptions::default()).expect_err("no room for one ring");
    let text = refused.to_string();
    assert!(text.contains("RLIMIT_MEMLOCK") && text.contains("16384 bytes"), "{text}");

    // Room for one or two. The kernel takes rings down in its own time.
    limit(128 << 10);
    let began = Instant::now();
    let rings = |require_rings| loop {
        match Rings::new(IoUringOptions { require_rings, ..IoUringOptions::default() }) {
            Ok(rings) => return rings,
            Err(error) => assert!(began.elapsed() < SOON, "{error}"),
        }
        thread::yield_now();
    };
    let there = TcpOptions { admission: Admission::Anyone, ..TcpOptions::default() };
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", there).expect("a port");
    let (here, there) = (TestMemory::new(&[PAGES.into()]), TestMemory::new(&[PAGES.into()]));
    here.fill(32);
    let link = || {
        let source = connect(acceptor.local_addr(), TcpOptions::default()).expect("it answers");
        (source, acceptor.accept(Some(SOON)).expect("a source came"))
    };

    let (source, destination) = link();
    let mut source = rings(true).source_link(source);
    source.register(here.memory()).expect("nothing is registered");
    let error = source.open_senders(CHANNELS).err().expect("no room for so many");
    let text = pageferry::Chain::of(&error).to_string();
    assert!(text.contains("RLIMIT_MEMLOCK") && text.contains("131072 bytes"), "{text}");
    drop((source, destination));

    let (source, destination) = link();
    let mut source = rings(false).source_link(source);
    let mut destination = rings(false).destination_link(destination);
    source.register(here.memory()).expect("nothing is registered");
    destination.register(there.memory()).expect("nothing is registered");
    thread::scope(|scope| {
        scope.spawn(|| {
            let receivers = destination.open_receivers(CHANNELS, SOON);
            let mut receivers = receivers.expect("channels are accepted without rings");
            while let Received::Batch(_) = receivers[0].receive().expect("a batch or the end") {}
        });
        let senders = source.open_senders(CHANNELS);
        let mut senders = senders.expect("channels open without rings");
        let range = PageRange { region: 0, first_page: 0, pages: PAGES };
        senders[0].send(&[Run { range, kind: RunKind::Data }]).expect("a batch goes out");
        senders[0].finish().expect("the channel ends");
    });
    assert_eq!(here.first_difference(&there), None);
}
