//! Versioned device state of virtual machines: described once, checked before it is moved.
//!
//! A device declares its fields with [`DeviceState`]:
//!
//! ```
//! use pageferry_device_state::{DeviceState, Registry};
//!
//! #[derive(DeviceState, Default)]
//! #[device_state(name = "timer", version = 2)]
//! struct Timer {
//!     #[device_state(tag = 1)]
//!     ticks: u64,
//!     #[device_state(tag = 2, since = 2, default = 1000)]
//!     hertz: u32,
//! }
//!
//! let mut timer = Timer { ticks: 7, hertz: 250 };
//! let mut machine = Registry::new();
//! machine.add(0, &mut timer)?;
//! let saved = machine.save()?;
//!
//! let mut elsewhere = Timer::default();
//! let mut machine = Registry::new();
//! machine.add(0, &mut elsewhere)?;
//! machine.load(&saved)?;
//! drop(machine);
//! assert_eq!((elsewhere.ticks, elsewhere.hertz), (7, 250));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! From this one description come the bytes ([`to_bytes`], [`Registry::save`]), the way back
//! ([`from_bytes`], [`Registry::load`]), the [`Schema`] that two programs compare before anything
//! is moved ([`Schema::reads`]), and the names that [`inspect()`] and [`diff`](inspect::diff) print.
//! `docs/device-state.md` is a tutorial, and has the bytes.
//!
//! # Attributes
//!
//! On the type:
//!
//! | | |
//! |---|---|
//! | `name = "serial"` | makes it a [`Section`] |
//! | `version = 2`, `min_version = 1` | what is written, the oldest that is read; 1 unless given |
//! | `priority = 10`, `after = "irqchip"` | order in a [`Registry`] |
//! | `retired(tag = 3, until = 2)` | a field that versions up to 2 had |
//! | `pre_save = path`, `post_load = path` | `fn(&mut Self) -> Result<(), E>`, before encoding and after decoding |
//!
//! On a field:
//!
//! | | |
//! |---|---|
//! | `tag = 3` | identifies it, in all versions |
//! | `since = 2`, `default`, `default = expression` | came with version 2; what it is in older state |
//! | `max_len = 4096` | bound of each list and text in it |
//! | `with = path` | an [`Adapter`](codec::Adapter) for a type of others; reaches into `Option`, `Vec` and arrays |
//! | `rename = "…"` | its name in schemas and print-outs |
//! | `skip` | is not saved: stays as it is in place, and is `Default::default()` in a new value |
//! | `subsection = "serial/fifo"`, `needed = path` | a struct that is sent if `fn(&Self) -> bool` says so, and is its default otherwise |
//!
//! On a variant of an enum: `tag`, `since`, `rename`; its fields as above.
//!
//! Types must not contain themselves.
//!
//! # Thread safety
//!
//! There is no state besides what is passed in. Everything can be used from any thread.

mod declare;
mod error;
mod kind;
mod registry;
mod single;
mod stream;
mod wire;

pub mod codec;
pub mod inspect;
pub mod schema;

pub use codec::Codec;
pub use declare::{
    Declared, DeviceState, Field, Retired, Section, Subsection, Value, Variant, Visitor,
};
pub use error::{DecodeError, EncodeError, EncodeProblem, HookError, Place, Problem};
pub use inspect::inspect;
pub use kind::Kind;
pub use pageferry_device_state_derive::DeviceState;
pub use registry::{Component, LoadError, OrderError, RegisterError, Registry, SaveError};
pub use schema::Schema;
pub use single::{from_bytes, to_bytes};
pub use stream::{MAGIC, RawSection, StreamWriter, sections};
pub use wire::{FORMAT, MAX_NAME_BYTES, Reader, Writer};
