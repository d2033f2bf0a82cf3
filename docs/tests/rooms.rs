//! The modules of each crate form no ring: of two that lie side by side, at most one knows the other, be it
//! through a third. Whoever reads one has then a first and a last page. The engine's have an order, which
//! CONTRIBUTING.md tells.
//!
//! What is counted: paths and imports, resolved through re-exports to where the name is defined, outside of
//! tests. A parent and its children may know each other: they are one room and its corners. What lies in
//! folders side by side is counted as the folders.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemUse, UseTree};

/// A module by the names on the way to it from the crate.
type Module = Vec<String>;

#[derive(Debug, Clone)]
enum Name {
    /// Defined in this module.
    Here,
    /// A module below this one.
    Below,
    /// Stands for another path.
    Alias(Vec<String>),
}

#[derive(Debug, Default)]
struct Room {
    names: BTreeMap<String, Name>,
    globs: Vec<Vec<String>>,
    /// What it mentions, as it stands there.
    paths: BTreeSet<Vec<String>>,
}

#[derive(Debug, Default)]
struct House(BTreeMap<Module, Room>);

impl House {
    fn read(root: &Path) -> Self {
        let mut house = Self::default();
        house.read_file(&Vec::new(), root, root.parent().unwrap());
        house
    }

    /// Reads the module in `file`; those below it are in `folder`.
    fn read_file(&mut self, module: &Module, file: &Path, folder: &Path) {
        let source = fs::read_to_string(file).unwrap();
        let parsed = syn::parse_file(&source);
        let parsed = parsed.unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        self.read_items(module, &parsed.items, folder);
    }

    fn read_items(&mut self, module: &Module, items: &[Item], folder: &Path) {
        let mut room = Room::default();
        for item in items.iter().filter(|item| !only_for_tests(attributes(item))) {
            match item {
                Item::Mod(below) => {
                    let name = below.ident.to_string();
                    room.names.insert(name.clone(), Name::Below);
                    let inner = [module.as_slice(), std::slice::from_ref(&name)].concat();
                    let inner_folder = folder.join(&name);
                    if let Some((_, items)) = &below.content {
                        self.read_items(&inner, items, &inner_folder);
                    } else {
                        let beside = folder.join(format!("{name}.rs"));
                        let file = Some(beside).filter(|file| file.exists());
                        let file = file.unwrap_or_else(|| inner_folder.join("mod.rs"));
                        self.read_file(&inner, &file, &inner_folder);
                    }
                }
                Item::Use(import) => room.import(import),
                other => {
                    if let Some(name) = defined(other) {
                        room.names.insert(name, Name::Here);
                    }
                    room.visit_item(other);
                }
            }
        }
        self.0.insert(module.clone(), room);
    }

    /// The module in which what `path` names is defined, seen from `module`; none if that is another crate.
    fn resolve(&self, module: &Module, path: &[String], depth: usize) -> Option<Module> {
        let (first, rest) = path.split_first()?;
        match first.as_str() {
            "crate" => self.follow(&Vec::new(), rest, depth),
            "self" => self.follow(module, rest, depth),
            "super" => {
                let (_, above) = module.split_last()?;
                self.resolve(&above.to_vec(), &prefixed("self", rest), depth)
            }
            _ if self.knows(module, first, depth) => self.follow(module, path, depth),
            _ => None,
        }
    }

    fn knows(&self, module: &Module, name: &str, depth: usize) -> bool {
        let Some(room) = self.0.get(module) else { return false };
        room.names.contains_key(name)
            || (depth > 0
                && room.globs.iter().any(|glob| {
                    let from = self.resolve(module, glob, depth - 1);
                    from.is_some_and(|from| from != *module && self.knows(&from, name, depth - 1))
                }))
    }

    fn follow(&self, module: &Module, path: &[String], depth: usize) -> Option<Module> {
        let Some((first, rest)) = path.split_first() else { return Some(module.clone()) };
        let depth = depth.checked_sub(1)?;
        match first.as_str() {
            "self" => return self.follow(module, rest, depth),
            "super" => return self.resolve(module, path, depth),
            _ => {}
        }
        let room = self.0.get(module)?;
        match room.names.get(first) {
            Some(Name::Here) => Some(module.clone()),
            Some(Name::Below) => {
                self.follow(&[module.as_slice(), &path[..1]].concat(), rest, depth)
            }
            Some(Name::Alias(target)) => {
                self.resolve(module, &[target.as_slice(), rest].concat(), depth)
            }
            None => room.globs.iter().find_map(|glob| {
                let from = self.resolve(module, glob, depth)?;
                let known = from != *module && self.knows(&from, first, depth);
                known.then(|| self.follow(&from, path, depth)).flatten()
            }),
        }
    }

