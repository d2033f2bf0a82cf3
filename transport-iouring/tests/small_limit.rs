//! A user who may lock less than the guest's memory. On its own, for the limit is the process's.

use std::thread;
use std::time::Duration;

use pageferry::memory::PageRange;
use pageferry::testing::{TestMemory, lock_at_most};
use pageferry::transport::{
    Admission, DestinationLink, Link, Received, Run, RunKind, SourceLink, TransportError,
};
use pageferry_iouring::{IoUringOptions, Rings, ZeroCopy};
use pageferry_tcp::{TcpAcceptor, TcpOptions, connect};

const SOON: Duration = Duration::from_secs(20);
const REGION_PAGES: u32 = 4096;
const BATCH_PAGES: u32 = 1024;

#[test]
fn what_does_not_fit_is_copied() {
    lock_at_most(2 << 20);
    let options = IoUringOptions { zero_copy: ZeroCopy::On, ..IoUringOptions::default() };
    let tcp = TcpOptions::default;
    let there = TcpOptions { admission: Admission::Anyone, ..tcp() };
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", there).expect("a port of loopback");
    let (here, there) =
        (TestMemory::new(&[REGION_PAGES.into()]), TestMemory::new(&[REGION_PAGES.into()]));
    here.fill(5);

    let rings = Rings::new(options.clone()).expect("this kernel has io_uring");
    let tcp_link = connect(acceptor.local_addr(), tcp()).expect("the acceptor answers");
    let mut source = rings.source_link(tcp_link);
    let refused = source.register(here.memory()).expect_err("16 MiB are too much");
    assert!(matches!(refused, TransportError::Register { .. }), "{refused:?}");
    assert!(refused.to_string().contains("RLIMIT_MEMLOCK"), "{refused}");
    drop((source, acceptor.accept(Some(SOON))));

    let options = IoUringOptions { require_registration: false, ..options };
    let rings = Rings::new(options).expect("this kernel has io_uring");
    let tcp_link = connect(acceptor.local_addr(), tcp()).expect("the acceptor answers");
    let mut source = rings.source_link(tcp_link);
    let accepted = acceptor.accept(Some(SOON)).expect("a source came");
    let mut destination = rings.destination_link(accepted);
    let cost = source.register(here.memory()).expect("it goes on without");
    assert_eq!(cost.registered_bytes, 0);
    destination.register(there.memory()).expect("nothing is registered");
    let sends_zero_copy = source.capabilities().zero_copy;

    thread::scope(|scope| {
        scope.spawn(|| {
            let mut receivers = destination.open_receivers(1, SOON).expect("a channel is accepted");
            while let Received::Batch(_) = receivers[0].receive().expect("a batch or the end") {}
        });
        let mut sender = source.open_senders(1).expect("a channel opens").remove(0);
        for first_page in (0..u64::from(REGION_PAGES)).step_by(BATCH_PAGES as usize) {
            let range = PageRange { region: 0, first_page, pages: BATCH_PAGES };
            sender.send(&[Run { range, kind: RunKind::Data }]).expect("a batch goes out");
        }
        sender.finish().expect("the channel ends");
        let counts = sender.counters().zero_copy;
        let all_bytes = u64::from(REGION_PAGES) * 4096;
        if sends_zero_copy {
            assert!((1..all_bytes).contains(&counts.sent_bytes), "a part fits: {counts:?}");
        } else {
            assert_eq!(counts.sent, 0);
        }
    });
    assert_eq!(here.first_difference(&there), None);
}
