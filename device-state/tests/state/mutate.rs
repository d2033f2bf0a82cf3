//! Writers that differ from a reader in ways that nobody planned. What the checker says of them
//! must be what the decoder does.

use pageferry_device_state::schema::{
    FieldSchema, Length, Schema, SectionSchema, Shape, StructSchema, SubsectionSchema,
    VariantSchema, Verdict,
};
use proptest::prelude::*;

use crate::generate::{Random, any_shape, stream};
use crate::versions::{Mill, mills};

/// Streams of each writer.
const STREAMS: u64 = 24;

fn mutate(schema: &mut Schema, random: &mut Random) {
    match random.below(30) {
        0 => schema.sections.clear(),
        1 => schema.format += 1,
        2 => {
            let (name, instances) = ("saw".to_owned(), Vec::new());
            schema.sections.push(SectionSchema { name, instances, state: empty() });
        }
        _ => {
            if let Some(section) = schema.sections.first_mut() {
                mutate_struct(&mut section.state, random);
            }
        }
    }
}

fn mutate_struct(state: &mut StructSchema, random: &mut Random) {
    match random.below(10) {
        0 => mutate_version(&mut state.version, random),
        1 => {
            let name = ["mill/bolt", "mill/gear", "mill/wheel"][random.below(3)].to_owned();
            let known = state.subsections.iter().find(|known| known.name == name);
            let state_of_it = known.map_or_else(empty, |known| known.state.clone());
            state.subsections.retain(|known| known.name != name);
            state.subsections.push(SubsectionSchema { name, state: state_of_it });
            state.subsections.sort_by(|a, b| a.name.cmp(&b.name));
        }
        2 => {
            state.subsections.pop();
        }
        3 if !state.subsections.is_empty() => {
            mutate_struct(&mut state.subsections[0].state, random);
        }
        _ => mutate_fields(&mut state.fields, random),
    }
}

fn empty() -> StructSchema {
    let (fields, subsections, retired) = (Vec::new(), Vec::new(), Vec::new());
    StructSchema { version: 1, min_version: 1, fields, subsections, retired }
}

fn mutate_version(version: &mut u16, random: &mut Random) {
    *version = if random.chance(50) { *version + 1 } else { version.saturating_sub(1) };
}

fn mutate_fields(fields: &mut Vec<FieldSchema>, random: &mut Random) {
    let at = random.below(fields.len().max(1));
    match random.below(6) {
        0 => {
            let tag = 1 + u16::try_from(random.below(7)).unwrap();
            if !fields.iter().any(|field| field.tag == tag) {
                let shape = any_shape(random, 2);
                let name = "another".to_owned();
                fields.push(FieldSchema { tag, name, since: 1, has_default: false, shape });
                fields.sort_by_key(|field| field.tag);
            }
        }
        1 if at < fields.len() => {
            fields.remove(at);
        }
        2 if at < fields.len() => fields[at].name.push('x'),
        3 if at < fields.len() => fields[at].shape = any_shape(random, 2),
        _ if at < fields.len() => mutate_shape(&mut fields[at].shape, random),
        _ => {}
    }
}

fn mutate_shape(shape: &mut Shape, random: &mut Random) {
    match shape {
        Shape::Text { max_len } => *max_len = u32::try_from(random.below(20)).unwrap(),
        Shape::List { element, len } => match random.below(3) {
            0 => mutate_shape(element, random),
            1 => *len = Length::Exactly(u32::try_from(random.below(12)).unwrap()),
            _ => *len = Length::AtMost(u32::try_from(random.below(24)).unwrap()),
        },
        Shape::Option(inner) => mutate_shape(inner, random),
        Shape::Struct(state) => mutate_struct(state, random),
        Shape::Enum(state) => match random.below(4) {
            0 => mutate_version(&mut state.version, random),
            1 => {
                let tag = 1 + u16::try_from(random.below(6)).unwrap();
                if !state.variants.iter().any(|variant| variant.tag == tag) {
                    let (name, fields) = ("another".to_owned(), Vec::new());
                    state.variants.push(VariantSchema { tag, name, since: 1, fields });
                }
            }
            2 if state.variants.len() > 1 => {
                state.variants.remove(random.below(state.variants.len()));
            }
            _ => {
                let at = random.below(state.variants.len());
                mutate_fields(&mut state.variants[at].fields, random);
            }
        },
        scalar => *scalar = any_shape(random, 0),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn the_checker_is_right_about_the_decoder(
        seed in any::<u64>(),
        mutations in 1..4,
        from in 0..5_usize,
        to in 0..5_usize,
    ) {
        let mut random = Random::new(seed);
        // Versions between the declared ones, and beside them.
        let Mill { schema: reader, read, .. } = &mills()[to];
        let mut writer = mills()[from].schema.clone();
        for _ in 0..mutations {
            mutate(&mut writer, &mut random);
        }
        // What is of another format is written by other means.
        if writer.format != reader.format {
            prop_assert_eq!(reader.reads(&writer).verdict(), Verdict::Fails);
            return Ok(());
        }
        let compatibility = reader.reads(&writer);
        for _ in 0..STREAMS {
            let bytes = stream(&writer, &mut random);
            let read = read(&bytes);
            match compatibility.verdict() {
                Verdict::Works => prop_assert!(read.is_ok(), "{compatibility}: {:?}", read),
                Verdict::Fails => prop_assert!(read.is_err(), "{compatibility}: {:?}", read),
                _ => {}
            }
        }
    }
}
