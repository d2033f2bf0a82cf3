//! What can go wrong with a stream, and where.

use std::error::Error;
use std::fmt;

use crate::kind::Kind;

/// What a hook or an adapter fails with; passed on as it is.
pub type HookError = Box<dyn Error + Send + Sync>;

/// Where in a stream something is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// Name and instance of the section; `None` outside of sections.
    pub section: Option<(String, u32)>,
    /// The way to the field, as in `fifo.entries[3].length`; empty outside of fields.
    pub field: String,
    /// Offset from the beginning of the stream.
    pub offset_bytes: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((name, instance)) = &self.section {
            write!(f, "section {name} {instance}, ")?;
        }
        if !self.field.is_empty() {
            write!(f, "field {}, ", self.field)?;
        }
        write!(f, "offset {}", self.offset_bytes)
    }
}

/// Why bytes are no device state.
#[derive(Debug)]
pub struct DecodeError {
    // Boxed, so that results stay small where nothing is wrong.
    inner: Box<Inner>,
}

#[derive(Debug)]
struct Inner {
    place: Place,
    problem: Problem,
}

impl DecodeError {
    pub(crate) fn new(offset_bytes: u64, problem: Problem) -> Self {
        let place = Place { offset_bytes, ..Place::default() };
        Self { inner: Box::new(Inner { place, problem }) }
    }

    /// Where.
    pub fn place(&self) -> &Place {
        &self.inner.place
    }

    /// What.
    pub fn problem(&self) -> &Problem {
        &self.inner.problem
    }

    pub(crate) fn in_field(mut self, name: &str) -> Self {
        prepend(&mut self.inner.place.field, name);
        self
    }

    pub(crate) fn in_element(mut self, index: usize) -> Self {
        prepend(&mut self.inner.place.field, &format!("[{index}]"));
        self
    }

    pub(crate) fn in_section(mut self, name: &str, instance: u32) -> Self {
        self.inner.place.section.get_or_insert_with(|| (name.to_owned(), instance));
        self
    }
}

/// Puts an outer name before the way so far: `name`, `name.rest`, `name[3]`.
fn prepend(way: &mut String, name: &str) {
    let dot = if way.is_empty() || way.starts_with('[') { "" } else { "." };
    *way = format!("{name}{dot}{way}");
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place(), self.problem())
    }
}

impl Error for DecodeError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.problem().source()
    }
}

/// What is wrong with the bytes at a [`Place`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// It ends too early.
    #[error("{needed} bytes are needed, {left} are left")]
    Truncated {
        /// Bytes needed.
        needed: u64,
        /// Bytes there.
        left: u64,
    },
    /// It goes on after its end.
    #[error("{extra} bytes are left over")]
    Trailing {
        /// How many.
        extra: u64,
    },
    /// It begins with something else than it must.
    #[error("no device state: it begins with {found:02x?}")]
    Magic {
        /// The first bytes, as many as the magic has.
        found: Vec<u8>,
    },
    /// The stream's format is another one.
    #[error("format {found} is not known, {known} is")]
    Format {
        /// What the stream has.
        found: u16,
        /// What this crate reads.
        known: u16,
    },
    /// A field for later use is not zero.
    #[error("a reserved field holds {found}, not 0")]
    Reserved {
        /// What it holds.
        found: u64,
    },
    /// A section's or subsection's name is empty, too long, or has characters that names lack.
    #[error("{found:?} is no name of a section")]
    Name {
        /// The name, what is no UTF-8 replaced.
        found: String,
    },
    /// A stream that is to hold one section holds more or none.
    #[error("{found} sections, one is expected")]
    SectionCount {
        /// How many.
        found: u64,
    },
    /// A section is another device's.
    #[error("section {found}, expected {expected}")]
    OtherSection {
        /// Its name.
        found: String,
        /// The name of what was to be read.
        expected: &'static str,
    },
    /// Two sections have the same name and instance.
    #[error("the section is there twice")]
    DuplicateSection,
    /// A section is damaged.
    #[error("checksum {computed:#010x}, the section says {stored:#010x}")]
    Checksum {
        /// As the section has it.
        stored: u32,
        /// As its bytes have it.
        computed: u32,
    },
    /// The state was written by a version that cannot be read here.
    #[error("version {found}, versions {oldest} to {newest} are read here")]
    Version {
        /// The writer's.
        found: u16,
        /// The oldest that is read.
        oldest: u16,
        /// The newest that is read: this program's own.
        newest: u16,
    },
    /// A field that nobody here knows.
    #[error("there is no field with tag {tag}")]
    UnknownField {
        /// Its tag.
        tag: u16,
    },
    /// A field that the writer's version has is not there.
    #[error("the field is missing (tag {tag})")]
    MissingField {
        /// Its tag.
        tag: u16,
    },
    /// A field that the writer's version does not have is there.
    #[error("the field came with version {since}, this is version {version}")]
    FieldTooNew {
        /// The version that brought it.
        since: u16,
        /// The writer's version.
        version: u16,
    },
    /// Fields or subsections are not in their order, or there twice.
    #[error("out of order")]
    Order,
    /// The field is of another kind.
    #[error("kind {found}, expected {expected}")]
    Kind {
        /// What the stream has.
        found: u8,
        /// What was declared.
        expected: Kind,
    },
    /// A length that is not the one declared.
    #[error("length {found}, expected {expected}")]
    Length {
        /// What the stream has.
        found: u64,
        /// What was declared.
        expected: u64,
    },
    /// A length over its bound.
    #[error("length {found}, at most {max} is allowed")]
    TooLong {
        /// What the stream has.
        found: u64,
        /// What was declared.
        max: u64,
    },
    /// A truth value that is neither 0 nor 1.
    #[error("{found} is neither 0 nor 1")]
    Bool {
        /// What it is.
        found: u8,
    },
    /// Text that is not UTF-8.
    #[error("text is not UTF-8")]
    Text,
    /// A variant that nobody here knows.
    #[error("there is no variant with tag {tag}")]
    UnknownVariant {
        /// Its tag.
        tag: u16,
    },
    /// A subsection that nobody here knows.
    #[error("subsection {name} is not known")]
    UnknownSubsection {
        /// Its name.
        name: String,
    },
    /// Structures inside of structures without end; only [`inspect`](crate::inspect()) meets it.
    #[error("nested deeper than {max}")]
    Depth {
        /// What is allowed.
        max: u32,
    },
    /// The type's own hook refused what was decoded.
    #[error("{hook} failed")]
    Hook {
        /// Which.
        hook: &'static str,
        /// Why.
        #[source]
        cause: HookError,
    },
    /// An adapter refused what was decoded.
    #[error("the value is not possible")]
    Adapter(#[source] HookError),
}

