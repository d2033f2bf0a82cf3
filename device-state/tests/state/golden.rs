//! Schemas and streams of past versions, as they were kept. They are never changed: a new version
//! adds files. `PAGEFERRY_BLESS=1` writes those that are missing.

use std::fs;
use std::path::PathBuf;

use pageferry_device_state::schema::Verdict;
use pageferry_device_state::{Schema, Section, from_bytes, to_bytes};

use crate::versions::{Gear, v1, v2, v2_gears, v3, v4};

fn path(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/golden", name].iter().collect()
}

/// Keeps what is there now, where nothing was kept and that is wanted.
fn keep(name: &str, now: &[u8]) {
    if !path(name).exists() && std::env::var_os("PAGEFERRY_BLESS").is_some() {
        fs::write(path(name), now).unwrap();
    }
}

/// What was kept.
fn kept(name: &str) -> Vec<u8> {
    let path = path(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Writes a version as it was written then: neither its schema nor its bytes have changed.
#[track_caller]
fn assert_unchanged<S: Section>(name: &str, mut state: S) {
    let schema = format!("{}\n", Schema::new().with::<S>().to_pretty_json());
    keep(&format!("{name}.json"), schema.as_bytes());
    let then = kept(&format!("{name}.json"));
    assert_eq!(String::from_utf8(then).unwrap(), schema, "the schema of {name} has changed");
    let stream = to_bytes(&mut state).unwrap();
    keep(&format!("{name}.state"), &stream);
    assert_eq!(kept(&format!("{name}.state")), stream, "the bytes of {name} have changed");
}

#[test]
fn what_was_written_then_would_be_written_now() {
    let grain = vec![1, 500];
    assert_unchanged(
        "mill-1",
        v1::Mill { speed: 9, grain: grain.clone(), mode: v1::Mode::Turning(3) },
    );
    let (mode, wind) = (v2::Mode::Still, 200);
    assert_unchanged("mill-2", v2::Mill { speed: 9, grain: grain.clone(), mode, wind });
    let (mode, gear) = (v2_gears::Mode::Turning(4), Gear { teeth: 31 });
    assert_unchanged("mill-2-gears", v2_gears::Mill { speed: 9, grain, mode, wind, gear });
    let owner = Some("Jan".to_owned());
    let (mode, gear) = (v3::Mode::Braking, Gear::default());
    assert_unchanged("mill-3", v3::Mill { speed: 9, mode, wind, owner, gear });
}

#[test]
fn the_newest_version_reads_the_old_ones_as_declared() {
    let read = |name: &str| from_bytes::<v4::Mill>(&kept(&format!("{name}.state")));
    let error = read("mill-1").unwrap_err().to_string();
    assert!(error.ends_with("version 1, versions 2 to 4 are read here"), "{error}");
    let mill = read("mill-2").unwrap();
    assert_eq!((mill.speed, mill.mode, mill.wind), (9, v4::Mode::Still, 200));
    assert_eq!((mill.owner, mill.gear.teeth), (None, 0));
    let mill = read("mill-2-gears").unwrap();
    assert_eq!((mill.mode, mill.gear.teeth), (v4::Mode::Turning(4, true), 31));
    let mill = read("mill-3").unwrap();
    assert_eq!((mill.mode, mill.owner.as_deref()), (v4::Mode::Braking, Some("Jan")));
}

#[test]
fn nothing_broke_undeclared() {
    let now = Schema::new().with::<v4::Mill>();
    for (name, verdict) in [
        ("mill-1", Verdict::Fails),
        ("mill-2", Verdict::Works),
        ("mill-2-gears", Verdict::Works),
        ("mill-3", Verdict::Works),
    ] {
        let then = Schema::from_json(&kept(&format!("{name}.json"))).unwrap();
        let compatibility = now.reads(&then);
        assert_eq!(compatibility.verdict(), verdict, "{name}: {compatibility}");
        assert_eq!(compatibility.undeclared().count(), 0, "{name}: {compatibility}");
        assert_eq!(then.reads(&now).undeclared().count(), 0);
    }
}
