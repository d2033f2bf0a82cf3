//! The path of a page, up to the thread that sends it: where it is, whether it is dirty, who owns it.

pub(crate) mod ahead;
pub mod digest;
pub mod dirty;
pub mod faults;
pub mod ledger;
pub mod memory;
pub mod partition;
pub mod sums;
mod sync;
