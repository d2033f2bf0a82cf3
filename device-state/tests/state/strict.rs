//! Bytes that are no state: each is an error that says where and what.

use pageferry_device_state::{
    DecodeError, DeviceState, Kind, Problem, StreamWriter, Writer, from_bytes, inspect, sections,
    to_bytes,
};
use proptest::prelude::*;

use crate::versions::{Gear, v3};
use crate::zoo::{Zoo, zoo};

#[derive(DeviceState, Debug, Default, PartialEq)]
#[device_state(name = "small", version = 2, retired(tag = 4, until = 1))]
struct Small {
    #[device_state(tag = 2)]
    number: u16,
    #[device_state(tag = 3, max_len = 4)]
    list: Vec<u8>,
    #[device_state(tag = 5)]
    flag: bool,
    #[device_state(tag = 6)]
    choice: Option<u8>,
    #[device_state(tag = 7, since = 2, default)]
    inner: Gear,
    #[device_state(subsection = "small/b", needed = |_: &Self| true)]
    second: Gear,
    #[device_state(subsection = "small/a", needed = |_: &Self| true)]
    first: Gear,
}

/// Fields as (tag, kind, payload).
type Fields<'a> = &'a [(u16, Kind, &'a [u8])];

fn put(out: &mut Writer, tag: u16, kind: Kind, payload: &[u8]) {
    out.put(&tag.to_le_bytes());
    out.put(&[kind as u8, 0]);
    out.put(&u32::try_from(payload.len()).unwrap().to_le_bytes());
    out.put(payload);
}

fn stream(version: u16, fields: Fields<'_>) -> Vec<u8> {
    let mut writer = StreamWriter::new();
    writer
        .section("small", 0, version, |out| {
            for (tag, kind, payload) in fields {
                put(out, *tag, *kind, payload);
            }
            Ok(())
        })
        .unwrap();
    writer.finish()
}

const NUMBER: (u16, Kind, &[u8]) = (2, Kind::U16, &[1, 0]);
const LIST: (u16, Kind, &[u8]) = (3, Kind::List, &[2, 0, 0, 0, 1, 0, 0, 0, 9]);
const FLAG: (u16, Kind, &[u8]) = (5, Kind::Bool, &[1]);
const CHOICE: (u16, Kind, &[u8]) = (6, Kind::Option, &[]);
const INNER: (u16, Kind, &[u8]) = (7, Kind::Struct, &[1, 0, 1, 0, 4, 0, 4, 0, 0, 0, 7, 0, 0, 0]);

fn refused(version: u16, fields: Fields<'_>) -> DecodeError {
    from_bytes::<Small>(&stream(version, fields)).unwrap_err()
}

#[test]
fn the_right_bytes_are_read() {
    let all = [NUMBER, LIST, FLAG, CHOICE, INNER];
    let state: Small = from_bytes(&stream(2, &all)).unwrap();
    assert_eq!((state.number, state.list, state.flag, state.inner.teeth), (1, vec![9], true, 7));
    // What was retired is read over where it was.
    let old = [NUMBER, LIST, (4, Kind::Text, b"whatever"), FLAG, CHOICE];
    assert_eq!(from_bytes::<Small>(&stream(1, &old)).unwrap().inner.teeth, 0);
}

#[test]
fn each_problem_says_where_and_what() {
    let cases: &[(u16, Fields<'_>, &str)] = &[
        (2, &[NUMBER, LIST, CHOICE, INNER], "field flag, offset 72: the field is missing (tag 5)"),
        (2, &[LIST, FLAG, CHOICE, INNER], "field number, offset 45: the field is missing (tag 2)"),
        (2, &[(1, Kind::U8, &[0]), NUMBER], "offset 45: there is no field with tag 1"),
        (2, &[NUMBER, LIST, (4, Kind::U8, &[0])], "offset 72: there is no field with tag 4"),
        (2, &[NUMBER, LIST, FLAG, CHOICE, INNER, (8, Kind::U8, &[0])], "no field with tag 8"),
        (
            1,
            &[NUMBER, LIST, FLAG, CHOICE, INNER],
            "field inner, offset 89: the field came with version 2, this is version 1",
        ),
        (2, &[NUMBER, NUMBER], "offset 55: out of order"),
        (2, &[NUMBER, LIST, FLAG, NUMBER], "offset 81: out of order"),
        (2, &[NUMBER, FLAG, LIST], "field list, offset 55: the field is missing (tag 3)"),
        (2, &[(2, Kind::U32, &[1, 0])], "field number, offset 45: kind 4, expected u16"),
        (2, &[(2, Kind::U16, &[1])], "field number, offset 53: length 1, expected 2"),
        (
            2,
            &[NUMBER, (3, Kind::List, &[2, 0, 0, 0, 5, 0, 0, 0, 1, 2, 3, 4, 5])],
            "field list, offset 63: length 5, at most 4 is allowed",
        ),
        (
            2,
            &[NUMBER, (3, Kind::List, &[2, 0, 0, 0, 255, 255, 255, 255, 1])],
            "field list, offset 71: 4294967295 bytes are needed, 1 are left",
        ),
        (
            2,
            &[NUMBER, (3, Kind::List, &[2, 0, 0, 0, 1, 0, 0, 0, 1, 2])],
            "field list, offset 72: 1 bytes are left over",
        ),
        (
            2,
            &[NUMBER, (3, Kind::List, &[3, 0, 0, 0, 0, 0, 0, 0])],
            "field list, offset 63: kind 3, expected u8",
        ),
        (
            2,
            &[NUMBER, (3, Kind::List, &[2, 0, 1, 0, 0, 0, 0, 0])],
            "field list, offset 64: a reserved field holds 256, not 0",
        ),
        (2, &[NUMBER, LIST, (5, Kind::Bool, &[2])], "field flag, offset 80: 2 is neither 0 nor 1"),
        (
            2,
            &[NUMBER, LIST, FLAG, (6, Kind::Option, &[3, 0])],
            "field choice, offset 89: kind 3, expected u8",
        ),
        (
            2,
            &[NUMBER, LIST, FLAG, CHOICE, (7, Kind::Struct, &[2, 0])],
            "field inner, offset 97: version 2, versions 1 to 1 are read here",
        ),
        (
            2,
            &[NUMBER, LIST, FLAG, CHOICE, (7, Kind::Struct, &[1])],
            "field inner, offset 97: 2 bytes are needed, 1 are left",
        ),
        (
            2,
            &[NUMBER, LIST, FLAG, CHOICE, (7, Kind::Struct, &[1, 0])],
            "field inner.teeth, offset 99: the field is missing (tag 1)",
        ),
        (3, &[], "offset 16: version 3, versions 1 to 2 are read here"),
        (0, &[], "offset 16: version 0, versions 1 to 2 are read here"),
    ];
    for (version, fields, expected) in cases {
        let error = refused(*version, fields);
        let text = error.to_string();
        assert!(text.starts_with("section small 0, "), "{text}");
        assert!(text.ends_with(expected), "{text}\nexpected: {expected}");
        assert_eq!(error.place().section, Some(("small".to_owned(), 0)));
    }
}

/// Payload of a subsection.
fn subsection(name: &str, rest: &[u8]) -> Vec<u8> {
    [&[u8::try_from(name.len()).unwrap()], name.as_bytes(), rest].concat()
}

#[test]
fn subsections_are_as_strict() {
    let gear: &[u8] = &[1, 0, 1, 0, 4, 0, 4, 0, 0, 0, 7, 0, 0, 0];
    let all = [NUMBER, LIST, FLAG, CHOICE, INNER];
    let with = |subsections: &[Vec<u8>]| {
        let subsections = subsections.iter().map(|s| (0, Kind::Subsection, s.as_slice()));
        let fields: Vec<_> = all.into_iter().chain(subsections).collect();
        from_bytes::<Small>(&stream(2, &fields))
    };
    let (a, b, c) =
        (subsection("small/a", gear), subsection("small/b", gear), subsection("small/c", gear));
    assert_eq!(with(&[a.clone(), b.clone()]).unwrap().first.teeth, 7);
    // Declared to be always needed, but a reader takes them as they come.
    assert_eq!(with(std::slice::from_ref(&b)).unwrap().first.teeth, 0);
    let text = |subsections: &[Vec<u8>]| with(subsections).unwrap_err().to_string();
    assert!(text(&[b.clone(), a.clone()]).ends_with("out of order"));
    assert!(text(&[a.clone(), a.clone()]).ends_with("out of order"));
    assert!(text(&[a.clone(), c.clone()]).ends_with("subsection small/c is not known"));
    assert!(text(&[subsection("small/", gear)]).ends_with("subsection small/ is not known"));
    assert!(text(&[subsection("", gear)]).contains("is no name"));
    assert!(text(&[subsection("Small\x07", gear)]).contains("is no name"));
    assert!(text(&[subsection("small/a", &gear[..13])]).contains("field small/a.teeth"));
    assert!(text(&[subsection("small/a", &[gear, &[0]].concat())]).contains("field small/a, "));
    // A field after a subsection, and a subsection that says it is something else.
    let late: Vec<_> = [NUMBER, LIST, FLAG, CHOICE, INNER]
        .into_iter()
        .chain([(0, Kind::Subsection, a.as_slice()), (8, Kind::U8, &[1][..])])
        .collect();
    assert!(refused(2, &late).to_string().ends_with("out of order"));
    let wrong: Vec<_> = all.into_iter().chain([(0, Kind::Struct, a.as_slice())]).collect();
    assert!(refused(2, &wrong).to_string().ends_with("kind 15, expected subsection"));
}

#[test]
fn variants_are_as_strict() {
    let mut mill = v3::Mill { mode: v3::Mode::Braking, ..Default::default() };
    let good = to_bytes(&mut mill).unwrap();
    // Version 2 of the mode, variant 3.
    let at = good.windows(4).position(|window| window == [2, 0, 3, 0]).unwrap();
    let with = |version: u8, tag: u8| {
        let mut bytes = good.clone();
        (bytes[at], bytes[at + 2]) = (version, tag);
        from_bytes::<v3::Mill>(&repaired(bytes)).unwrap_err().to_string()
    };
    assert!(with(2, 7).ends_with("there is no variant with tag 7"));
    assert!(with(1, 3).contains("field mode.Braking, "), "{}", with(1, 3));
    assert!(with(2, 2).contains("field mode.Turning.0, "), "{}", with(2, 2));
}

/// The stream of one section with the checksum that its bytes have.
fn repaired(stream: Vec<u8>) -> Vec<u8> {
    let problem = sections(&stream).unwrap_err();
    let Problem::Checksum { computed, .. } = problem.problem() else { panic!("{problem}") };
    let mut stream = stream;
    stream[36..40].copy_from_slice(&computed.to_le_bytes());
    stream
}

#[test]
fn streams_are_as_strict_around_their_sections() {
    let mut gear = v3::Mill::default();
    let good = to_bytes(&mut gear).unwrap();
    let changed = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        let error = from_bytes::<v3::Mill>(&bytes).unwrap_err();
        format!("{error:?}")
    };
    assert!(changed(0, b'X').contains("Magic"));
    assert!(changed(8, 2).contains("Format"));
    assert!(changed(10, 1).contains("Reserved"));
    assert!(changed(12, 2).contains("Truncated"));
    assert!(changed(12, 0).contains("Trailing"));
    assert!(changed(16, b'X').contains("Magic"));
    assert!(changed(20, 1).contains("Checksum"));
    assert!(changed(24, 9).contains("Checksum"));
    assert!(changed(26, 0).contains("Name"));
    assert!(changed(26, 200).contains("Name") || changed(26, 200).contains("Truncated"));
    assert!(changed(28, 0xff).contains("Truncated"));
    assert!(changed(40, b'M').contains("Name"));
    let twice = [&good[..], &good[16..]].concat();
    let mut twice = twice;
    twice[12] = 2;
    assert!(matches!(sections(&twice).unwrap_err().problem(), Problem::DuplicateSection));
    let other = from_bytes::<Small>(&good).unwrap_err().to_string();
    assert_eq!(other, "offset 16: section mill, expected small");
    let none = from_bytes::<Small>(&StreamWriter::new().finish()).unwrap_err().to_string();
    assert_eq!(none, "offset 0: 0 sections, one is expected");
}

#[test]
fn sections_have_names() {
    let too_long = "x".repeat(65);
    for name in ["", "Small", "a b", "\u{1b}", too_long.as_str()] {
        let mut writer = StreamWriter::new();
        let error = writer.section(name, 0, 1, |_| Ok(())).unwrap_err();
        assert!(error.to_string().ends_with("is no name of a section"), "{error}");
        assert_eq!(sections(&writer.finish()).unwrap().len(), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_part_and_no_changed_byte_passes(mut state in zoo(), at in any::<prop::sample::Index>(), bit in 0..8_u32) {
        let good = to_bytes(&mut state).unwrap();
        for len in 0..good.len() {
            prop_assert!(from_bytes::<Zoo>(&good[..len]).is_err());
        }
        let mut bad = good.clone();
        bad[at.index(good.len())] ^= 1_u8 << bit;
        prop_assert!(from_bytes::<Zoo>(&bad).is_err());
        let mut long = good;
        long.push(0);
        prop_assert!(from_bytes::<Zoo>(&long).is_err());
    }

    #[test]
    fn damage_that_the_checksum_does_not_see_is_a_value_or_an_error(
        mut state in zoo(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = to_bytes(&mut state).unwrap();
        // Behind the headers and the name.
        let begin = 43;
        for (at, byte) in changes {
            let at = begin + at.index(bytes.len() - begin);
            bytes[at] = byte;
        }
        let bytes = match sections(&bytes) {
            Ok(_) => bytes,
            Err(_) => repaired(bytes),
        };
        if let Ok(mut read) = from_bytes::<Zoo>(&bytes) {
            read.saves = read.saves.wrapping_sub(1);
            prop_assert_eq!(to_bytes(&mut read).unwrap(), bytes.clone());
        }
        // Looking into it never panics either.
        let _ = inspect(&bytes, &pageferry_device_state::Schema::new().with::<Zoo>());
    }

    #[test]
    fn any_bytes_are_a_value_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(from_bytes::<Zoo>(&bytes).is_err());
        let mut writer = StreamWriter::new();
        writer.section("zoo", 0, 2, |out| { out.put(&bytes); Ok(()) }).unwrap();
        prop_assert!(from_bytes::<Zoo>(&writer.finish()).is_err());
    }
}
