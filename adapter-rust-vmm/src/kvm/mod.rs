//! Dirty tracking of vCPUs by KVM: its [dirty log](KvmDirtyLog) and its
//! [dirty ring](KvmDirtyRing).

mod ioctl;
mod log;
mod logging;
mod ring;
mod slots;

pub use log::{KvmDirtyLog, KvmLogError, LogProtocol};
pub use logging::SwitchError;
pub use ring::{DirtyRings, KVM_EXIT_DIRTY_RING_FULL, KvmDirtyRing, KvmRingError, VcpuRing};
pub use slots::{KvmSlot, SlotError};
