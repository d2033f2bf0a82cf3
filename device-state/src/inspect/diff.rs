//! What is different in two streams.

use std::fmt;

use super::{Inspected, Item, Named};

/// Elements of a list of scalars that are told one by one; the rest is counted.
const MAX_ELEMENTS: usize = 16;

/// Something that is different.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The way to it: `vcpu 1: regs.rip`.
    pub place: String,
    /// What it was; `None` if it was not there.
    pub old: Option<String>,
    /// What it is now; `None` if it is not there any more.
    pub new: Option<String>,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, old, new } = self;
        match (old, new) {
            (Some(old), Some(new)) => write!(f, "{place}: {old} -> {new}"),
            (None, Some(new)) => write!(f, "{place}: added, {new}"),
            (Some(old), None) => write!(f, "{place}: removed, was {old}"),
            (None, None) => write!(f, "{place}"),
        }
    }
}

/// Everything that is different, in the order of the old stream.
pub fn diff(old: &Inspected, new: &Inspected) -> Vec<Change> {
    let mut changes = Changes::default();
    for section in &old.sections {
        let place = format!("{} {}", section.name, section.instance);
        let same = |other: &&super::InspectedSection| {
            (&other.name, other.instance) == (&section.name, section.instance)
        };
        let Some(other) = new.sections.iter().find(same) else {
            changes.add(place, Some(format!("version {}", section.version)), None);
            continue;
        };
        changes.versions(&place, section.version, other.version);
        changes.fields(&format!("{place}: "), &section.fields, &other.fields);
    }
    for section in &new.sections {
        let is_there = |other: &super::InspectedSection| {
            (&other.name, other.instance) == (&section.name, section.instance)
        };
        if !old.sections.iter().any(is_there) {
            let place = format!("{} {}", section.name, section.instance);
            changes.add(place, None, Some(format!("version {}", section.version)));
        }
    }
    changes.found
}

#[derive(Default)]
struct Changes {
    found: Vec<Change>,
}

impl Changes {
    fn add(&mut self, place: String, old: Option<String>, new: Option<String>) {
        self.found.push(Change { place, old, new });
    }

    fn versions(&mut self, place: &str, old: u16, new: u16) {
        if old != new {
            let version = |version| Some(format!("version {version}"));
            self.add(place.to_owned(), version(old), version(new));
        }
    }

    /// `way` ends with what separates it from a name.
    fn fields(&mut self, way: &str, old: &[Named], new: &[Named]) {
        for Named { name, value } in old {
            let place = format!("{way}{name}");
            match new.iter().find(|other| other.name == *name) {
                Some(other) => self.items(&place, value, &other.value),
                None => self.add(place, Some(value.to_string()), None),
            }
        }
        for Named { name, value } in new {
            if !old.iter().any(|other| other.name == *name) {
                self.add(format!("{way}{name}"), None, Some(value.to_string()));
            }
        }
    }

    fn items(&mut self, place: &str, old: &Item, new: &Item) {
        match (old, new) {
            (old, new) if old == new => {}
            (
                Item::Struct { version: old_version, fields: old },
                Item::Struct { version: new_version, fields: new },
            ) => {
                self.versions(place, *old_version, *new_version);
                self.fields(&format!("{place}."), old, new);
            }
            (
                Item::Variant { version: old_version, name: old_name, fields: old },
                Item::Variant { version: new_version, name: new_name, fields: new },
            ) if old_name == new_name => {
                self.versions(place, *old_version, *new_version);
                self.fields(&format!("{place}."), old, new);
            }
            (Item::List(old), Item::List(new)) => self.lists(place, old, new),
            (
                Item::Scalars { kind: old_kind, bytes: old },
                Item::Scalars { kind: new_kind, bytes: new },
            ) if old_kind == new_kind => {
                let width = old_kind.width_bytes().unwrap_or(1);
                let item = |bytes: &[u8]| Item::scalar(*old_kind, bytes);
                self.scalars(place, width, old, new, item);
            }
            (old, new) => self.add(place.to_owned(), Some(old.to_string()), Some(new.to_string())),
        }
    }

    fn lists(&mut self, place: &str, old: &[Item], new: &[Item]) {
        for (index, (old, new)) in old.iter().zip(new).enumerate() {
            self.items(&format!("{place}[{index}]"), old, new);
        }
        let common = old.len().min(new.len());
        for (index, item) in old.iter().enumerate().skip(common) {
            self.add(format!("{place}[{index}]"), Some(item.to_string()), None);
        }
        for (index, item) in new.iter().enumerate().skip(common) {
            self.add(format!("{place}[{index}]"), None, Some(item.to_string()));
        }
    }

    fn scalars(
        &mut self,
        place: &str,
        width: usize,
        old: &[u8],
        new: &[u8],
        item: impl Fn(&[u8]) -> Item,
    ) {
        let pairs = old.chunks(width).zip(new.chunks(width)).enumerate();
        let mut differing = pairs.filter(|(_, (old, new))| old != new);
        for (index, (old, new)) in differing.by_ref().take(MAX_ELEMENTS) {
            let (old, new) = (item(old).to_string(), item(new).to_string());
            self.add(format!("{place}[{index}]"), Some(old), Some(new));
        }
        let more = differing.count();
        if more > 0 {
            self.add(format!("{place}: {more} more elements are different"), None, None);
        }
        if old.len() != new.len() {
            let elements = |bytes: &[u8]| Some(format!("{} elements", bytes.len() / width));
            self.add(place.to_owned(), elements(old), elements(new));
        }
    }
}
