//! What the transports of this program can do here, for reports.

use pageferry_iouring::{IoUringOptions, Rings};
use pageferry_report::facts::TransportFacts;

/// Those that are built in.
pub fn transports() -> Vec<TransportFacts> {
    let iouring = match Rings::new(IoUringOptions::default()) {
        Ok(rings) => (true, format!("{:?}", rings.features())),
        Err(unavailable) => (false, unavailable.to_string()),
    };
    let tcp = (true, "sendmsg from guest memory, MSG_ZEROCOPY where it pays".to_owned());
    let all = [
        ("tcp", tcp),
        ("iouring", iouring),
        #[cfg(feature = "rdma")]
        ("rdma", rdma()),
    ];
    all.map(|(name, (available, can))| TransportFacts { name: name.to_owned(), can, available })
        .into()
}

#[cfg(feature = "rdma")]
fn rdma() -> (bool, String) {
    match pageferry_rdma::available() {
        Ok(()) => (true, "one-sided writes from guest memory to guest memory".to_owned()),
        Err(unavailable) => (false, unavailable.to_string()),
    }
}
