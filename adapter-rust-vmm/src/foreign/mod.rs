//! Dirty tracking of what *another* process writes: a VMM that is left as it is.
//!
//! Guest memory is a file that both processes have mapped, the VMM as its guest's RAM and this one to
//! read it. What the VMM's threads, its vCPUs and the kernel on their behalf write goes through the VMM's
//! page tables, and those can be watched from here:
//!
//! - [`ForeignPagemapScan`] is [`PagemapScan`](crate::PagemapScan) from outside. It needs Linux 6.7 and a
//!   userfaultfd that was made in the other process, [`ForeignUserfaultfd`].
//! - [`SoftDirty`] is for kernels before that: soft-dirty bits, which are read and cleared in two steps, so that
//!   the other process has to stand still for each harvest.
//!
//! Neither sees what is written past those page tables: by other mappings of the file (vhost-user), by devices
//! (VFIO, vDPA), by kernel threads with tables of their own (vhost), and by `O_DIRECT` reads and the like
//! if a harvest falls between their start and their end; see
//! [`PagemapScan`](crate::PagemapScan). For those last there is [`Pulsed`], which has the other process stand still
//! while it is looked at.

mod call;
mod entries;
mod error;
mod process;
#[cfg(target_arch = "x86_64")]
mod ptrace;
mod scan;
mod soft_dirty;
mod standstill;
mod touched;

pub use call::ForeignUserfaultfd;
pub use error::ForeignError;
pub use process::ForeignProcess;
pub use scan::{ForeignPagemapScan, ForeignPagemapTracker};
pub use soft_dirty::{SoftDirty, SoftDirtyError, SoftDirtyTracker};
pub use standstill::{Pulsed, Standstill, StandstillError};
