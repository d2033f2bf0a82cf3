//! What the targets share: how an input is read, a guest, and memory that is counted.

pub mod allocator;
pub mod guest;
pub mod input;
pub mod peer;
