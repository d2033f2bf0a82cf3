//! The shape of an object: every field with its type.

use serde_json::{Map, Value};

/// A value with types in place of values; of a list, of its first one.
pub(crate) fn shape(value: &Value) -> Value {
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
