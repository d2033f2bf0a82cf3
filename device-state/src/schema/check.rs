//! Will what one program saves be read by another? Told from their schemas alone.

use std::fmt;

use super::difference::{Difference, Finding, Severity};
use super::{
    EnumSchema, FieldSchema, Length, RetiredSchema, Schema, SectionSchema, Shape, StructSchema,
};
use crate::wire::MAX_NAME_BYTES;

/// What comes of the differences between a writer and a reader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compatibility {
    /// All of them.
    pub findings: Vec<Finding>,
}

/// Whether a reader reads what a writer writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// All of it.
    Works,
    /// Not all of it: it depends on the state.
    Depends,
    /// None of it.
    Fails,
}

impl Compatibility {
    /// The worst that comes of it.
    pub fn verdict(&self) -> Verdict {
        match self.findings.iter().map(|finding| finding.severity).max() {
            None | Some(Severity::Note) => Verdict::Works,
            Some(Severity::Sometimes) => Verdict::Depends,
            Some(Severity::Always) => Verdict::Fails,
        }
    }

    /// What fails although versions say that it works.
    pub fn undeclared(&self) -> impl Iterator<Item = &Finding> {
        self.findings
            .iter()
            .filter(|finding| finding.severity == Severity::Always && !finding.is_declared())
    }
}

impl fmt::Display for Compatibility {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.verdict() {
            Verdict::Works => "works",
            Verdict::Depends => "works for some state",
            Verdict::Fails => "fails",
        })?;
        self.findings.iter().try_for_each(|finding| write!(f, "\n  {finding}"))
    }
}

impl Schema {
    /// Whether a program with this schema reads what a program with that one writes.
    pub fn reads(&self, writer: &Self) -> Compatibility {
        let mut check = Check::default();
        if self.format != writer.format {
            let (writer, reader) = (writer.format, self.format);
            check.always("", Difference::Format { writer, reader });
            return check.done();
        }
        for section in &writer.sections {
            match self.section(&section.name) {
                Some(reader) => check.sections(section, reader),
                None => check.always(&printable(&section.name), Difference::UnknownSection),
            }
        }
        for section in &self.sections {
            if writer.section(&section.name).is_none() {
                check.always(&section.name, Difference::MissingSection);
            }
        }
        check.done()
    }
}

#[derive(Default)]
struct Check {
    findings: Vec<Finding>,
    /// Inside of what is not always sent nothing fails always.
    only_sometimes: bool,
}

impl Check {
    fn done(self) -> Compatibility {
        Compatibility { findings: self.findings }
    }

    fn find(&mut self, severity: Severity, place: &str, difference: Difference) {
        let severity =
            if self.only_sometimes { severity.min(Severity::Sometimes) } else { severity };
        self.findings.push(Finding { place: place.to_owned(), difference, severity });
    }

    fn always(&mut self, place: &str, difference: Difference) {
        self.find(Severity::Always, place, difference);
    }

    /// Looks at what is not always there.
    fn sometimes(&mut self, look: impl FnOnce(&mut Self)) {
        let before = std::mem::replace(&mut self.only_sometimes, true);
        look(self);
        self.only_sometimes = before;
    }

    fn sections(&mut self, writer: &SectionSchema, reader: &SectionSchema) {
        let name = &writer.name;
        // Only machines have instances.
        if !writer.instances.is_empty() && !reader.instances.is_empty() {
            for instance in missing(&writer.instances, &reader.instances) {
                self.always(name, Difference::UnknownInstance(instance));
            }
            for instance in missing(&reader.instances, &writer.instances) {
                self.always(name, Difference::MissingInstance(instance));
            }
        }
        self.structs(name, &writer.state, &reader.state);
    }

    /// Whether versions say that the reader reads it.
    fn versions(&mut self, place: &str, written: u16, oldest: u16, newest: u16) -> bool {
        let writer = written;
        if writer > newest {
            self.always(place, Difference::TooNew { writer, reader: newest });
        } else if writer < oldest {
            self.always(place, Difference::TooOld { writer, reader: oldest });
        } else {
            return true;
        }
        false
    }

    fn structs(&mut self, place: &str, writer: &StructSchema, reader: &StructSchema) {
        if !self.versions(place, writer.version, reader.min_version, reader.version) {
            return;
        }
        self.fields(place, writer.version, &writer.fields, &reader.fields, &reader.retired);
        for subsection in &writer.subsections {
            let place = format!("{place}.{}", printable(&subsection.name));
            match reader.subsections.iter().find(|known| known.name == subsection.name) {
                Some(known) => {
                    self.sometimes(|check| check.structs(&place, &subsection.state, &known.state));
                }
                None => {
                    self.find(Severity::Sometimes, &place, Difference::UnknownSubsection);
                }
            }
        }
    }

