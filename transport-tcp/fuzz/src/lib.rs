//! What the targets share: how an input is read, a guest, and its other side.

pub mod guest;
pub mod input;
pub mod peer;
