//! A user who may lock less than the guest's memory. On its own, for the limit is the process's.

mod support;

use std::thread;

use pageferry::memory::PageRange;
use pageferry::testing::{TestMemory, lock_at_most};
use pageferry::transport::{
    DestinationLink, Link, Received, Run, RunKind, SourceLink, TransportError,
};
use pageferry_rdma::{RdmaOptions, RegistrationMode};
use support::{SOON, address, linked};

/// What the connections of both ends need, and a little of guest memory.
const LIMIT_BYTES: u64 = 6 << 20;
const REGION_PAGES: u32 = 4096;

fn expect_advice(error: &TransportError) {
    assert!(matches!(error, TransportError::Register { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("RLIMIT_MEMLOCK") && text.contains("6144 KiB"), "{text}");
}

#[test]
fn the_limit_is_named() {
    let Some(address) = address() else { return };
    lock_at_most(LIMIT_BYTES);
    let (here, there) =
        (TestMemory::new(&[REGION_PAGES.into()]), TestMemory::new(&[REGION_PAGES.into()]));
    here.fill(1);
    let with =
        |registration| RdmaOptions { registration, chunk_bytes: 1 << 20, ..RdmaOptions::default() };

    let all = with(RegistrationMode::AtStart);
    let (mut source, mut destination) = linked(&address, &all, &all);
    expect_advice(&source.register(here.memory()).expect_err("16 MiB are too much"));
    expect_advice(&destination.register(there.memory()).expect_err("16 MiB are too much"));
    drop((source, destination));

    // What was registered before the limit was met is let go: there is room for the connections.
    let ahead = with(RegistrationMode::Ahead);
    let (mut source, mut destination) = linked(&address, &ahead, &ahead);
    source.register(here.memory()).expect("nothing is registered yet");
    destination.register(there.memory()).expect("nothing is registered yet");
    thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let mut receivers = destination.open_receivers(1, SOON).expect("a channel is accepted");
            loop {
                match receivers[0].receive() {
                    Ok(Received::Batch(_)) => {}
                    Ok(Received::End) => panic!("the source cannot have sent all"),
                    Err(error) => return error,
                }
            }
        });
        let mut sender = source.open_senders(1).expect("a channel opens").remove(0);
        let range = PageRange { region: 0, first_page: 0, pages: REGION_PAGES };
        let result = sender.send(&[Run { range, kind: RunKind::Data }]);
        assert!(result.is_err(), "{result:?}");
        expect_advice(&receiving.join().expect("no panic"));
    });
}
