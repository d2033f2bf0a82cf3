//! Schemas as text, and each kind of break.

use pageferry_device_state::Schema;
use pageferry_device_state::schema::{
    Compatibility, Difference, FieldSchema, Length, MAX_SCHEMA_BYTES, SchemaError, SectionSchema,
    Severity, Shape, StructSchema, Verdict,
};
use proptest::prelude::*;

use crate::generate::{Random, schema};
use crate::versions::v3;
use crate::zoo::Zoo;

proptest! {
    #[test]
    fn schemas_go_through_json(seed in any::<u64>()) {
        let schema = schema(&mut Random::new(seed));
        prop_assert_eq!(&Schema::from_json(schema.to_json().as_bytes()).unwrap(), &schema);
        prop_assert_eq!(&Schema::from_json(schema.to_pretty_json().as_bytes()).unwrap(), &schema);
        prop_assert_eq!(schema.reads(&schema).findings, []);
    }

    #[test]
    fn text_that_is_no_schema_is_an_error(text in ".{0,200}") {
        prop_assert!(Schema::from_json(text.as_bytes()).is_err());
    }
}

#[test]
fn schemas_are_bounded() {
    let long = vec![b' '; MAX_SCHEMA_BYTES + 1];
    assert!(matches!(Schema::from_json(&long), Err(SchemaError::TooLong { .. })));
    // Deeper than any stack.
    let deep = "{\"option\":".repeat(20_000);
    assert!(matches!(Schema::from_json(deep.as_bytes()), Err(SchemaError::Json(_))));
}

#[test]
fn a_schema_has_everything_that_was_declared() {
    let schema = Schema::new().with::<Zoo>().with::<v3::Mill>();
    let names: Vec<_> = schema.sections.iter().map(|section| section.name.as_str()).collect();
    assert_eq!(names, ["mill", "zoo"]);
    let zoo = &schema.section("zoo").unwrap().state;
    assert_eq!((zoo.version, zoo.min_version), (2, 1));
    let tags: Vec<_> = zoo.fields.iter().map(|field| field.tag).collect();
    assert_eq!(tags, (1..=16).collect::<Vec<_>>());
    let saves = zoo.fields.iter().find(|field| field.name == "saves").unwrap();
    assert_eq!((saves.since, saves.has_default, &saves.shape), (2, true, &Shape::U32));
    assert_eq!(zoo.subsections[0].name, "zoo/fifo");
    let mill = &schema.section("mill").unwrap().state;
    assert_eq!((mill.retired[0].tag, mill.retired[0].until), (2, 2));
}

/// What comes of a change, for a reader that was not changed.
fn changed(change: impl FnOnce(&mut StructSchema)) -> Compatibility {
    let reader = Schema::new().with::<v3::Mill>();
    let mut writer = reader.clone();
    change(&mut writer.sections[0].state);
    reader.reads(&writer)
}

fn field<'a>(state: &'a mut StructSchema, name: &str) -> &'a mut FieldSchema {
    state.fields.iter_mut().find(|field| field.name == name).expect("the field")
}

#[track_caller]
fn assert_found(
    found: &Compatibility,
    verdict: Verdict,
    place: &str,
    is_it: impl Fn(&Difference) -> bool,
) {
    assert_eq!(found.verdict(), verdict, "{found}");
    let [finding] = found.findings.as_slice() else { panic!("{found}") };
    assert_eq!(finding.place, place);
    assert!(is_it(&finding.difference), "{finding:?}");
    // Whatever is no version was not declared.
    let is_version =
        matches!(finding.difference, Difference::TooNew { .. } | Difference::TooOld { .. });
    let undeclared = finding.severity == Severity::Always && !is_version;
    assert_eq!(found.undeclared().count(), usize::from(undeclared));
}

