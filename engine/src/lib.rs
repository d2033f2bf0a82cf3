//! A live-migration engine that VMMs embed.
//!
//! pageferry moves a running guest to another host while it keeps working. Its pages go straight
//! from guest memory through sender threads that each own a part of the dirty bitmap, and land
//! straight in the destination's guest memory; for a few milliseconds at the end the guest stands
//! still. What moves the bytes is a [transport] chosen at run time; the engine knows none by
//! name.
//!
//! A VMM implements [`Machine`], describes its guest's memory ([`memory::GuestMemory`]) and its
//! dirty trackers ([`dirty::DirtySource`]), and calls [`Source::migrate`] on one host and
//! [`Destination::negotiate`] on the other. Both block, spawn their threads through a
//! [hook](threads::Spawn), and give the machine back whatever happens.
//!
//! A page's way reads as a straight line through the modules: [`memory`] → [`dirty`] →
//! [`partition`] → [`ledger`] → sender → [`transport`] ‖ receiver → [`memory`]. Beside it runs the control
//! plane: [`protocol`] → [`convergence`] → [`handover`] → [`stats`].

mod blocking;
mod config;
mod control;
pub mod error;
mod host;
pub mod machine;
mod migration;
mod pages;
pub mod progress;
pub mod snapshot;
pub mod stats;
#[cfg(feature = "test-support")]
pub mod testing;
pub mod threads;
pub mod transport;

pub use control::{convergence, handover, protocol};
pub use migration::{destination, source};
pub use pages::{digest, dirty, faults, ledger, memory, partition, sums};

pub use config::{MAX_CHANNELS, PageChecks, Timeouts};
pub use destination::{Arrived, Destination, DestinationFailure, GuestAtDestination, Offer};
pub use error::{Blame, Chain, Error, UNCERTAIN_AT_DESTINATION, UNCERTAIN_AT_SOURCE};
pub use machine::{GuestAlarm, Machine, MachineError, Rehearsal};
pub use progress::{Event, MigrationHandle, SwitchoverStage};
pub use snapshot::{ChannelSnapshot, Phase, Snapshot};
pub use source::{Departed, GuestAtSource, Source, SourceFailure, Tried};
pub use stats::{Downtime, Ending, MAX_ROUNDS_KEPT, Statistics};
