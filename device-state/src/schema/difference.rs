//! What two schemas can differ in, and what comes of it.

use std::fmt;

use super::{Length, Shape};

/// How bad a difference is for a reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Nothing comes of it.
    Note,
    /// It depends on the state: some is refused.
    Sometimes,
    /// No state can be read.
    Always,
}

/// A difference, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The way to it: `serial.fifo.entries[]`.
    pub place: String,
    /// What it is.
    pub difference: Difference,
    /// What comes of it.
    pub severity: Severity,
}

impl Finding {
    /// Whether versions say it: the writer's is outside of those that the reader says it reads.
    /// Everything else was meant to work.
    pub fn is_declared(&self) -> bool {
        matches!(self.difference, Difference::TooNew { .. } | Difference::TooOld { .. })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what_for = match self.severity {
            Severity::Note => "note",
            Severity::Sometimes => "may fail",
            Severity::Always => "fails",
        };
        if self.place.is_empty() {
            write!(f, "{what_for}: {}", self.difference)
        } else {
            write!(f, "{what_for}: {}: {}", self.place, self.difference)
        }
    }
}

/// What the writer has otherwise than the reader.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Difference {
    /// The bytes around the fields are of another format.
    #[error("the writer has format {writer}, the reader format {reader}")]
    Format {
        /// The writer's.
        writer: u16,
        /// The reader's.
        reader: u16,
    },
    /// The reader does not know the section.
    #[error("the reader does not know the section")]
    UnknownSection,
    /// The reader waits for a section that does not come.
    #[error("the writer does not send the section")]
    MissingSection,
    /// The reader has no such instance.
    #[error("the reader has no instance {0}")]
    UnknownInstance(u32),
    /// The reader waits for an instance that does not come.
    #[error("the writer does not send instance {0}")]
    MissingInstance(u32),
    /// The writer's version came after the reader.
    #[error("the writer has version {writer}, the reader reads up to {reader}")]
    TooNew {
        /// What is written.
        writer: u16,
        /// The newest that is read.
        reader: u16,
    },
    /// The writer's version is not read any more.
    #[error("the writer has version {writer}, the reader reads from {reader}")]
    TooOld {
        /// What is written.
        writer: u16,
        /// The oldest that is read.
        reader: u16,
    },
    /// The reader does not know a field.
    #[error("the reader does not know the field (tag {tag})")]
    UnknownField {
        /// Its tag.
        tag: u16,
    },
    /// The reader waits for a field that does not come.
    #[error("the writer does not send the field (tag {tag})")]
    MissingField {
        /// Its tag.
        tag: u16,
    },
    /// The reader thinks that the field came later than the writer's version.
    #[error(
        "the reader has it that the field came with version {since}, the writer has it in {version}"
    )]
    Since {
        /// The version that brought it, as the reader has it.
        since: u16,
        /// The writer's version.
        version: u16,
    },
    /// A field changed its type.
    #[error("the writer has {writer}, the reader {reader}")]
    Type {
        /// What is written.
        writer: String,
        /// What is expected.
        reader: String,
    },
    /// A field changed its number of elements.
    #[error("the writer has {writer} elements, the reader {reader}")]
    Count {
        /// What is written.
        writer: Length,
        /// What is expected.
        reader: Length,
    },
    /// Text may be longer than what the reader takes.
    #[error("the writer has text of at most {writer} bytes, the reader {reader}")]
    TextLength {
        /// What is written.
        writer: u32,
        /// What is read.
        reader: u32,
    },
    /// The reader does not know a variant.
    #[error("the reader does not know the variant (tag {tag})")]
    UnknownVariant {
        /// Its tag.
        tag: u16,
    },
    /// The reader does not know a subsection.
    #[error("the reader does not know the subsection, which is sent when it is needed")]
    UnknownSubsection,
    /// The same tag has another name: it was renamed, or the tag was used again.
    #[error("the writer calls it {writer}, the reader {reader}")]
    Name {
        /// What the writer calls it.
        writer: String,
        /// What the reader calls it.
        reader: String,
    },
}

impl Difference {
    pub(super) fn types(writer: &Shape, reader: &Shape) -> Self {
        Self::Type { writer: writer.to_string(), reader: reader.to_string() }
    }
}
