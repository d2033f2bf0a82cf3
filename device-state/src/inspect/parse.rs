//! From bytes to trees.

use super::{Inspected, InspectedSection, Item, MAX_DEPTH, Named};
use crate::error::{DecodeError, Problem};
use crate::kind::Kind;
use crate::schema::{FieldSchema, Schema, Shape, SubsectionSchema};
use crate::stream::sections;
use crate::wire::Reader;

/// Looks into a stream. The schema gives names; what it does not have goes by its tag, so that
/// streams of any version can be looked at.
pub fn inspect(stream: &[u8], schema: &Schema) -> Result<Inspected, DecodeError> {
    let sections = sections(stream)?.into_iter().map(|section| {
        let names = schema.section(section.name).map(|section| Names {
            fields: &section.state.fields,
            subsections: &section.state.subsections,
        });
        let mut payload = section.payload;
        let payload_bytes = payload.left() as u64;
        let fields = body(&mut payload, names.unwrap_or_default(), MAX_DEPTH)
            .map_err(|error| error.in_section(section.name, section.instance))?;
        Ok(InspectedSection {
            name: section.name.to_owned(),
            instance: section.instance,
            version: section.version,
            offset_bytes: section.offset_bytes,
            payload_bytes,
            fields,
        })
    });
    Ok(Inspected { sections: sections.collect::<Result<_, DecodeError>>()? })
}

/// What the schema calls things.
#[derive(Clone, Copy, Default)]
struct Names<'a> {
    fields: &'a [FieldSchema],
    subsections: &'a [SubsectionSchema],
}

/// Fields and subsections, to the end.
fn body(input: &mut Reader<'_>, names: Names<'_>, depth: u32) -> Result<Vec<Named>, DecodeError> {
    let Some(depth) = depth.checked_sub(1) else {
        return Err(input.error(Problem::Depth { max: MAX_DEPTH }));
    };
    let mut found = Vec::new();
    let mut last_tag = 0;
    while let Some(tag) = input.peek_tag()? {
        if tag <= last_tag {
            return Err(input.error(Problem::Order));
        }
        last_tag = tag;
        let known = names.fields.iter().find(|field| field.tag == tag);
        let name = known.map_or_else(|| format!("#{tag}"), |field| field.name.clone());
        let (header, mut payload) = input.field()?;
        let value = value(header.kind, &mut payload, known.map(|field| &field.shape), depth)
            .map_err(|error| error.in_field(&name))?;
        found.push(Named { name, value });
    }
    let mut last_name = "";
    while input.left() > 0 {
        let at = input.offset_bytes();
        let (name, mut payload) = input.subsection()?;
        if name <= last_name {
            return Err(DecodeError::new(at, Problem::Order));
        }
        last_name = name;
        let known = names.subsections.iter().find(|subsection| subsection.name == name);
        let names = known.map(|subsection| Names {
            fields: &subsection.state.fields,
            subsections: &subsection.state.subsections,
        });
        let in_field = |error: DecodeError| error.in_field(name);
        let version = payload.u16().map_err(in_field)?;
        let fields = body(&mut payload, names.unwrap_or_default(), depth).map_err(in_field)?;
        found.push(Named { name: name.to_owned(), value: Item::Struct { version, fields } });
    }
    Ok(found)
}

/// A value of that kind, to the end.
fn value(
    kind: u8,
    input: &mut Reader<'_>,
    shape: Option<&Shape>,
    depth: u32,
) -> Result<Item, DecodeError> {
    let at = input.offset_bytes();
    // Lists and options in each other nest as well.
    let Some(inner_depth) = depth.checked_sub(1) else {
        return Err(input.error(Problem::Depth { max: MAX_DEPTH }));
    };
    let unknown = || DecodeError::new(at, Problem::Kind { found: kind, expected: Kind::Struct });
    let known = Kind::from_code(kind).ok_or_else(unknown)?;
    if let Some(width) = known.width_bytes() {
        let (found, expected) = (input.left() as u64, width as u64);
        if found != expected {
            return Err(input.error(Problem::Length { found, expected }));
        }
        return scalar(known, input.take_rest(), at);
    }
    match known {
        Kind::Text => {
            let text = std::str::from_utf8(input.take_rest());
            let text = text.map_err(|_| DecodeError::new(at, Problem::Text))?;
            Ok(Item::Text(text.to_owned()))
        }
        Kind::Option if input.left() == 0 => Ok(Item::Nothing(0)),
        Kind::Option => {
            let shape = match shape {
                Some(Shape::Option(shape)) => Some(&**shape),
                _ => None,
            };
            let kind = input.u8()?;
            Ok(match value(kind, input, shape, inner_depth)? {
                Item::Nothing(around) => Item::Nothing(around + 1),
                item => item,
            })
        }
        Kind::List => {
            let element = match shape {
                Some(Shape::List { element, .. }) => Some(&**element),
                _ => None,
            };
            list(input, element, inner_depth)
        }
        Kind::Struct => {
            let names = match shape {
                Some(Shape::Struct(known)) => {
                    Names { fields: &known.fields, subsections: &known.subsections }
                }
                _ => Names::default(),
            };
            let version = input.u16()?;
            Ok(Item::Struct { version, fields: body(input, names, inner_depth)? })
        }
        Kind::Enum => {
            let (version, tag) = (input.u16()?, input.u16()?);
            let variant = match shape {
                Some(Shape::Enum(known)) => known.variants.iter().find(|v| v.tag == tag),
                _ => None,
            };
            let name = variant.map_or_else(|| format!("#{tag}"), |variant| variant.name.clone());
            let fields = variant.map_or(&[][..], |variant| &variant.fields);
            let names = Names { fields, subsections: &[] };
            let fields = body(input, names, inner_depth).map_err(|error| error.in_field(&name))?;
            Ok(Item::Variant { version, name, fields })
        }
        _ => Err(unknown()),
    }
}

fn scalar(kind: Kind, bytes: &[u8], at: u64) -> Result<Item, DecodeError> {
    match (kind, bytes) {
        (Kind::Bool, [found]) if *found > 1 => {
            Err(DecodeError::new(at, Problem::Bool { found: *found }))
        }
        _ => Ok(Item::scalar(kind, bytes)),
    }
}

fn list(input: &mut Reader<'_>, shape: Option<&Shape>, depth: u32) -> Result<Item, DecodeError> {
    let at = input.offset_bytes();
    let kind = input.u8()?;
    input.reserved::<3>()?;
    let count = input.u32()?;
    let unknown = || DecodeError::new(at, Problem::Kind { found: kind, expected: Kind::Struct });
    let known = Kind::from_code(kind).ok_or_else(unknown)?;
    if let Some(width) = known.width_bytes() {
        let (found, expected) = (input.left() as u64, u64::from(count) * width as u64);
        if found != expected {
            return Err(input.error(Problem::Length { found, expected }));
        }
        let at = input.offset_bytes();
        let bytes = input.take_rest().to_vec();
        if known == Kind::Bool {
            for (offset, byte) in (at..).zip(&bytes) {
                scalar(known, std::slice::from_ref(byte), offset)?;
            }
        }
        return Ok(Item::Scalars { kind: known, bytes });
    }
    let mut items = Vec::new();
    for index in 0..count as usize {
        let in_element = |error: DecodeError| error.in_element(index);
        let mut element = input.sized().map_err(in_element)?;
        items.push(value(kind, &mut element, shape, depth).map_err(in_element)?);
    }
    input.end()?;
    Ok(Item::List(items))
}
