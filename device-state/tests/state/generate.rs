//! Random schemas, and random streams of any schema: writers that no type was declared for.

use pageferry_device_state::schema::{
    EnumSchema, FieldSchema, Length, Schema, SectionSchema, Shape, StructSchema, SubsectionSchema,
    VariantSchema,
};
use pageferry_device_state::{EncodeError, Kind, StreamWriter, Writer};

/// Xorshift.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Less than `bound`, which is not 0.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() >> 33).expect("31 bits") % bound
    }

    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// A stream that a writer with this schema could have written.
pub(crate) fn stream(schema: &Schema, random: &mut Random) -> Vec<u8> {
    let mut out = StreamWriter::new();
    for section in &schema.sections {
        out.section(&section.name, 0, section.state.version, |out| {
            put_body(&section.state, random, out)
        })
        .expect("it is short");
    }
    out.finish()
}

fn put_body(
    state: &StructSchema,
    random: &mut Random,
    out: &mut Writer,
) -> Result<(), EncodeError> {
    put_fields(&state.fields, random, out);
    for subsection in &state.subsections {
        if random.chance(50) {
            let mut body = named(&subsection.name);
            put_version(subsection.state.version, &mut body);
            put_body(&subsection.state, random, &mut body)?;
            put_field(0, Kind::Subsection, &bytes(body), out);
        }
    }
    Ok(())
}

fn named(name: &str) -> Writer {
    let mut out = Writer::default();
    out.put(&[u8::try_from(name.len()).expect("a short name")]);
    out.put(name.as_bytes());
    out
}

fn put_version(version: u16, out: &mut Writer) {
    out.put(&version.to_le_bytes());
}

/// What was written.
fn bytes(out: Writer) -> Vec<u8> {
    out.into_bytes()
}

fn put_fields(fields: &[FieldSchema], random: &mut Random, out: &mut Writer) {
    for field in fields {
        let payload = value(&field.shape, random);
        put_field(field.tag, field.shape.kind(), &payload, out);
    }
}

fn put_field(tag: u16, kind: Kind, payload: &[u8], out: &mut Writer) {
    out.put(&tag.to_le_bytes());
    out.put(&[kind as u8, 0]);
    put_sized(payload, out);
}

fn put_sized(payload: &[u8], out: &mut Writer) {
    out.put(&u32::try_from(payload.len()).expect("it is short").to_le_bytes());
    out.put(payload);
}

fn value(shape: &Shape, random: &mut Random) -> Vec<u8> {
    let kind = shape.kind();
    if let Some(width) = kind.width_bytes() {
        return match kind {
            Kind::Bool => vec![u8::from(random.chance(50))],
            _ => (0..width).map(|_| random.next().to_le_bytes()[0]).collect(),
        };
    }
    let mut out = Writer::default();
    match shape {
        Shape::Text { max_len } => {
            let len = random.below(usize::try_from(*max_len).unwrap().min(20) + 1);
            let letters = (0..len).map(|_| b'a' + u8::try_from(random.below(26)).unwrap());
            out.put(&letters.collect::<Vec<_>>());
        }
        Shape::List { element, len } => {
            let count = match len {
                Length::Exactly(count) => *count,
                Length::AtMost(most) => {
                    u32::try_from(random.below(usize::try_from(*most).unwrap().min(20) + 1))
                        .unwrap()
                }
            };
            out.put(&[element.kind() as u8, 0, 0, 0]);
            out.put(&count.to_le_bytes());
            for _ in 0..count {
                let payload = value(element, random);
                if element.kind().width_bytes().is_some() {
                    out.put(&payload);
                } else {
                    put_sized(&payload, &mut out);
                }
            }
        }
        Shape::Option(inner) => {
            if random.chance(70) {
                out.put(&[inner.kind() as u8]);
                out.put(&value(inner, random));
            }
        }
        Shape::Struct(state) => {
            put_version(state.version, &mut out);
            put_body(state, random, &mut out).expect("it is short");
        }
        Shape::Enum(state) => {
            put_version(state.version, &mut out);
            let variant = &state.variants[random.below(state.variants.len())];
            out.put(&variant.tag.to_le_bytes());
            put_fields(&variant.fields, random, &mut out);
        }
        other => unreachable!("{other} is a scalar"),
    }
    bytes(out)
}

/// Any schema with one section.
pub(crate) fn schema(random: &mut Random) -> Schema {
    let mut schema = Schema::new();
    let state = any_struct(random, 3);
    schema.sections.push(SectionSchema { name: "any".to_owned(), instances: Vec::new(), state });
    schema
}

fn any_struct(random: &mut Random, depth: usize) -> StructSchema {
    let mut subsections = Vec::new();
    if depth > 0 && random.chance(20) {
        let (name, state) = ("any/part".to_owned(), any_struct(random, depth - 1));
        subsections.push(SubsectionSchema { name, state });
    }
    let fields = any_fields(random, depth);
    StructSchema { version: 1, min_version: 1, fields, subsections, retired: Vec::new() }
}

fn any_fields(random: &mut Random, depth: usize) -> Vec<FieldSchema> {
    let mut tag = 0;
    let count = random.below(6);
    let field = |_| {
        tag += 1 + u16::try_from(random.below(3)).unwrap();
        let shape = any_shape(random, depth);
        FieldSchema { tag, name: format!("field_{tag}"), since: 1, has_default: false, shape }
    };
    (0..count).map(field).collect()
}

pub(crate) fn any_shape(random: &mut Random, depth: usize) -> Shape {
    let choices = if depth == 0 { 12 } else { 16 };
    match random.below(choices) {
        0 => Shape::Bool,
        1 => Shape::U8,
        2 => Shape::U16,
        3 => Shape::U32,
        4 => Shape::U64,
        5 => Shape::U128,
        6 => Shape::I8,
        7 => Shape::I16,
        8 => Shape::I32,
        9 => Shape::I64,
        10 => Shape::I128,
        11 => Shape::Text { max_len: u32::try_from(random.below(30)).unwrap() },
        12 => Shape::Option(Box::new(any_shape(random, depth - 1))),
        13 => Shape::Struct(any_struct(random, depth - 1)),
        14 => {
            let variant = |tag| VariantSchema {
                tag,
                name: format!("variant_{tag}"),
                since: 1,
                fields: any_fields(random, depth - 1),
            };
            let variants = (1..4).map(variant).collect();
            Shape::Enum(EnumSchema { version: 1, min_version: 1, variants })
        }
        _ => {
            let count = u32::try_from(random.below(12)).unwrap();
            let len =
                if random.chance(50) { Length::Exactly(count) } else { Length::AtMost(count) };
            Shape::List { element: Box::new(any_shape(random, depth - 1)), len }
        }
    }
}