#[test]
fn each_kind_of_break_is_caught() {
    use Verdict::{Depends, Fails, Works};
    let removed = changed(|state| state.fields.retain(|field| field.name != "speed"));
    assert_found(&removed, Fails, "mill.speed", |d| {
        matches!(d, Difference::MissingField { tag: 1 })
    });

    let added = changed(|state| {
        let name = "sails".to_owned();
        let (since, has_default, shape) = (1, false, Shape::U8);
        state.fields.push(FieldSchema { tag: 6, name, since, has_default, shape });
    });
    assert_found(&added, Fails, "mill.sails", |d| matches!(d, Difference::UnknownField { tag: 6 }));

    let retyped = changed(|state| field(state, "speed").shape = Shape::I32);
    assert_found(&retyped, Fails, "mill.speed", |d| matches!(d, Difference::Type { .. }));

    // A tag that is used again, for something of the same type.
    let reused = changed(|state| field(state, "speed").name = "torque".to_owned());
    assert_found(&reused, Works, "mill.speed", |d| matches!(d, Difference::Name { .. }));

    // A tag that was retired, in a version that did not have it any more.
    let revived = changed(|state| {
        let name = "flour".to_owned();
        let (since, has_default, shape) = (1, false, Shape::U8);
        state.fields.insert(1, FieldSchema { tag: 2, name, since, has_default, shape });
    });
    assert_found(&revived, Fails, "mill.flour", |d| {
        matches!(d, Difference::UnknownField { tag: 2 })
    });

    let newer = changed(|state| state.version = 4);
    assert_found(&newer, Fails, "mill", |d| matches!(d, Difference::TooNew { .. }));

    let early = changed(|state| state.version = 2);
    assert_found(&early, Fails, "mill.owner", |d| {
        matches!(d, Difference::Since { since: 3, version: 2 })
    });

    let longer = changed(|state| {
        let owner = Shape::Text { max_len: 5 };
        field(state, "owner").shape = Shape::Option(Box::new(owner));
    });
    assert_found(&longer, Depends, "mill.owner", |d| matches!(d, Difference::TextLength { .. }));

    let subsection = changed(|state| state.subsections[0].name = "mill/belt".to_owned());
    assert_found(&subsection, Depends, "mill.mill/belt", |d| {
        matches!(d, Difference::UnknownSubsection)
    });

    let inside = changed(|state| state.subsections[0].state.fields.clear());
    assert_found(&inside, Depends, "mill.mill/gear.teeth", |d| {
        matches!(d, Difference::MissingField { tag: 1 })
    });

    let variant = changed(|state| {
        let Shape::Enum(mode) = &mut field(state, "mode").shape else { panic!("an enum") };
        mode.variants[0].tag = 9;
    });
    assert_found(&variant, Depends, "mill.mode.Still", |d| {
        matches!(d, Difference::UnknownVariant { tag: 9 })
    });

    let nested = changed(|state| {
        let Shape::Enum(mode) = &mut field(state, "mode").shape else { panic!("an enum") };
        mode.version = 3;
    });
    assert_found(&nested, Fails, "mill.mode", |d| matches!(d, Difference::TooNew { .. }));
}

#[test]
fn old_state_is_caught_by_who_does_not_read_it() {
    let mut reader = Schema::new().with::<v3::Mill>();
    reader.sections[0].state.min_version = 2;
    let mut writer = reader.clone();
    writer.sections[0].state.version = 1;
    let found = reader.reads(&writer);
    assert_found(&found, Verdict::Fails, "mill", |d| matches!(d, Difference::TooOld { .. }));
}

#[test]
fn lengths_of_lists_are_compared() {
    let with = |len| {
        let shape = Shape::List { element: Box::new(Shape::U16), len };
        changed(|state| field(state, "speed").shape = shape).verdict()
    };
    // The reader has no list there at all.
    assert_eq!(with(Length::Exactly(1)), Verdict::Fails);
    let cases = [
        (Length::Exactly(4), Length::Exactly(4), Verdict::Works),
        (Length::Exactly(4), Length::Exactly(5), Verdict::Fails),
        (Length::Exactly(4), Length::AtMost(5), Verdict::Works),
        (Length::Exactly(6), Length::AtMost(5), Verdict::Fails),
        (Length::AtMost(4), Length::AtMost(4), Verdict::Works),
        (Length::AtMost(5), Length::AtMost(4), Verdict::Depends),
        (Length::AtMost(4), Length::Exactly(4), Verdict::Depends),
        (Length::AtMost(3), Length::Exactly(4), Verdict::Fails),
    ];
    for (written, read, verdict) in cases {
        let [writer, reader] = [written, read].map(|len| {
            let mut schema = Schema::new().with::<v3::Mill>();
            let shape = Shape::List { element: Box::new(Shape::U16), len };
            field(&mut schema.sections[0].state, "speed").shape = shape;
            schema
        });
        assert_eq!(reader.reads(&writer).verdict(), verdict, "{written} to {read}");
    }
}

#[test]
fn sections_and_instances_are_compared() {
    let reader = Schema::new().with::<v3::Mill>();
    let none = Schema::new();
    let found = reader.reads(&none);
    assert_found(&found, Verdict::Fails, "mill", |d| matches!(d, Difference::MissingSection));
    let found = none.reads(&reader);
    assert_found(&found, Verdict::Fails, "mill", |d| matches!(d, Difference::UnknownSection));
    let mut writer = reader.clone();
    writer.format = 2;
    assert_found(&reader.reads(&writer), Verdict::Fails, "", |d| {
        matches!(d, Difference::Format { .. })
    });
    // A program has no instances, a machine has.
    let machine = |instances| {
        let SectionSchema { name, state, .. } = reader.sections[0].clone();
        Schema { sections: vec![SectionSchema { name, instances, state }], ..Schema::new() }
    };
    let (one, two) = (machine(vec![0]), machine(vec![0, 1]));
    assert_eq!(reader.reads(&two).findings, []);
    assert_found(&one.reads(&two), Verdict::Fails, "mill", |d| {
        matches!(d, Difference::UnknownInstance(1))
    });
    assert_found(&two.reads(&one), Verdict::Fails, "mill", |d| {
        matches!(d, Difference::MissingInstance(1))
    });
}

#[test]
fn names_of_strangers_are_made_harmless() {
    let reader = Schema::new();
    let mut writer = Schema::new().with::<v3::Mill>();
    writer.sections[0].name = format!("\x1b[2J{}", "x".repeat(1000));
    let text = reader.reads(&writer).to_string();
    assert!(!text.contains('\x1b') && text.len() < 200, "{text}");
}