/// Why state could not be encoded.
#[derive(Debug)]
pub struct EncodeError {
    inner: Box<InnerEncode>,
}

#[derive(Debug)]
struct InnerEncode {
    section: Option<(String, u32)>,
    field: String,
    problem: EncodeProblem,
}

impl EncodeError {
    pub(crate) fn new(problem: EncodeProblem) -> Self {
        Self { inner: Box::new(InnerEncode { section: None, field: String::new(), problem }) }
    }

    /// Name and instance of the section.
    pub fn section(&self) -> Option<(&str, u32)> {
        self.inner.section.as_ref().map(|(name, instance)| (name.as_str(), *instance))
    }

    /// The way to the field.
    pub fn field(&self) -> &str {
        &self.inner.field
    }

    /// What.
    pub fn problem(&self) -> &EncodeProblem {
        &self.inner.problem
    }

    pub(crate) fn in_field(mut self, name: &str) -> Self {
        prepend(&mut self.inner.field, name);
        self
    }

    pub(crate) fn in_element(mut self, index: usize) -> Self {
        prepend(&mut self.inner.field, &format!("[{index}]"));
        self
    }

    pub(crate) fn in_section(mut self, name: &str, instance: u32) -> Self {
        self.inner.section.get_or_insert_with(|| (name.to_owned(), instance));
        self
    }
}

impl fmt::Display for EncodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((name, instance)) = self.section() {
            write!(f, "section {name} {instance}, ")?;
        }
        if !self.field().is_empty() {
            write!(f, "field {}: ", self.field())?;
        }
        write!(f, "{}", self.problem())
    }
}

impl Error for EncodeError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.problem().source()
    }
}

/// What is wrong with state to encode.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeProblem {
    /// A section cannot be called that.
    #[error("{name:?} is no name of a section")]
    Name {
        /// The name.
        name: String,
    },
    /// Longer than it was declared: whoever reads it would refuse it.
    #[error("length {found}, at most {max} is declared")]
    TooLong {
        /// Its length.
        found: usize,
        /// What was declared.
        max: u32,
    },
    /// More bytes than a field can have.
    #[error("{bytes} bytes, a field has at most {max}", max = u32::MAX)]
    TooLarge {
        /// How many.
        bytes: usize,
    },
    /// The type's own hook refused to have it saved.
    #[error("{hook} failed")]
    Hook {
        /// Which.
        hook: &'static str,
        /// Why.
        #[source]
        cause: HookError,
    },
    /// An adapter could not tell the value.
    #[error("the value could not be taken")]
    Adapter(#[source] HookError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_to_a_field_reads_from_outside_in() {
        let error = DecodeError::new(7, Problem::Order)
            .in_field("length")
            .in_element(3)
            .in_field("entries")
            .in_field("fifo")
            .in_section("serial", 1)
            .in_section("never", 9);
        let text = error.to_string();
        assert_eq!(text, "section serial 1, field fifo.entries[3].length, offset 7: out of order");
    }
}
