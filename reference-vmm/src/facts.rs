//! What the transports of this program can do here, for reports.

use pageferry_iouring::{IoUringOptions, Rings};
use pageferry_report::facts::TransportFacts;

/// Those that need no device.
pub fn transports() -> Vec<TransportFacts> {
    let iouring = match Rings::new(IoUringOptions::default()) {
        Ok(rings) => (true, format!("{:?}", rings.features())),
        Err(unavailable) => (false, unavailable.to_string()),
    };
    let tcp = (true, "sendmsg from guest memory, MSG_ZEROCOPY where it pays".to_owned());
    [("tcp", tcp), ("iouring", iouring)]
        .map(|(name, (available, can))| TransportFacts { name: name.to_owned(), can, available })
        .into()
}
