//! Zero-copy that was asked for, from memory in huge pages: not slower by orders of magnitude.
#![expect(unsafe_code, reason = "asks for huge pages by address")]

use std::thread;
use std::time::{Duration, Instant};

use pageferry::memory::PageRange;
use pageferry::testing::TestMemory;
use pageferry::transport::{Admission, DestinationLink, Link, Received, Run, RunKind, SourceLink};
use pageferry_iouring::{IoUringOptions, Rings, ZeroCopy};
use pageferry_tcp::{TcpAcceptor, TcpOptions, connect};
use rustix::mm::{Advice, madvise};

const SOON: Duration = Duration::from_secs(20);
const PAGES: u32 = 16384;
/// What takes a tenth of a second, and a loaded machine some tenths; a packet at a time, each
/// waiting for its delayed acknowledgement, it takes twenty seconds.
const ENOUGH: Duration = Duration::from_secs(5);

#[test]
fn a_send_buffer_holds_more_than_one_packet() {
    let memory = TestMemory::new(&[u64::from(PAGES)]);
    let there = TestMemory::new(&[u64::from(PAGES)]);
    let start = memory.memory().regions()[0].host_addr;
    let len_bytes = PAGES as usize * 4096;
    // SAFETY: a mapping of this test, in which nothing changes but how it is backed.
    let asked = unsafe { madvise(start.cast(), len_bytes, Advice::LinuxHugepage) };
    memory.fill(31);

    let options = IoUringOptions { zero_copy: ZeroCopy::On, ..IoUringOptions::default() };
    let rings = Rings::new(options).expect("this kernel has io_uring");
    let options = TcpOptions { admission: Admission::Anyone, ..TcpOptions::default() };
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", options).expect("a port");
    let link = connect(acceptor.local_addr(), TcpOptions::default()).expect("it answers");
    let mut source = rings.source_link(link);
    let accepted = acceptor.accept(Some(SOON)).expect("a source came");
    let mut destination = rings.destination_link(accepted);
    source.register(memory.memory()).expect("source memory registers");
    destination.register(there.memory()).expect("nothing is registered");
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut receivers = destination.open_receivers(1, SOON).expect("a channel is accepted");
            while let Received::Batch(_) = receivers[0].receive().expect("a batch or the end") {}
        });
        let mut sender = source.open_senders(1).expect("a channel opens").remove(0);
        let began = Instant::now();
        let mut last = 0;
        for first_page in (0..PAGES).step_by(1024) {
            let range = PageRange { region: 0, first_page: first_page.into(), pages: 1024 };
            last = sender.send(&[Run { range, kind: RunKind::Data }]).expect("a batch goes out");
        }
        while sender.watermarks(Some(SOON)).expect("watermarks").landed < last {}
        let took = began.elapsed();
        sender.finish().expect("the channel ends");
        let counters = sender.counters();
        assert!(took < ENOUGH, "64 MiB took {took:?}, huge pages {asked:?}: {counters:?}");
    });
    assert_eq!(memory.first_difference(&there), None);
}
