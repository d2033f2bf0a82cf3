//! The dirty sources, each through the same suite.

mod bitmap;
mod cost;
mod direct;
mod foreign;
mod guest;
mod holes;
mod kvm;
mod process;
mod ring;
mod suite;
mod threads;
