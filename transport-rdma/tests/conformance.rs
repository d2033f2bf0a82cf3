//! RDMA passes the conformance suite, where there is an RDMA device (`ci/lab run --rxe`). Its
//! address is in `PAGEFERRY_RDMA_ADDRESS`.

mod support;

use std::time::Duration;

use pageferry::testing::conformance::acceptors::{self, Venue};
use pageferry::testing::conformance::{CASES, run_all};
use pageferry::transport::{DestinationLink, SourceLink, TransportError};
use pageferry_identity::testing::shared_key;
use pageferry_rdma::{Mtu, RdmaAcceptor, RdmaOptions, RegistrationMode, Security, connect};

fn suite(options: &RdmaOptions) {
    let Some(address) = support::address() else { return };
    run_all(&|| {
        let (source, destination) = support::linked(&address, options, options);
        (Box::new(source), Box::new(destination))
    });
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

/// Control frames in a session of TLS, and proofs on all other connections.
#[test]
fn with_a_shared_key() {
    let security = Security::Tls(shared_key());
    suite(&RdmaOptions { security, ..RdmaOptions::default() });
}

/// Several chunks, and pages that are sent before theirs is registered. A receiver registers them, so
/// that nothing goes out while nobody receives, which is what the cases that are left out begin with.
#[test]
fn with_registration_ahead() {
    const NOBODY_RECEIVES: [&str; 2] = ["a_look_does_not_wait", "a_wait_is_as_long_as_asked"];
    let options = RdmaOptions {
        registration: RegistrationMode::Ahead,
        chunk_bytes: 1 << 20,
        ..RdmaOptions::default()
    };
    let Some(address) = support::address() else { return };
    let cases = CASES.iter().filter(|case| !NOBODY_RECEIVES.contains(&case.name));
    assert_eq!(cases.clone().count(), CASES.len() - NOBODY_RECEIVES.len());
    let mut failures = Vec::new();
    for case in cases {
        eprintln!("conformance: {}", case.name);
        let result = case.try_run(&|| {
            let (source, destination) = support::linked(&address, &options, &options);
            (Box::new(source), Box::new(destination))
        });
        failures.extend(result.err());
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

struct Port(RdmaAcceptor);

impl Venue for Port {
    fn connect(&self) -> Result<Box<dyn SourceLink>, TransportError> {
        Ok(Box::new(connect(self.0.local_addr(), RdmaOptions::default())?))
    }

    fn accept(&self, timeout: Duration) -> Result<Box<dyn DestinationLink>, TransportError> {
        Ok(Box::new(self.0.accept(Some(timeout))?))
    }
}

#[test]
fn who_is_turned_away_hears_why() {
    let Some(address) = support::address() else { return };
    acceptors::run_all(&|| {
        let acceptor = RdmaAcceptor::bind((&*address, 0), RdmaOptions::default());
        Box::new(Port(acceptor.expect("the device listens")))
    });
}
