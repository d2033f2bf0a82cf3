//! What a VMM built from rust-vmm crates needs to embed [`pageferry`].
//!
//! - [`memory`] describes guest memory held by `vm-memory` to the engine, without unsafe code on
//!   the VMM's side.
//! - [`kvm`] tracks what vCPUs write, by KVM's dirty log or its dirty rings.
//! - [`bitmap`] tracks what the VMM writes itself, by `vm-memory`'s bitmaps.
//! - [`direct`] tracks what the VMM has written past the page tables, by what it says of it.
//! - [`pagemap`] and [`uffd_wp`] track what anything in this process writes, by userfaultfd
//!   write-protection; they need no KVM. [`process`] picks one of the two.
//! - [`foreign`] tracks what *another* process writes, a VMM that is left as it is.
//! - [`uffd_faults`] holds back who touches a page that is missing, for post-copy.
//! - `time` (x86-64) reads and sets the time of a guest at one moment for all its vCPUs.
//! - `cpu` (x86-64) says before anything moves whether a host's KVM has what the guest's virtual CPUs are made of.
//!
//! # Which dirty source
//!
//! [`KvmDirtyLog`] and [`KvmDirtyRing`] are cheap and see vCPUs only. A harvest of the log costs
//! by the size of memory, one of the rings by the pages written; the rings slow a vCPU down that
//! writes faster than it is harvested, and have to be enabled when the VM is made. Either needs
//! an [`AtomicBitmapSource`] beside it if devices are emulated in this process (the engine unites
//! sources).
//!
//! [`PagemapScan`] sees every write that goes through this process's page tables, which are vCPUs
//! (KVM follows the page tables), device emulation and buffered system calls alike; it costs the guest a
//! page fault in the host for each page it writes first after a harvest. [`UffdWp`] sees the same
//! on kernels before 6.7, where each such fault waits for a thread of this process too.
//!
//! None of them sees what comes by pages that were pinned before, if a harvest falls between: `O_DIRECT`
//! reads, io_uring's registered buffers, `process_vm_writev`. [`DirectWrites`] beside them does, for the
//! VMM tells it. Nor does any see DMA by a device that was given the memory for good (VFIO), or
//! what other processes write to their own mappings of it (vhost-user): those have logs of their own, which
//! a VMM makes a [`DirtySource`](pageferry::dirty::DirtySource) of.

#[cfg(not(target_os = "linux"))]
compile_error!("this crate needs Linux: KVM and userfaultfd are Linux's");

mod addresses;
pub mod bitmap;
mod bits;
mod carry;
#[cfg(target_arch = "x86_64")]
pub mod cpu;
pub mod direct;
pub mod foreign;
pub mod kvm;
pub mod memory;
mod misuse;
pub mod pagemap;
mod pages;
pub mod process;
#[cfg(target_arch = "x86_64")]
pub mod time;
mod tracked;
mod uffd;
pub mod uffd_faults;
pub mod uffd_wp;

pub use bitmap::AtomicBitmapSource;
pub use direct::{DirectWrite, DirectWrites};
pub use foreign::{ForeignPagemapScan, ForeignProcess, ForeignUserfaultfd, SoftDirty};
pub use kvm::{DirtyRings, KvmDirtyLog, KvmDirtyRing, KvmSlot, LogProtocol, VcpuRing};
pub use memory::guest_memory;
pub use misuse::MisuseError;
pub use pagemap::PagemapScan;
pub use process::process_memory_source;
pub use tracked::{Tracked, Tracker};
pub use uffd_faults::UffdFaults;
pub use uffd_wp::UffdWp;
