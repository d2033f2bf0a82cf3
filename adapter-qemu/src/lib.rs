//! Guests of an unmodified QEMU, moved by [`pageferry`] from outside.
//!
//! QEMU's RAM is a file that it shares. Pages go straight from the file at the source into the file at the
//! destination; what the running QEMU writes meanwhile is seen by its page tables, from outside
//! ([`pageferry_rust_vmm::foreign`]); QEMU itself moves nothing but device state.
//!
//! - [`qmp`] is QEMU's machine protocol.
//! - [`ram`] finds the files of a guest's RAM, or makes them, and maps them.
//! - [`preflight`] finds what writes RAM unseen, and refuses the guest.
//! - [`Tracking`] is how its writes are seen, and [`QemuPulses`] has it stand still where that takes it.
//! - [`quota`] slows a guest down that writes too fast.
//! - [`record`] is who has the guest, in a file that outlives the program.
//! - [`QemuSource`] and [`QemuDestination`] are the engine's [`Machine`](pageferry::machine::Machine) at either
//!   side.

#[cfg(not(target_os = "linux"))]
compile_error!("this crate needs Linux: userfaultfd and /proc are Linux's");

mod description;
mod destination;
mod device_state;
mod incoming;
mod monitor;
pub mod preflight;
pub mod qmp;
pub mod quota;
pub mod ram;
pub mod record;
mod source;
#[cfg(feature = "test-support")]
pub mod testing;
mod tracking;
mod userfaultfd;

pub use description::{Mismatch, Vm};
pub use destination::QemuDestination;
pub use device_state::DeviceStateError;
pub use incoming::{IncomingError, QemuCommand};
pub use monitor::RunState;
pub use qmp::{Qmp, QmpError};
pub use source::{QemuSource, SourceError};
pub use tracking::{PulseStatistics, QemuPulses, Tracking, TrackingError};