    /// Of each module, which others beside it are known to it, with a pair of modules that shows it.
    fn arrows(&self) -> BTreeMap<Module, BTreeMap<Module, (Module, Module)>> {
        let mut arrows: BTreeMap<Module, BTreeMap<Module, (Module, Module)>> = BTreeMap::new();
        for (module, room) in &self.0 {
            for target in room.paths.iter().filter_map(|path| self.resolve(module, path, 16)) {
                let common = module.iter().zip(&target).take_while(|(a, b)| a == b).count();
                if common < module.len() && common < target.len() {
                    let (from, to) = (&module[..=common], &target[..=common]);
                    let known = arrows.entry(from.to_vec()).or_default();
                    known.entry(to.to_vec()).or_insert_with(|| (module.clone(), target.clone()));
                }
            }
        }
        arrows
    }

    /// The rings, each as its modules and the arrows among them.
    fn rings(&self) -> Vec<String> {
        let arrows = self.arrows();
        let reached: BTreeMap<&Module, BTreeSet<&Module>> =
            arrows.keys().map(|from| (from, reached(&arrows, from))).collect();
        let mut rings = Vec::new();
        let mut told = BTreeSet::new();
        for from in arrows.keys() {
            let back = |to: &&Module| reached.get(*to).is_some_and(|onward| onward.contains(from));
            let ring: BTreeSet<_> = reached[from].iter().copied().filter(back).collect();
            if ring.is_empty() || !told.insert(ring.clone()) {
                continue;
            }
            let mut text = format!("{} modules:", ring.len());
            for from in &ring {
                for (_, (by, of)) in arrows[*from].iter().filter(|(to, _)| ring.contains(to)) {
                    text += "\n    ";
                    text += &[by.join("::"), of.join("::")].join(" -> ");
                }
            }
            rings.push(text);
        }
        rings
    }
}

fn reached<'a>(
    arrows: &'a BTreeMap<Module, BTreeMap<Module, (Module, Module)>>,
    from: &Module,
) -> BTreeSet<&'a Module> {
    let mut found = BTreeSet::new();
    let mut next: Vec<_> = arrows[from].keys().collect();
    while let Some(module) = next.pop() {
        if found.insert(module) {
            next.extend(arrows.get(module).into_iter().flat_map(BTreeMap::keys));
        }
    }
    found
}

impl Room {
    fn import(&mut self, import: &ItemUse) {
        let start = if import.leading_colon.is_some() { vec!["::".to_owned()] } else { Vec::new() };
        self.import_tree(start, &import.tree);
    }

    fn import_tree(&mut self, mut path: Vec<String>, tree: &UseTree) {
        let (name, known_as) = match tree {
            UseTree::Path(onward) => {
                path.push(onward.ident.to_string());
                return self.import_tree(path, &onward.tree);
            }
            UseTree::Group(group) => {
                return group.items.iter().for_each(|tree| self.import_tree(path.clone(), tree));
            }
            UseTree::Glob(_) => return self.globs.push(path),
            UseTree::Name(name) => (name.ident.to_string(), name.ident.to_string()),
            UseTree::Rename(rename) => (rename.ident.to_string(), rename.rename.to_string()),
        };
        let known_as = match (name.as_str(), path.last()) {
            ("self", Some(last)) if known_as == "self" => last.clone(),
            _ => known_as,
        };
        if name != "self" {
            path.push(name);
        }
        // `use name;` of another crate.
        if path.len() > 1 {
            self.names.insert(known_as, Name::Alias(path.clone()));
        }
        self.paths.insert(path);
    }

    fn mention(&mut self, path: Vec<String>) {
        if path.len() > 1 {
            self.paths.insert(path);
        }
    }

