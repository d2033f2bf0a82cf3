//! Schemas: what is saved, as data that can be kept, sent and compared.

mod check;
mod difference;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::kind::Kind;
use crate::wire::FORMAT;

pub use check::{Compatibility, Verdict};
pub use difference::{Difference, Finding, Severity};

/// Longest schema that [`Schema::from_json`] reads, in bytes.
pub const MAX_SCHEMA_BYTES: usize = 256 << 10;

/// All sections that a machine, or a program, saves and loads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schema {
    /// Format of streams.
    pub format: u16,
    /// The sections, by name.
    pub sections: Vec<SectionSchema>,
}

/// A section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SectionSchema {
    /// Its name.
    pub name: String,
    /// Its instances in a machine; empty in the schema of a program.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub instances: Vec<u32>,
    /// What is in it.
    pub state: StructSchema,
}

/// A struct.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StructSchema {
    /// The version that is written.
    pub version: u16,
    /// The oldest version that is read.
    pub min_version: u16,
    /// Its fields, by tag.
    pub fields: Vec<FieldSchema>,
    /// Its subsections, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subsections: Vec<SubsectionSchema>,
    /// Tags that are not used any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retired: Vec<RetiredSchema>,
}

/// A field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FieldSchema {
    /// Identifies it.
    pub tag: u16,
    /// Its name.
    pub name: String,
    /// The version that brought it.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub since: u16,
    /// Whether it has a default for older versions.
    #[serde(default, skip_serializing_if = "is_false")]
    pub has_default: bool,
    /// Its type.
    #[serde(rename = "type")]
    pub shape: Shape,
}

/// A part that is sent when it is needed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubsectionSchema {
    /// Identifies it.
    pub name: String,
    /// What is in it.
    pub state: StructSchema,
}

/// A tag that older versions had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetiredSchema {
    /// The tag.
    pub tag: u16,
    /// The last version that had it.
    pub until: u16,
}

/// An enum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnumSchema {
    /// The version that is written.
    pub version: u16,
    /// The oldest version that is read.
    pub min_version: u16,
    /// Its variants.
    pub variants: Vec<VariantSchema>,
}

/// A variant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VariantSchema {
    /// Identifies it.
    pub tag: u16,
    /// Its name.
    pub name: String,
    /// The version that brought it.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub since: u16,
    /// Its fields, by tag.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<FieldSchema>,
}

/// A type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Shape {
    /// 0 or 1.
    Bool,
    /// Unsigned, 8 bits.
    U8,
    /// Unsigned, 16 bits.
    U16,
    /// Unsigned, 32 bits.
    U32,
    /// Unsigned, 64 bits.
    U64,
    /// Unsigned, 128 bits.
    U128,
    /// Two's complement, 8 bits.
    I8,
    /// Two's complement, 16 bits.
    I16,
    /// Two's complement, 32 bits.
    I32,
    /// Two's complement, 64 bits.
    I64,
    /// Two's complement, 128 bits.
    I128,
    /// UTF-8.
    Text {
        /// Most bytes.
        max_len: u32,
    },
    /// Values of one type.
    List {
        /// Which.
        element: Box<Shape>,
        /// How many.
        len: Length,
    },
    /// A value or nothing.
    Option(Box<Shape>),
    /// Fields and subsections.
    Struct(StructSchema),
    /// One of several variants.
    Enum(EnumSchema),
}

/// Number of elements of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Length {
    /// So many.
    Exactly(u32),
    /// Up to so many.
    AtMost(u32),
}

fn one() -> u16 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it")]
fn is_one(version: &u16) -> bool {
    *version == 1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it")]
fn is_false(flag: &bool) -> bool {
    !*flag
}

/// Why text is no schema.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SchemaError {
    /// It is too long.
    #[error("failed to read a schema: {found} bytes, at most {MAX_SCHEMA_BYTES} are read")]
    TooLong {
        /// How long.
        found: usize,
    },
    /// It is not the JSON of a schema.
    #[error("failed to read a schema")]
    Json(#[from] serde_json::Error),
}

impl Schema {
    /// Of no sections.
    pub fn new() -> Self {
        Self { format: FORMAT, sections: Vec::new() }
    }

    /// Adds a section, or an instance of it.
    pub(crate) fn add(&mut self, name: &str, state: StructSchema, instance: Option<u32>) {
        let at = self.sections.binary_search_by(|section| section.name.as_str().cmp(name));
        match at {
            Ok(at) => self.sections[at].instances.extend(instance),
            Err(at) => {
                let instances = instance.into_iter().collect();
                self.sections.insert(at, SectionSchema { name: name.to_owned(), instances, state });
            }
        }
    }

    /// The section with that name.
    pub fn section(&self, name: &str) -> Option<&SectionSchema> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// On one line, to be sent.
    pub fn to_json(&self) -> String {
        // Nothing in a schema can fail to become JSON: its keys are all strings.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// On many lines, to be kept and read.
    pub fn to_pretty_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// Reads either. The text may come from anywhere.
    pub fn from_json(json: &[u8]) -> Result<Self, SchemaError> {
        if json.len() > MAX_SCHEMA_BYTES {
            return Err(SchemaError::TooLong { found: json.len() });
        }
        Ok(serde_json::from_slice(json)?)
    }
}

impl Default for Schema {
    fn default() -> Self {
        Self::new()
    }
}

impl Shape {
    pub(crate) fn of_scalar(kind: Kind) -> Self {
        match kind {
            Kind::Bool => Self::Bool,
            Kind::U8 => Self::U8,
            Kind::U16 => Self::U16,
            Kind::U32 => Self::U32,
            Kind::U64 => Self::U64,
            Kind::I8 => Self::I8,
            Kind::I16 => Self::I16,
            Kind::I32 => Self::I32,
            Kind::I64 => Self::I64,
            Kind::I128 => Self::I128,
            // The rest of the scalars: others are not asked for.
            _ => Self::U128,
        }
    }

    /// The kind of its bytes.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Bool => Kind::Bool,
            Self::U8 => Kind::U8,
            Self::U16 => Kind::U16,
            Self::U32 => Kind::U32,
            Self::U64 => Kind::U64,
            Self::U128 => Kind::U128,
            Self::I8 => Kind::I8,
            Self::I16 => Kind::I16,
            Self::I32 => Kind::I32,
            Self::I64 => Kind::I64,
            Self::I128 => Kind::I128,
            Self::Text { .. } => Kind::Text,
            Self::List { .. } => Kind::List,
            Self::Option(_) => Kind::Option,
            Self::Struct(_) => Kind::Struct,
            Self::Enum(_) => Kind::Enum,
        }
    }
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(len) => write!(f, "exactly {len}"),
            Self::AtMost(len) => write!(f, "at most {len}"),
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text { max_len } => write!(f, "text of at most {max_len} bytes"),
            Self::List { element, len } => write!(f, "list of {len} {element}"),
            Self::Option(value) => write!(f, "{value} or nothing"),
            _ => f.write_str(self.kind().name()),
        }
    }
}