    fn fields(
        &mut self,
        place: &str,
        version: u16,
        writer: &[FieldSchema],
        reader: &[FieldSchema],
        retired: &[RetiredSchema],
    ) {
        for field in writer {
            let tag = field.tag;
            match reader.iter().find(|known| known.tag == tag) {
                Some(known) => {
                    self.field(&format!("{place}.{}", known.name), version, field, known);
                }
                None if retired.iter().any(|r| r.tag == tag && version <= r.until) => {}
                None => {
                    let place = format!("{place}.{}", printable(&field.name));
                    self.always(&place, Difference::UnknownField { tag });
                }
            }
        }
        let wanted = reader.iter().filter(|field| field.since <= version || !field.has_default);
        for field in wanted {
            let tag = field.tag;
            if !writer.iter().any(|sent| sent.tag == tag) {
                let place = format!("{place}.{}", field.name);
                self.always(&place, Difference::MissingField { tag });
            }
        }
    }

    fn field(&mut self, place: &str, version: u16, writer: &FieldSchema, reader: &FieldSchema) {
        if reader.since > version {
            self.always(place, Difference::Since { since: reader.since, version });
        }
        self.names(place, &writer.name, &reader.name);
        self.shapes(place, &writer.shape, &reader.shape);
    }

    fn names(&mut self, place: &str, writer: &str, reader: &str) {
        if writer != reader {
            let (writer, reader) = (printable(writer), reader.to_owned());
            self.find(Severity::Note, place, Difference::Name { writer, reader });
        }
    }

    fn shapes(&mut self, place: &str, writer: &Shape, reader: &Shape) {
        match (writer, reader) {
            (Shape::Struct(writer), Shape::Struct(reader)) => self.structs(place, writer, reader),
            (Shape::Enum(writer), Shape::Enum(reader)) => self.enums(place, writer, reader),
            (Shape::Option(writer), Shape::Option(reader)) => {
                self.sometimes(|check| check.shapes(place, writer, reader));
            }
            (Shape::Text { max_len: writer }, Shape::Text { max_len: reader }) => {
                if writer > reader {
                    let (writer, reader) = (*writer, *reader);
                    let difference = Difference::TextLength { writer, reader };
                    self.find(Severity::Sometimes, place, difference);
                }
            }
            (
                Shape::List { element: writer, len: written },
                Shape::List { element: reader, len: read },
            ) => {
                self.lengths(place, *written, *read);
                self.elements(place, *written, writer, reader);
            }
            (writer, reader) if writer == reader => {}
            (writer, reader) => self.always(place, Difference::types(writer, reader)),
        }
    }

    fn lengths(&mut self, place: &str, writer: Length, reader: Length) {
        let severity = match (writer, reader) {
            (Length::Exactly(written), Length::Exactly(read)) if written == read => return,
            (Length::Exactly(written) | Length::AtMost(written), Length::AtMost(read))
                if written <= read =>
            {
                return;
            }
            (Length::Exactly(_), _) => Severity::Always,
            (Length::AtMost(most), Length::Exactly(read)) if most < read => Severity::Always,
            (Length::AtMost(_), _) => Severity::Sometimes,
        };
        self.find(severity, place, Difference::Count { writer, reader });
    }

    fn elements(&mut self, place: &str, written: Length, writer: &Shape, reader: &Shape) {
        let place = format!("{place}[]");
        // The kind of its elements is in a list also when it has none.
        let same_kind = writer.kind() == reader.kind();
        match written {
            Length::AtMost(_) if same_kind => {
                self.sometimes(|check| check.shapes(&place, writer, reader));
            }
            Length::Exactly(0) if same_kind => {}
            _ => self.shapes(&place, writer, reader),
        }
    }

    fn enums(&mut self, place: &str, writer: &EnumSchema, reader: &EnumSchema) {
        if !self.versions(place, writer.version, reader.min_version, reader.version) {
            return;
        }
        let version = writer.version;
        for variant in &writer.variants {
            let (tag, place) = (variant.tag, format!("{place}.{}", printable(&variant.name)));
            let known = reader.variants.iter().find(|known| known.tag == tag);
            // The writer may never be of this variant.
            self.sometimes(|check| match known {
                Some(known) => {
                    if known.since > version {
                        let since = known.since;
                        check.always(&place, Difference::Since { since, version });
                    }
                    check.names(&place, &variant.name, &known.name);
                    check.fields(&place, version, &variant.fields, &known.fields, &[]);
                }
                None => check.always(&place, Difference::UnknownVariant { tag }),
            });
        }
    }
}

/// A name that another program gave, short and harmless in a terminal.
fn printable(name: &str) -> String {
    let harmless = |character: char| if character.is_control() { '?' } else { character };
    name.chars().take(MAX_NAME_BYTES).map(harmless).collect()
}

/// What is in one and not in the other.
fn missing(here: &[u32], there: &[u32]) -> Vec<u32> {
    here.iter().copied().filter(|instance| !there.contains(instance)).collect()
}
