//! A device through its versions: which of them read each other, and what becomes of the fields.

use pageferry_device_state::schema::{Difference, Verdict};
use pageferry_device_state::{DecodeError, DeviceState, Schema, Section, from_bytes, to_bytes};

use crate::generate::{Random, stream};

#[derive(DeviceState, Debug, Clone, Default, PartialEq)]
pub(crate) struct Gear {
    #[device_state(tag = 1)]
    pub(crate) teeth: u32,
}

macro_rules! version {
    (
        $(#[$about:meta])*
        $module:ident: [$($attributes:tt)*] { $($fields:tt)* }
        modes [$($mode_attributes:tt)*] { $($modes:tt)* }
    ) => {
        $(#[$about])*
        pub(crate) mod $module {
            use pageferry_device_state::DeviceState;

            #[derive(DeviceState, Debug, Clone, Default, PartialEq)]
            #[device_state(name = "mill", $($attributes)*)]
            pub(crate) struct Mill { $($fields)* }

            #[derive(DeviceState, Debug, Clone, Default, PartialEq)]
            #[device_state($($mode_attributes)*)]
            pub(crate) enum Mode { $($modes)* }
        }
    };
}

version! {
    /// The first one.
    v1: [version = 1] {
        #[device_state(tag = 1)]
        pub(crate) speed: u32,
        #[device_state(tag = 2, max_len = 8)]
        pub(crate) grain: Vec<u16>,
        #[device_state(tag = 3)]
        pub(crate) mode: Mode,
    }
    modes [version = 1] {
        #[default]
        #[device_state(tag = 1)]
        Still,
        #[device_state(tag = 2)]
        Turning(#[device_state(tag = 1)] u8),
    }
}

version! {
    /// A new field, with a version.
    v2: [version = 2] {
        #[device_state(tag = 1)]
        pub(crate) speed: u32,
        #[device_state(tag = 2, max_len = 8)]
        pub(crate) grain: Vec<u16>,
        #[device_state(tag = 3)]
        pub(crate) mode: Mode,
        #[device_state(tag = 4, since = 2, default = 77)]
        pub(crate) wind: u8,
    }
    modes [version = 1] {
        #[default]
        #[device_state(tag = 1)]
        Still,
        #[device_state(tag = 2)]
        Turning(#[device_state(tag = 1)] u8),
    }
}

version! {
    /// The same version, with a subsection.
    v2_gears: [version = 2] {
        #[device_state(tag = 1)]
        pub(crate) speed: u32,
        #[device_state(tag = 2, max_len = 8)]
        pub(crate) grain: Vec<u16>,
        #[device_state(tag = 3)]
        pub(crate) mode: Mode,
        #[device_state(tag = 4, since = 2, default = 77)]
        pub(crate) wind: u8,
        #[device_state(subsection = "mill/gear", needed = |mill: &Mill| mill.gear.teeth != 0)]
        pub(crate) gear: super::Gear,
    }
    modes [version = 1] {
        #[default]
        #[device_state(tag = 1)]
        Still,
        #[device_state(tag = 2)]
        Turning(#[device_state(tag = 1)] u8),
    }
}

version! {
    /// A field less, and a mode more.
    v3: [version = 3, retired(tag = 2, until = 2)] {
        #[device_state(tag = 1)]
        pub(crate) speed: u32,
        #[device_state(tag = 3)]
        pub(crate) mode: Mode,
        #[device_state(tag = 4, since = 2, default = 77)]
        pub(crate) wind: u8,
        #[device_state(tag = 5, since = 3, default, max_len = 4)]
        pub(crate) owner: Option<String>,
        #[device_state(subsection = "mill/gear", needed = |mill: &Mill| mill.gear.teeth != 0)]
        pub(crate) gear: super::Gear,
    }
    modes [version = 2] {
        #[default]
        #[device_state(tag = 1)]
        Still,
        #[device_state(tag = 2)]
        Turning(
            #[device_state(tag = 1)] u8,
            #[device_state(tag = 2, since = 2, default = true)] bool,
        ),
        #[device_state(tag = 3, since = 2)]
        Braking,
    }
}

version! {
    /// Version 1 is not read any more.
    v4: [version = 4, min_version = 2, retired(tag = 2, until = 2)] {
        #[device_state(tag = 1)]
        pub(crate) speed: u32,
        #[device_state(tag = 3)]
        pub(crate) mode: Mode,
        #[device_state(tag = 4)]
        pub(crate) wind: u8,
        #[device_state(tag = 5, since = 3, default, max_len = 9)]
        pub(crate) owner: Option<String>,
        #[device_state(subsection = "mill/gear", needed = |mill: &Mill| mill.gear.teeth != 0)]
        pub(crate) gear: super::Gear,
    }
    modes [version = 2] {
        #[default]
        #[device_state(tag = 1)]
        Still,
        #[device_state(tag = 2)]
        Turning(
            #[device_state(tag = 1)] u8,
            #[device_state(tag = 2, since = 2, default = true)] bool,
        ),
        #[device_state(tag = 3, since = 2)]
        Braking,
    }
}

/// A version as data.
pub(crate) struct Mill {
    pub(crate) name: &'static str,
    pub(crate) schema: Schema,
    pub(crate) read: fn(&[u8]) -> Result<(), DecodeError>,
}

fn mill<S: Section>(name: &'static str) -> Mill {
    let read = |bytes: &[u8]| from_bytes::<S>(bytes).map(|_| ());
    Mill { name, schema: Schema::new().with::<S>(), read }
}

pub(crate) fn mills() -> [Mill; 5] {
    [
        mill::<v1::Mill>("v1"),
        mill::<v2::Mill>("v2"),
        mill::<v2_gears::Mill>("v2_gears"),
        mill::<v3::Mill>("v3"),
        mill::<v4::Mill>("v4"),
    ]
}

#[test]
fn versions_read_each_other_as_declared() {
    use Verdict::{Depends, Fails, Works};
    // From the writer on the left to the readers v1, v2, v2_gears, v3, v4.
    let expected = [
        [Works, Works, Works, Works, Fails],
        [Fails, Works, Works, Works, Works],
        [Fails, Depends, Works, Works, Works],
        [Fails, Fails, Fails, Works, Works],
        [Fails, Fails, Fails, Fails, Works],
    ];
    for (writer, expected) in mills().iter().zip(expected) {
        for (reader, expected) in mills().iter().zip(expected) {
            let compatibility = reader.schema.reads(&writer.schema);
            let (from, to) = (writer.name, reader.name);
            assert_eq!(compatibility.verdict(), expected, "{from} to {to}: {compatibility}");
            assert_eq!(compatibility.undeclared().count(), 0, "{from} to {to}: {compatibility}");
            let results = (0..200).map(|seed| {
                let bytes = stream(&writer.schema, &mut Random::new(seed));
                (reader.read)(&bytes).is_ok()
            });
            let read = results.filter(|read| *read).count();
            let as_expected = match expected {
                Works => read == 200,
                Depends => (50..150).contains(&read),
                _ => read == 0,
            };
            assert!(as_expected, "{from} to {to}: {expected:?}, and {read} of 200 were read");
        }
    }
}

#[test]
fn what_an_old_version_lacks_is_its_default() {
    let mut old = v1::Mill { speed: 9, grain: vec![1, 2], mode: v1::Mode::Turning(3) };
    let bytes = to_bytes(&mut old).unwrap();
    let new: v2::Mill = from_bytes(&bytes).unwrap();
    assert_eq!((new.speed, new.grain.as_slice(), new.wind), (9, &[1, 2][..], 77));
    // The grain is read over, and the mode has a default of its own.
    let newer: v3::Mill = from_bytes(&bytes).unwrap();
    assert_eq!((newer.speed, newer.wind, newer.owner), (9, 77, None));
    assert_eq!(newer.mode, v3::Mode::Turning(3, true));
    let error = from_bytes::<v4::Mill>(&bytes).unwrap_err().to_string();
    let text = "section mill 0, offset 16: version 1, versions 2 to 4 are read here";
    assert_eq!(error, text);
}

#[test]
fn a_new_version_goes_back_while_its_subsection_is_not_needed() {
    let mut new = v2_gears::Mill { speed: 9, ..Default::default() };
    let old: v2::Mill = from_bytes(&to_bytes(&mut new).unwrap()).unwrap();
    assert_eq!(old.speed, 9);
    new.gear.teeth = 12;
    let error = from_bytes::<v2::Mill>(&to_bytes(&mut new).unwrap()).unwrap_err().to_string();
    assert!(error.ends_with("subsection mill/gear is not known"), "{error}");
}

#[test]
fn what_is_declared_later_is_a_version() {
    let compatibility = mills()[0].schema.reads(&mills()[1].schema);
    let [finding] = compatibility.findings.as_slice() else { panic!("{compatibility}") };
    assert_eq!(finding.difference, Difference::TooNew { writer: 2, reader: 1 });
    assert_eq!(finding.place, "mill");
    assert!(finding.is_declared());
}
