//! Looking into streams: as trees of named values, to be printed and compared. Needs no types: the
//! bytes have their structure, a schema has their names.

mod diff;
mod parse;
mod print;

pub use diff::{Change, diff};
pub use parse::inspect;

use crate::kind::Kind;

/// Structures inside of structures, at most.
pub const MAX_DEPTH: u32 = 64;

/// A stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspected {
    /// Its sections, in its order.
    pub sections: Vec<InspectedSection>,
}

/// A section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InspectedSection {
    /// Which device's.
    pub name: String,
    /// Which of several such devices'.
    pub instance: u32,
    /// The writer's version of the device.
    pub version: u16,
    /// Offset in the stream.
    pub offset_bytes: u64,
    /// Length of its payload.
    pub payload_bytes: u64,
    /// What is in it.
    pub fields: Vec<Named>,
}

/// A value and its name: as the schema has it, or `#3` for tag 3 if there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// The name.
    pub name: String,
    /// The value.
    pub value: Item,
}

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Item {
    /// A truth value.
    Bool(bool),
    /// An unsigned number.
    Unsigned(u128),
    /// A signed number.
    Signed(i128),
    /// Text.
    Text(String),
    /// A list of scalars, as the stream has it.
    Scalars {
        /// What they are.
        kind: Kind,
        /// Their bytes.
        bytes: Vec<u8>,
    },
    /// A list of other things.
    List(Vec<Item>),
    /// An option without a value, and how many options it is the value of. Any other value of an option
    /// is the value.
    Nothing(u32),
    /// Fields and subsections.
    Struct {
        /// The writer's version.
        version: u16,
        /// What is in it.
        fields: Vec<Named>,
    },
    /// A variant of an enum.
    Variant {
        /// The writer's version.
        version: u16,
        /// Its name, or `#3` for tag 3.
        name: String,
        /// What is in it.
        fields: Vec<Named>,
    },
}

impl Item {
    /// A scalar from as many bytes as it is wide.
    pub(crate) fn scalar(kind: Kind, bytes: &[u8]) -> Self {
        let mut wide = [0; 16];
        let width = bytes.len().min(wide.len());
        wide[..width].copy_from_slice(&bytes[..width]);
        let unsigned = u128::from_le_bytes(wide);
        match kind {
            Kind::Bool => Self::Bool(unsigned != 0),
            Kind::I8 | Kind::I16 | Kind::I32 | Kind::I64 | Kind::I128 => {
                let unused_bits = 128 - 8 * u32::try_from(width).unwrap_or(16);
                // The sign goes up to the top and comes down again with its copies.
                Self::Signed((unsigned << unused_bits).cast_signed() >> unused_bits)
            }
            _ => Self::Unsigned(unsigned),
        }
    }
}