    /// Paths in what a macro is given: words with `::` between them.
    fn visit_tokens(&mut self, tokens: TokenStream) {
        let (mut path, mut colons) = (Vec::new(), 0);
        for token in tokens {
            match token {
                TokenTree::Ident(word) => {
                    if colons != 2 {
                        self.mention(std::mem::take(&mut path));
                    }
                    path.push(word.to_string());
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                TokenTree::Group(group) => {
                    self.mention(std::mem::take(&mut path));
                    self.visit_tokens(group.stream());
                }
                _ => self.mention(std::mem::take(&mut path)),
            }
        }
        self.mention(path);
    }
}

impl<'ast> Visit<'ast> for Room {
    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            self.mention(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        }
        visit::visit_path(self, path);
    }

    fn visit_item_use(&mut self, import: &'ast ItemUse) {
        self.import(import);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.visit_tokens(call.tokens.clone());
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        if !only_for_tests(&function.attrs) {
            visit::visit_impl_item_fn(self, function);
        }
    }

    // `pub(super)` is not a use of what is above, and what an attribute names is not either.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}

    fn visit_attribute(&mut self, _: &'ast Attribute) {}
}

fn prefixed(first: &str, rest: &[String]) -> Vec<String> {
    std::iter::once(first.to_owned()).chain(rest.iter().cloned()).collect()
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// Whether it stands behind `cfg(test)`, with or without more conditions.
fn only_for_tests(attributes: &[Attribute]) -> bool {
    fn says_test(tokens: TokenStream) -> bool {
        tokens.into_iter().any(|token| match token {
            TokenTree::Ident(word) => word == "test",
            TokenTree::Group(group) => says_test(group.stream()),
            _ => false,
        })
    }
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.meta.require_list().is_ok_and(|list| says_test(list.tokens.clone()))
    })
}

fn defined(item: &Item) -> Option<String> {
    let name = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Macro(item) => item.ident.as_ref()?,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::Type(item) => &item.ident,
        Item::Union(item) => &item.ident,
        _ => return None,
    };
    Some(name.to_string())
}

/// The root modules of all crates: libraries and programs.
fn folders_in(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.is_dir()).collect()
}

fn roots() -> Vec<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut roots = Vec::new();
    // Some crates lie in another one's folder.
    let crates = folders_in(&workspace).into_iter().filter(|folder| !folder.ends_with("target"));
    let crates = crates.flat_map(|folder| [folders_in(&folder), vec![folder]].concat());
    for sources in crates.map(|folder| folder.join("src")) {
        for root in ["lib.rs", "main.rs"] {
            roots.extend(Some(sources.join(root)).filter(|root| root.exists()));
        }
        for program in fs::read_dir(sources.join("bin")).into_iter().flatten() {
            let program = program.unwrap().path();
            let inner = program.join("main.rs");
            roots.push(if inner.exists() { inner } else { program });
        }
    }
    roots.sort();
    assert!(roots.len() > 16, "{roots:?}");
    roots
}

#[test]
fn no_modules_form_a_ring() {
    let mut found = Vec::new();
    for root in roots() {
        for ring in House::read(&root).rings() {
            found.push(format!("{}: {ring}", root.display()));
        }
    }
    assert!(found.is_empty(), "{} rings:\n{}", found.len(), found.join("\n"));
}

/// The floors that CONTRIBUTING.md names.
fn floors() -> Vec<String> {
    let text = include_str!("../../CONTRIBUTING.md");
    let (_, list) = text.split_once("The engine's floors, from the ground up:").unwrap();
    let (list, _) = list.split_once(';').unwrap();
    list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn no_import_of_the_engine_runs_up() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/src/lib.rs");
    let house = House::read(&root);
    let floors = floors();
    let height = |module: &Module| floors.iter().position(|floor| *floor == module[0]);

    let rooms: BTreeSet<_> = house.0.keys().filter_map(|module| module.first()).collect();
    assert_eq!(rooms, floors.iter().collect(), "not the same modules as in CONTRIBUTING.md");

    let arrows = house.arrows();
    let arrows = arrows.iter().filter(|(from, _)| from.len() == 1);
    let mut imports = 0;
    let mut up = Vec::new();
    for (from, to) in arrows.flat_map(|(_, known)| known.values()) {
        imports += 1;
        if height(from) <= height(to) {
            up.push([from.join("::"), to.join("::")].join(" -> "));
        }
    }
    assert!(imports > 30, "only {imports} were found");
    assert!(up.is_empty(), "{} of {imports} run up:\n{}", up.len(), up.join("\n"));
}
