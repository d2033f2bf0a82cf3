//! Transports by name, with their options; what opens and awaits links by them.

mod begun;
pub mod facts;
mod link;
mod open;
mod rdma;
mod security;

use clap::ValueEnum;
use pageferry_tcp::ZeroCopy;
use serde::{Deserialize, Serialize};

pub(crate) use begun::Begun;
pub use link::{LinkArgs, OrOff};
pub use open::{Acceptor, Caller, Chosen};
pub use rdma::{RdmaArgs, RdmaRegistration, WITHOUT_RDMA};
pub use security::{KernelTlsChoice, SecurityArgs};

/// What moves the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// TCP sockets driven by io_uring where the kernel lets this process, and else without; RDMA with
    /// its options.
    Auto,
    /// TCP sockets.
    Tcp,
    /// TCP sockets driven by io_uring; the other side may have either.
    #[value(name = "iouring")]
    IoUring,
    /// RDMA: the source's NIC writes to the destination's memory. Addresses are those of RDMA
    /// devices. In programs that were built with it.
    Rdma,
}

impl Transport {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Tcp => "tcp",
            Self::IoUring => "iouring",
            Self::Rdma => "rdma",
        }
    }

    /// What is meant, given options that only one of them has.
    #[must_use]
    pub fn meant(self, rdma: &RdmaArgs) -> Self {
        if self == Self::Auto && rdma.is_given() { Self::Rdma } else { self }
    }
}

/// Whether the kernel is asked not to copy what it sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ZeroCopyChoice {
    /// As long as it pays: not where the kernel copies anyway, as on loopback.
    Auto,
    /// Never.
    Off,
    /// Always, also where the kernel copies anyway.
    On,
}

impl From<ZeroCopyChoice> for ZeroCopy {
    fn from(choice: ZeroCopyChoice) -> Self {
        match choice {
            ZeroCopyChoice::Auto => Self::Auto,
            ZeroCopyChoice::Off => Self::Off,
            ZeroCopyChoice::On => Self::On,
        }
    }
}
