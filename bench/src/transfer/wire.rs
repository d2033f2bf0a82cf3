//! What the program and its two sides tell each other.

use std::net::SocketAddr;

use pageferry_cli::transport::ZeroCopyChoice;
use pageferry_report::document::ZeroCopy;
use pageferry_vmm::ram::Backing;
use serde::{Deserialize, Serialize};

use crate::links::Way;

/// What both sides must know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) memory_bytes: u64,
    pub(crate) backing: Backing,
    pub(crate) zero_share: f64,
    pub(crate) dirty_rate: u32,
    pub(crate) way: Way,
    pub(crate) channels: u16,
    pub(crate) zero_copy: ZeroCopyChoice,
    pub(crate) batch_bytes: Option<u64>,
    pub(crate) populate_threads: u16,
}

/// To a side.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// The first, once. Answered by `Ready`.
    Prepare(Setup),
    /// To a destination: map fresh memory and listen. Answered by `Listening`, and `Measured`.
    Receive(Contestant),
    /// To a source: move the memory to this address. Answered by `Measured`.
    Send(Contestant, SocketAddr),
    /// Read all memory. Answered by `Digest`.
    Digest,
}

/// From a side.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    Ready,
    Listening(SocketAddr),
    Measured(Measured),
    Digest(String),
}

/// Who moves the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Contestant {
    Engine,
    Bare,
}

impl std::fmt::Display for Contestant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Engine => "engine",
            Self::Bare => "bare loop",
        })
    }
}

/// What one side saw of one transfer.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// From the first byte to the last one landed; by the source's clock, 0 at a destination.
    pub(crate) nanoseconds: u64,
    /// Page bytes that were sent.
    pub(crate) payload_bytes: u64,
    /// CPU time of all threads, in user space and in the kernel.
    pub(crate) cpu_nanoseconds: u64,
    /// System calls that moved data.
    pub(crate) system_calls: u64,
    /// Page bytes copied in user space.
    pub(crate) user_copied_bytes: u64,
    pub(crate) zero_copy: ZeroCopy,
    /// Looks for completions of a NIC.
    pub(crate) polls: u64,
    /// How far the process grew, without guest memory; `None` where the kernel does not tell.
    pub(crate) peak_bytes: Option<u64>,
}
