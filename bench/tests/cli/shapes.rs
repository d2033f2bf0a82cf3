//! The shapes of objects that are no documents of `pageferry-report`: every field with its type, as
//! others' scripts rely on it. A new field changes the snapshot, and `docs/report.md`.

use serde_json::{Map, Value};

use crate::support::{no_kvm, run};

/// A value with types in place of values; of a list, of its first one.
fn shape(value: &Value) -> Value {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) => "boolean".into(),
        Value::Number(_) => "number".into(),
        Value::String(_) => "text".into(),
        Value::Array(list) => list.iter().take(1).map(shape).collect(),
        Value::Object(object) => {
            let fields = object.iter().map(|(name, value)| (name.clone(), shape(value)));
            Value::Object(fields.collect::<Map<_, _>>())
        }
    }
}

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
