//! Guests for tests and measurements, behind the feature `test-support`, that check themselves: a Linux with one
//! program, under QEMU's TCG, which every host runs; or a program alone, for KVM that is too slow for Linux.
//!
//! - [`Guests`] is what they are made of, with QEMU's arguments for them;
//! - [`Console`] is what a guest says: whole passes over its memory, and errors;
//! - [`Running`] is a QEMU with a monitor.

mod boot;
mod console;
mod guests;
mod running;

pub use console::{Console, Word};
pub use guests::{Disk, Guests, QEMU, qemu_version};
pub use running::Running;
