//! Whole migrations over the in-memory transport: with a guest that writes all the time, with
//! every kind of trouble, and with machines that refuse.

mod bandwidth;
mod cancelling;
mod channels;
mod damaged;
mod guest_ends;
mod links;
mod machines;
mod memory;
mod opening;
mod paused;
mod refused;
mod scene;
mod story;
#[path = "../support/mod.rs"]
mod support;
mod trial;
mod watched;
