//! RDMA passes the conformance suite, where there is an RDMA device (`ci/lab run --rxe`). Its
//! address is in `PAGEFERRY_RDMA_ADDRESS`.

use std::thread;
use std::time::Duration;

use pageferry::testing::conformance::{CASES, Pair};
use pageferry_rdma::{Mtu, RdmaAcceptor, RdmaOptions, connect};

/// The address of this host's RDMA device; `None` and why, loudly, where there is none.
fn address() -> Option<String> {
    if let Err(unavailable) = pageferry_rdma::available() {
        eprintln!("conformance over RDMA skipped, because {unavailable}");
        return None;
    }
    let address = std::env::var("PAGEFERRY_RDMA_ADDRESS").ok();
    if address.is_none() {
        eprintln!(
            "conformance over RDMA skipped, because PAGEFERRY_RDMA_ADDRESS does not name an RDMA device's address"
        );
    }
    address
}

fn pair_at(address: &str, options: &RdmaOptions) -> Pair {
    let acceptor = RdmaAcceptor::bind((address, 0), options.clone()).expect("the device listens");
    let to = acceptor.local_addr();
    thread::scope(|scope| {
        let source = scope.spawn(|| connect(to, options.clone()));
        let destination = acceptor.accept(Some(Duration::from_secs(20))).expect("a source came");
        let source = source.join().expect("no panic").expect("the acceptor answers");
        (Box::new(source) as _, Box::new(destination) as _)
    })
}

fn suite(options: &RdmaOptions) {
    let Some(address) = address() else { return };
    for (name, case) in CASES {
        eprintln!("conformance: {name}");
        case(&|| pair_at(&address, options));
    }
}

#[test]
fn with_the_defaults() {
    suite(&RdmaOptions::default());
}

/// Queues that are full all the time, writes of one page, the smallest packets.
#[test]
fn with_everything_as_small_as_can_be() {
    suite(&RdmaOptions {
        mtu: Some(Mtu::Bytes256),
        chunk_bytes: 1 << 20,
        slice_bytes: 4096,
        signal_every: 1,
        send_queue_depth: 4,
        ..RdmaOptions::default()
    });
}
