//! The shapes of objects that are no documents of `pageferry-report`: every field with its type, as
//! others' scripts rely on it. A new field changes the snapshot, and `docs/report.md`.

#[path = "../../../report/tests/support/shape.rs"]
mod shape;

use serde_json::Value;
use shape::shape;

use crate::support::{no_kvm, run};

fn shape_of(args: &[&str]) -> Value {
    let ran = run(args);
    assert_eq!(ran.status, Some(0), "{args:?}: {}", ran.stderr);
    shape(&serde_json::from_str(&ran.stdout).expect("JSON"))
}

#[test]
fn of_bitmap() {
    let args = ["bitmap", "--json", "--guest=4M", "--dirty=0", "--threads=1", "--samples=1"];
    insta::assert_json_snapshot!(shape_of(&args));
}

#[test]
fn of_throughput() {
    let args = ["throughput", "--json", "--memory=4M", "--pairs=1", "--backing=memfd"];
    insta::assert_json_snapshot!(shape_of(&args));
}

#[test]
fn of_hot() {
    insta::assert_json_snapshot!(shape_of(&["hot", "framing"]));
}

#[test]
fn of_rearm() {
    if no_kvm() {
        return;
    }
    let args = ["rearm", "--json", "--vcpus=1", "--memory=128M", "--samples=1", "--gigabits=100"];
    insta::assert_json_snapshot!(shape_of(&args));
}
