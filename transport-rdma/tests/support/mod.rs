//! What the tests have in common: the device's address, and two ends of a link over it.

mod device;

use std::thread;
use std::time::Duration;

use pageferry::transport::Admission;
use pageferry_rdma::{RdmaAcceptor, RdmaDestinationLink, RdmaOptions, RdmaSourceLink, connect};

pub(crate) use device::address;

/// A bound on everything that should take no time.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// The links of these tests have a protocol of their own.
pub(crate) fn of_anyone(options: RdmaOptions) -> RdmaOptions {
    RdmaOptions { admission: Admission::Anyone, ..options }
}

pub(crate) fn linked(
    address: &str,
    here: &RdmaOptions,
    there: &RdmaOptions,
) -> (RdmaSourceLink, RdmaDestinationLink) {
    let acceptor =
        RdmaAcceptor::bind((address, 0), of_anyone(there.clone())).expect("the device listens");
    let to = acceptor.local_addr();
    thread::scope(|scope| {
        let source = scope.spawn(|| connect(to, here.clone()));
        let destination = acceptor.accept(Some(SOON)).expect("a source came");
        (source.join().expect("no panic").expect("the acceptor answers"), destination)
    })
}
