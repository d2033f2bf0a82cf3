//! The shape of a document: every field with its type, as others' scripts rely on it. A field that is
//! new changes the snapshot and `docs/report.md`; one that is gone or means something else changes
//! `SCHEMA` as well.

#[path = "browser/sample.rs"]
mod sample;
#[path = "support/shape.rs"]
mod shape;

use pageferry_report::document::Document;
use serde_json::Value;
use shape::shape;

#[test]
fn the_shape_of_a_document_is_a_contract() {
    let document = serde_json::to_value(sample::document()).expect("JSON");
    assert!(!sample::PLOTS.is_empty());
    insta::assert_json_snapshot!("document", shape(&document));
}

#[test]
fn a_document_is_read_as_it_was_written() {
    let document = sample::document();
    let text = serde_json::to_string(&document).expect("JSON");
    let read = Document::parse(&text).expect("a document");
    assert_eq!(serde_json::to_string(&read).expect("JSON"), text);
}

#[test]
fn every_field_is_in_the_documentation() {
    fn names(value: &Value, into: &mut Vec<String>) {
        match value {
            Value::Array(list) => list.iter().for_each(|value| names(value, into)),
            Value::Object(object) => {
                for (name, value) in object {
                    into.push(name.clone());
                    names(value, into);
                }
            }
            _ => {}
        }
    }
    let documentation = include_str!("../../docs/report.md");
    let mut all = Vec::new();
    names(&serde_json::to_value(sample::document()).expect("JSON"), &mut all);
    for name in all {
        assert!(documentation.contains(&format!("`{name}`")), "{name} is not documented");
    }
}
