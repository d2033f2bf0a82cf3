//! A small but real VMM: the guest that pageferry's examples, tests and measurements move.
//!
//! A [`guest::Guest`] owns its memory ([`ram::Ram`]), its virtual CPUs and its devices (a serial
//! port and a heartbeat). It comes in two kinds with the same memory layout, workloads and
//! oracles: a KVM virtual machine running real guest code, and, where `/dev/kvm` is missing, a
//! process guest whose "virtual CPUs" are plain threads.
//!
//! The workloads ([`workload`]) dirty memory in ways whose result can be verified from memory
//! alone, so after a move the destination can tell by itself whether a page was lost.

pub mod choice;
mod config;
mod devices;
pub mod embed;
pub mod error;
pub mod guest;
pub mod heartbeat;
mod kind;
mod kvm;
pub mod layout;
mod linear;
mod process;
pub mod ram;
mod run_control;
mod serial;
pub mod snapshot;
pub mod state;
mod throttle;
pub mod tracking;
pub mod workload;
