//! What is promised is tested: the tests that a document names exist, and are tests.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use pageferry::testing::conformance::{CASES, acceptors};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// The names of all tests in a tree's sources.
fn tests_of(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            tests_of(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            tests_in(fs::read_to_string(&path).unwrap().parse().unwrap(), found);
        }
    }
}

/// Functions that have the attribute `test`, also within macros (proptest's have it too), and are not
/// ignored.
fn tests_in(tokens: TokenStream, found: &mut BTreeSet<String>) {
    let (mut is_test, mut is_ignored) = (false, false);
    let mut tokens = tokens.into_iter().peekable();
    while let Some(token) = tokens.next() {
        match token {
            TokenTree::Punct(punct) if punct.as_char() == '#' => {
                if let Some(TokenTree::Group(attribute)) = tokens.peek() {
                    let text = attribute.stream().to_string();
                    is_test |= text == "test";
                    is_ignored |= text.starts_with("ignore");
                    tokens.next();
                }
            }
            TokenTree::Ident(word) if word == "fn" => {
                if let Some(TokenTree::Ident(name)) = tokens.next()
                    && is_test
                    && !is_ignored
                {
                    found.insert(name.to_string());
                }
                (is_test, is_ignored) = (false, false);
            }
            TokenTree::Group(group) => {
                tests_in(group.stream(), found);
                if group.delimiter() == Delimiter::Brace {
                    (is_test, is_ignored) = (false, false);
                }
            }
            _ => {}
        }
    }
}

#[test]
fn the_tests_of_what_is_promised_exist() {
    let document = include_str!("../reliability.md");
    let cases = CASES.iter().map(|case| case.name);
    let cases = cases.chain(acceptors::CASES.iter().map(|(name, _)| *name));
    let mut found: BTreeSet<String> = cases.map(str::to_owned).collect();
    tests_of(&Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), &mut found);
    // Names of tests have several words; code that is something else has a dot, a colon or a slash.
    let quoted = document.split('`').skip(1).step_by(2);
    let named: Vec<_> = quoted.filter(|quoted| quoted.split('_').count() > 3).collect();
    assert!(named.len() > 20, "{named:?}");
    let missing: Vec<_> = named.into_iter().filter(|name| !found.contains(*name)).collect();
    assert!(missing.is_empty(), "there are no such tests: {missing:#?}");
}

/// A helper has a fine name too, and shows nothing.
#[test]
fn what_is_no_test_is_not_taken_for_one() {
    let source = "
        #[test] fn plain() { fn within() {} }
        #[test] #[cfg(loom)] pub fn of_some_builds() {}
        proptest! { #![proptest_config(x())] /// Why.
            #[test] fn of_a_macro(x in 0..7) {} }
        mod inner { #[expect(unused)] #[test] fn deep() -> Result<(), ()> { Ok(()) } }
        fn helper_of_many_words() {}
        #[inline] fn with_another_attribute() {}
        #[cfg(test)] fn of_test_builds() {}
        #[test] #[ignore = \"slow\"] fn ignored() {}
        #[test] struct NoFunction {} fn after_it() {}
    ";
    let mut found = BTreeSet::new();
    tests_in(source.parse().unwrap(), &mut found);
    let found: Vec<_> = found.iter().map(String::as_str).collect();
    assert_eq!(found, ["deep", "of_a_macro", "of_some_builds", "plain"]);
}
