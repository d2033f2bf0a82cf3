//! What the conformance suite does not see: registration and its cost, what is refused, peers that
//! die, and that nothing is left behind. Like the suite, where there is an RDMA device.

mod common;
mod connecting;
mod credits;
mod devices;
mod dying;
mod registration;
#[path = "../support/mod.rs"]
mod support;
