//! The dirty sources, each through the same suite.

mod cost;
mod guest;
mod kvm;
mod pagemap;
mod suite;
