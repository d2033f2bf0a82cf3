//! Streams as people see them.

use pageferry_device_state::inspect::{Change, Inspected, diff};
use pageferry_device_state::{Schema, inspect, to_bytes};
use proptest::prelude::*;

use crate::generate::{Random, schema, stream};
use crate::versions::v3;

fn mill() -> v3::Mill {
    let owner = Some("Jan\u{1b}".to_owned());
    let mode = v3::Mode::Turning(200, true);
    v3::Mill { speed: 70_000, mode, wind: 3, owner, gear: crate::versions::Gear { teeth: 12 } }
}

fn looked_at(mill: &v3::Mill) -> Inspected {
    let bytes = to_bytes(&mut mill.clone()).unwrap();
    inspect(&bytes, &Schema::new().with::<v3::Mill>()).unwrap()
}

#[test]
fn a_stream_is_printed_with_names() {
    let expected = "\
1 sections, 96 bytes of state
mill 0: version 3, 96 bytes at 16
  speed: 0x11170 (70000)
  mode: Turning
    0: 0xc8 (200)
    1: true
  wind: 3
  owner: \"Jan\\u{1b}\"
  mill/gear:
    teeth: 0xc (12)";
    assert_eq!(looked_at(&mill()).to_string(), expected);
}

#[test]
fn without_a_schema_tags_are_names() {
    let bytes = to_bytes(&mut mill()).unwrap();
    let text = inspect(&bytes, &Schema::new()).unwrap().to_string();
    assert!(text.contains("\n  #1: 0x11170 (70000)\n  #3: #2\n    #1: 0xc8 (200)\n"), "{text}");
}

#[test]
fn differences_are_named() {
    let (old, mut new) = (mill(), mill());
    assert_eq!(diff(&looked_at(&old), &looked_at(&new)), []);
    new.speed = 5;
    new.owner = None;
    new.mode = v3::Mode::Turning(201, true);
    new.gear.teeth = 0;
    let changes = diff(&looked_at(&old), &looked_at(&new));
    let lines: Vec<_> = changes.iter().map(ToString::to_string).collect();
    let expected = [
        "mill 0: speed: 0x11170 (70000) -> 5",
        "mill 0: mode.0: 0xc8 (200) -> 0xc9 (201)",
        "mill 0: owner: \"Jan\\u{1b}\" -> nothing",
        "mill 0: mill/gear: removed, was struct of 1 fields",
    ];
    assert_eq!(lines, expected);
    new.mode = v3::Mode::Still;
    let changes = diff(&looked_at(&old), &looked_at(&new));
    let mode = changes.iter().find(|change| change.place == "mill 0: mode").expect("the mode");
    assert_eq!((mode.old.as_deref(), mode.new.as_deref()), (Some("Turning"), Some("Still")));
}

#[test]
fn long_lists_are_told_apart_by_element_and_cut() {
    use pageferry_device_state::DeviceState;
    #[derive(DeviceState)]
    #[device_state(name = "ram")]
    struct Ram {
        #[device_state(tag = 1, max_len = 4096)]
        bytes: Vec<u8>,
        #[device_state(tag = 2)]
        words: [u32; 20],
    }
    let schema = Schema::new().with::<Ram>();
    let look = |bytes: Vec<u8>, words| {
        let stream = to_bytes(&mut Ram { bytes, words }).unwrap();
        inspect(&stream, &schema).unwrap()
    };
    let old = look(vec![0; 200], [7; 20]);
    let text = old.to_string();
    let expected = "\
  bytes:
    0x0000: 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
    *
    0x00c0: 00 00 00 00 00 00 00 00
  words:
    0x0000: 00000007 00000007 00000007 00000007 00000007 00000007 00000007 00000007
    *
    0x0010: 00000007 00000007 00000007 00000007";
    assert!(text.ends_with(expected), "{text}");
    let mut words = [7; 20];
    words[19] = 8;
    let changes = diff(&old, &look(vec![1; 190], words));
    assert_eq!(changes.len(), 16 + 1 + 1 + 1);
    assert_eq!(changes[0].to_string(), "ram 0: bytes[0]: 0 -> 1");
    assert_eq!(changes[16].to_string(), "ram 0: bytes: 174 more elements are different");
    assert_eq!(changes[17].to_string(), "ram 0: bytes: 200 elements -> 190 elements");
    assert_eq!(changes[18].to_string(), "ram 0: words[19]: 7 -> 8");
}

#[test]
fn sections_come_and_go() {
    let (with, without) = (looked_at(&mill()), Inspected { sections: Vec::new() });
    let change = |old: Option<&str>, new: Option<&str>| Change {
        place: "mill 0".to_owned(),
        old: old.map(str::to_owned),
        new: new.map(str::to_owned),
    };
    assert_eq!(diff(&with, &without), [change(Some("version 3"), None)]);
    assert_eq!(diff(&without, &with), [change(None, Some("version 3"))]);
}

#[test]
fn no_value_and_a_value_that_is_none_are_told_apart() {
    use pageferry_device_state::DeviceState;
    #[expect(clippy::option_option, reason = "what is told apart")]
    #[derive(DeviceState)]
    #[device_state(name = "slot")]
    struct Slot {
        #[device_state(tag = 1)]
        disk: Option<Option<u8>>,
    }
    let schema = Schema::new().with::<Slot>();
    let look = |disk| inspect(&to_bytes(&mut Slot { disk }).unwrap(), &schema).unwrap();
    let changes = diff(&look(None), &look(Some(None)));
    let [change] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!(change.to_string(), "slot 0: disk: nothing -> some(nothing)");
    assert_eq!(diff(&look(Some(None)), &look(Some(Some(5)))).len(), 1);
}

proptest! {
    #[test]
    fn streams_of_any_schema_can_be_looked_at(seed in any::<u64>()) {
        let mut random = Random::new(seed);
        let schema = schema(&mut random);
        let (one, other) = (stream(&schema, &mut random), stream(&schema, &mut random));
        let [one, other] = [&one, &other].map(|bytes| inspect(bytes, &schema).unwrap());
        prop_assert_eq!(diff(&one, &one), []);
        prop_assert_eq!(diff(&one, &other).is_empty(), one == other);
        prop_assert!(!one.to_string().contains('#'), "{}", one);
    }

    #[test]
    fn structures_without_end_are_an_error(depth in 1..3000_usize) {
        use pageferry_device_state::{Problem, StreamWriter};
        // Options in options.
        let mut writer = StreamWriter::new();
        let payload = vec![14; depth];
        writer.section("any", 0, 1, |out| {
            out.put(&[1, 0, 14, 0]);
            out.put(&u32::try_from(depth).unwrap().to_le_bytes());
            out.put(&payload);
            Ok(())
        }).unwrap();
        let looked_at = inspect(&writer.finish(), &Schema::new());
        match looked_at {
            Ok(_) => prop_assert!(depth <= 64),
            Err(error) => {
                let is_depth = matches!(error.problem(), Problem::Depth { .. });
                prop_assert!(is_depth && depth > 50, "{}", error);
            }
        }
    }
}
