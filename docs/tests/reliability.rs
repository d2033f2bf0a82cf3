//! What is promised is tested: the tests that a document names exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The names of all functions in a tree's sources that are tests, or that a macro makes tests of.
fn functions(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            functions(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let source = fs::read_to_string(&path).unwrap();
            let names = source.split("fn ").skip(1).filter_map(|rest| rest.split_once('('));
            found.extend(names.map(|(name, _)| name.to_owned()));
        }
    }
}

#[test]
fn the_tests_of_what_is_promised_exist() {
    let document = include_str!("../reliability.md");
    let mut found = BTreeSet::new();
    functions(&Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), &mut found);
    // Names of tests have several words; code that is something else has a dot, a colon or a slash.
    let quoted = document.split('`').skip(1).step_by(2);
    let named: Vec<_> = quoted.filter(|quoted| quoted.split('_').count() > 3).collect();
    assert!(named.len() > 20, "{named:?}");
    let missing: Vec<_> = named.into_iter().filter(|name| !found.contains(*name)).collect();
    assert!(missing.is_empty(), "there are no such tests: {missing:#?}");
}
