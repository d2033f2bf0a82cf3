//! Error texts say a cause once. [`pageferry::Chain`] shows an error and its causes one after the
//! other, so a text that shows its own cause has it twice.

use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::Visit;
use syn::{Attribute, Field, Fields, LitStr, Meta};

/// What is wrong with the error texts of a file.
struct Texts<'a> {
    file: &'a Path,
    checked: usize,
    wrong: Vec<String>,
}

impl Texts<'_> {
    fn check(&mut self, name: &str, attributes: &[Attribute], fields: &Fields) {
        let Some(text) = attributes.iter().find_map(text_of) else { return };
        self.checked += 1;
        let Some((index, cause)) = fields.iter().enumerate().find(|(_, field)| is_cause(field))
        else {
            return;
        };
        let shown = match &cause.ident {
            Some(ident) => ident.to_string(),
            None => index.to_string(),
        };
        if text.contains(&format!("{{{shown}}}")) || text.contains(&format!("{{{shown}:")) {
            let file = self.file.display();
            self.wrong.push(format!("{file}: {name}: {text:?} has its cause, {shown}, in it"));
        }
    }
}

impl<'ast> Visit<'ast> for Texts<'_> {
    fn visit_item_enum(&mut self, item: &'ast syn::ItemEnum) {
        for variant in &item.variants {
            let name = format!("{}::{}", item.ident, variant.ident);
            self.check(&name, &variant.attrs, &variant.fields);
        }
    }

    fn visit_item_struct(&mut self, item: &'ast syn::ItemStruct) {
        self.check(&item.ident.to_string(), &item.attrs, &item.fields);
    }
}

/// The text of `#[error("...")]`.
fn text_of(attribute: &Attribute) -> Option<String> {
    let Meta::List(list) = &attribute.meta else { return None };
    if !list.path.is_ident("error") {
        return None;
    }
    let arguments = list.parse_args_with(|input: syn::parse::ParseStream<'_>| {
        let text: Option<LitStr> = input.parse().ok();
        // Arguments behind the text may be anything.
        let _: proc_macro2::TokenStream = input.parse()?;
        Ok(text)
    });
    arguments.ok().flatten().map(|text| text.value())
}

/// As `thiserror` sees it.
fn is_cause(field: &Field) -> bool {
    let named = field.ident.as_ref().is_some_and(|ident| ident == "source");
    named || field.attrs.iter().any(|a| a.path().is_ident("source") || a.path().is_ident("from"))
}

fn sources_in(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources_in(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn no_error_says_its_cause_twice() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = Vec::new();
    for member in fs::read_dir(&root).expect("the workspace").flatten() {
        sources_in(&member.path().join("src"), &mut files);
    }
    let (mut checked, mut wrong) = (0, Vec::new());
    for file in &files {
        let source = fs::read_to_string(file).expect("a source file");
        let parsed = syn::parse_file(&source).expect("a source file in Rust");
        let mut texts = Texts { file, checked: 0, wrong: Vec::new() };
        texts.visit_file(&parsed);
        checked += texts.checked;
        wrong.append(&mut texts.wrong);
    }
    assert!(checked > 100, "only {checked} error texts were found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
