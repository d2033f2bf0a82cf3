//! What a VMM built from rust-vmm crates needs to embed [`pageferry`].
//!
//! - [`memory`] describes guest memory held by `vm-memory` to the engine, without unsafe code on
//!   the VMM's side.
//! - [`kvm`] tracks what vCPUs write, by KVM's dirty log.
//! - [`pagemap`] tracks what anything in this process writes, by userfaultfd write-protection
//!   and `PAGEMAP_SCAN`; it needs no KVM.
//!
//! # Which dirty source
//!
//! [`KvmDirtyLog`] is cheap and sees vCPUs only: what the VMM's device emulation writes needs a
//! source of its own beside it (the engine unites them). [`PagemapScan`] sees every write that
//! goes through this process's page tables, which are vCPUs (KVM follows the page tables),
//! device emulation and system calls alike; it costs the guest a page fault in the host for each
//! page it writes first after a harvest. Neither sees DMA by a device that was given the memory
//! (VFIO), nor other processes (vhost-user).

mod bits;
mod carry;
pub mod kvm;
pub mod memory;
mod misuse;
pub mod pagemap;

pub use kvm::{KvmDirtyLog, KvmSlot, LogProtocol};
pub use memory::guest_memory;
pub use misuse::MisuseError;
pub use pagemap::PagemapScan;
