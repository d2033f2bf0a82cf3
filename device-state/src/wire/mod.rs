//! The bytes: see `docs/device-state.md` for diagrams.

mod name;
mod reader;
mod writer;

pub use name::MAX_NAME_BYTES;
pub use reader::Reader;
pub use writer::Writer;

pub(crate) use name::{check_name, is_name};
pub(crate) use reader::expect_kind;

/// The format that this crate writes and reads. It is of the bytes around the fields; what the
/// fields are is told by the versions of sections.
pub const FORMAT: u16 = 1;

/// Tag of what is no field but a subsection.
pub(crate) const SUBSECTION_TAG: u16 = 0;
