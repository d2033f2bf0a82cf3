//! Trees as text for people.

use std::fmt::{self, Display, Formatter};

use super::{Inspected, InspectedSection, Item, Named};
use crate::kind::Kind;

/// Scalars on a line.
const ON_A_LINE: usize = 8;
/// Bytes on a line.
const BYTES_ON_A_LINE: usize = 16;

impl Display for Inspected {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let bytes: u64 = self.sections.iter().map(|section| section.payload_bytes).sum();
        write!(f, "{} sections, {bytes} bytes of state", self.sections.len())?;
        self.sections.iter().try_for_each(|section| write!(f, "\n{section}"))
    }
}

impl Display for InspectedSection {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { name, instance, version, offset_bytes, payload_bytes, fields } = self;
        write!(f, "{name} {instance}: version {version}, {payload_bytes} bytes at {offset_bytes}")?;
        write_fields(f, fields, 1)
    }
}

fn indent(f: &mut Formatter<'_>, depth: usize) -> fmt::Result {
    write!(f, "\n{:width$}", "", width = 2 * depth)
}

fn write_fields(f: &mut Formatter<'_>, fields: &[Named], depth: usize) -> fmt::Result {
    for Named { name, value } in fields {
        indent(f, depth)?;
        write!(f, "{name}:")?;
        write_item(f, value, depth)?;
    }
    Ok(())
}

/// What comes after the colon.
fn write_item(f: &mut Formatter<'_>, item: &Item, depth: usize) -> fmt::Result {
    match item {
        Item::Scalars { kind, bytes } => write_scalars(f, *kind, bytes, depth),
        Item::List(items) if items.is_empty() => write!(f, " empty"),
        Item::List(items) => {
            for (index, item) in items.iter().enumerate() {
                indent(f, depth + 1)?;
                write!(f, "[{index}]:")?;
                write_item(f, item, depth + 1)?;
            }
            Ok(())
        }
        Item::Struct { fields, .. } => write_fields(f, fields, depth + 1),
        Item::Variant { name, fields, .. } => {
            write!(f, " {name}")?;
            write_fields(f, fields, depth + 1)
        }
        scalar => write!(f, " {scalar}"),
    }
}

/// Scalars and short things on one line; what has parts, without them.
impl Display for Item {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::Unsigned(value @ 0..=9) => write!(f, "{value}"),
            Self::Unsigned(value) => write!(f, "{value:#x} ({value})"),
            Self::Signed(value) => write!(f, "{value}"),
            // Escaped: it is the guest's, and may hold anything.
            Self::Text(text) => write!(f, "{text:?}"),
            Self::Scalars { kind, bytes } => {
                let width = kind.width_bytes().unwrap_or(1);
                write!(f, "{} {kind}", bytes.len() / width)
            }
            Self::List(items) => write!(f, "list of {}", items.len()),
            Self::Nothing(0) => write!(f, "nothing"),
            Self::Nothing(around) => write!(f, "some({})", Self::Nothing(around - 1)),
            Self::Struct { fields, .. } => write!(f, "struct of {} fields", fields.len()),
            Self::Variant { name, .. } => write!(f, "{name}"),
        }
    }
}

/// On the same line if they fit there; else on lines of their own, each with the index of its first
/// one. Lines that are equal to the one before are left out, as `*`.
fn write_scalars(f: &mut Formatter<'_>, kind: Kind, bytes: &[u8], depth: usize) -> fmt::Result {
    let width = kind.width_bytes().unwrap_or(1);
    let on_a_line = if width == 1 { BYTES_ON_A_LINE } else { ON_A_LINE };
    if bytes.is_empty() {
        return write!(f, " empty");
    }
    let mut lines = bytes.chunks(on_a_line * width);
    if bytes.len() <= on_a_line * width {
        return lines.try_for_each(|line| write_line(f, kind, line));
    }
    let (mut last, mut starred) = (None, false);
    for (number, line) in lines.enumerate() {
        let is_last = (number + 1) * on_a_line * width >= bytes.len();
        if last == Some(line) && !is_last {
            if !starred {
                indent(f, depth + 1)?;
                write!(f, "*")?;
            }
            starred = true;
            continue;
        }
        (last, starred) = (Some(line), false);
        indent(f, depth + 1)?;
        write!(f, "{:#06x}:", number * on_a_line)?;
        write_line(f, kind, line)?;
    }
    Ok(())
}

fn write_line(f: &mut Formatter<'_>, kind: Kind, line: &[u8]) -> fmt::Result {
    let width = kind.width_bytes().unwrap_or(1);
    for scalar in line.chunks(width) {
        match Item::scalar(kind, scalar) {
            Item::Unsigned(value) => write!(f, " {value:0digits$x}", digits = 2 * width)?,
            other => write!(f, " {other}")?,
        }
    }
    Ok(())
}
