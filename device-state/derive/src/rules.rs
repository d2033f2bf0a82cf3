//! What a declaration must hold to; every complaint points at what is wrong.

use std::collections::{HashMap, HashSet};

use darling::Error;
use darling::ast::Data;
use darling::error::Accumulator;
use darling::util::SpannedValue;
use proc_macro2::Span;

use crate::attributes::{Container, FieldAttributes, VariantAttributes};
use crate::codec::is_unbounded;

/// Longest name of a section or subsection, in bytes.
const MAX_NAME_BYTES: usize = 64;

/// Checks all of it.
pub(crate) fn check(container: &Container) -> Result<(), Error> {
    let mut errors = Error::accumulator();
    if !container.generics.params.is_empty() {
        let complaint = "types with parameters cannot be device state";
        errors.push(Error::custom(complaint).with_span(&container.generics.params));
    }
    check_versions(container, &mut errors);
    check_section(container, &mut errors);
    match &container.data {
        Data::Struct(fields) => check_struct(container, &fields.fields, &mut errors),
        Data::Enum(variants) => check_enum(container, variants, &mut errors),
    }
    errors.finish()
}

fn check_versions(container: &Container, errors: &mut Accumulator) {
    let (version, min_version) = (container.version(), container.min_version());
    for given in [&container.version, &container.min_version].into_iter().flatten() {
        if **given == 0 {
            errors.push(Error::custom("versions begin with 1").with_span(&given.span()));
        }
    }
    if min_version > version {
        let complaint = format!("`min_version` is later than the version, {version}");
        let span = container.min_version.as_ref().map_or_else(Span::call_site, SpannedValue::span);
        errors.push(Error::custom(complaint).with_span(&span));
    }
    for retired in &container.retired {
        let complaint = if retired.tag == 0 {
            "tags are 1 to 65535".to_owned()
        } else if retired.until >= version {
            format!("a tag is retired with a new version: `until` is before it, {version}")
        } else {
            continue;
        };
        errors.push(Error::custom(complaint).with_span(&retired.span()));
    }
}

fn check_section(container: &Container, errors: &mut Accumulator) {
    let is_enum = matches!(container.data, Data::Enum(_));
    match &container.name {
        Some(name) if is_enum => {
            let complaint = "an enum cannot be a section: put it in a struct";
            errors.push(Error::custom(complaint).with_span(&name.span()));
        }
        Some(name) => check_name(name, name.span(), errors),
        None => {
            let priority = container.priority.iter().map(SpannedValue::span);
            let after = container.after.iter().map(SpannedValue::span);
            for span in priority.chain(after) {
                let complaint = "only a section has an order: give the type a `name`";
                errors.push(Error::custom(complaint).with_span(&span));
            }
        }
    }
    for name in &container.after {
        check_name(name, name.span(), errors);
    }
}

fn check_name(name: &str, span: Span, errors: &mut Accumulator) {
    let fits =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_./".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(fits) {
        let complaint = format!(
            "names are 1 to {MAX_NAME_BYTES} lowercase letters, digits, `-`, `_`, `.` and `/`"
        );
        errors.push(Error::custom(complaint).with_span(&span));
    }
}

fn check_struct(container: &Container, fields: &[FieldAttributes], errors: &mut Accumulator) {
    check_fields(container, fields, errors);
    let mut names = HashSet::new();
    for field in fields {
        match (&field.subsection, &field.needed) {
            (Some(subsection), needed) => {
                check_subsection(field, needed.is_some(), errors);
                check_name(subsection, subsection.span(), errors);
                if !names.insert(subsection.as_ref()) {
                    let complaint = format!("subsection `{}` is there already", **subsection);
                    errors.push(Error::custom(complaint).with_span(&subsection.span()));
                }
            }
            (None, Some(needed)) => {
                let complaint = "only a subsection is sent when it is needed";
                errors.push(Error::custom(complaint).with_span(needed));
            }
            (None, None) => {}
        }
    }
}

fn check_subsection(field: &FieldAttributes, has_needed: bool, errors: &mut Accumulator) {
    let span = field.span();
    if !has_needed {
        let complaint = "a subsection needs `needed`, a function that says when it is sent";
        errors.push(Error::custom(complaint).with_span(&span));
    }
    let others = [
        ("tag", field.tag.is_some()),
        ("since", field.since.is_some()),
        ("max_len", field.max_len.is_some()),
        ("with", field.with.is_some()),
        ("rename", field.rename.is_some()),
        ("skip", field.is_skipped()),
    ];
    for (name, _) in others.into_iter().filter(|(_, given)| *given) {
        let complaint =
            format!("a subsection has no `{name}`: it goes by its own name and version");
        errors.push(Error::custom(complaint).with_span(&span));
    }
}

fn check_enum(container: &Container, variants: &[VariantAttributes], errors: &mut Accumulator) {
    if variants.is_empty() {
        let complaint = "an enum without variants has no state";
        errors.push(Error::custom(complaint).with_span(&container.ident));
    }
    if let Some(retired) = container.retired.first() {
        let complaint = "variants of an enum are not retired: streams may still hold them";
        errors.push(Error::custom(complaint).with_span(&retired.span()));
    }
    let mut tags = Tags::new("variant");
    for variant in variants {
        let (name, span) = (variant.name(), variant.ident.span());
        if let Some(tag) = &variant.tag {
            tags.take(**tag, name, tag.span(), errors);
        } else {
            let next = next_tag(variants.iter().filter_map(|v| v.tag.as_ref()).map(|t| **t));
            let complaint = format!("a variant needs a tag; `tag = {next}` is free");
            errors.push(Error::custom(complaint).with_span(&span));
        }
        check_since(container, variant.since.as_ref().map(|s| (**s, s.span())), errors);
        check_fields(container, &variant.fields.fields, errors);
        for subsection in variant.fields.fields.iter().filter_map(|f| f.subsection.as_ref()) {
            let complaint = "only structs have subsections";
            errors.push(Error::custom(complaint).with_span(&subsection.span()));
        }
    }
}

fn check_since(container: &Container, since: Option<(u16, Span)>, errors: &mut Accumulator) {
    let Some((since, span)) = since else { return };
    let version = container.version();
    let complaint = match since {
        0 => "versions begin with 1".to_owned(),
        since if since > version => {
            format!("`since = {since}` is later than the type's version, {version}")
        }
        _ => return,
    };
    errors.push(Error::custom(complaint).with_span(&span));
}

fn check_fields(container: &Container, fields: &[FieldAttributes], errors: &mut Accumulator) {
    let mut tags = Tags::new("field");
    let mut names = HashSet::new();
    for (position, field) in fields.iter().enumerate() {
        let span = field.span();
        if field.is_skipped() {
            check_skipped(field, errors);
            continue;
        }
        if field.subsection.is_some() {
            continue;
        }
        let name = field.name(position);
        if !names.insert(name.clone()) {
            let complaint = format!("another field is called `{name}`");
            let span = field.rename.as_ref().map_or(span, SpannedValue::span);
            errors.push(Error::custom(complaint).with_span(&span));
        }
        check_since(container, field.since.as_ref().map(|s| (**s, s.span())), errors);
        let min_version = container.min_version();
        if field.since() > min_version && field.default.is_none() {
            let complaint = format!(
                "a field that came with version {} needs a `default`, since version {min_version} \
                 is still read",
                field.since()
            );
            errors.push(Error::custom(complaint).with_span(&span));
        }
        if field.max_len.is_none() && is_unbounded(&field.ty) {
            let complaint = "a field without a fixed length needs `max_len`";
            errors.push(Error::custom(complaint).with_span(&field.ty));
        }
        let Some(tag) = &field.tag else {
            let retired = container.retired.iter().map(|retired| retired.tag);
            let taken = fields.iter().filter_map(|field| field.tag.as_ref()).map(|tag| **tag);
            let next = next_tag(retired.chain(taken));
            let complaint = format!("a field needs a tag, or `skip`; `tag = {next}` is free");
            errors.push(Error::custom(complaint).with_span(&span));
            continue;
        };
        if let Some(retired) = container.retired.iter().find(|retired| retired.tag == **tag) {
            let complaint = format!(
                "tag {} is retired: streams up to version {} hold something else under it",
                **tag, retired.until
            );
            errors.push(Error::custom(complaint).with_span(&tag.span()));
        }
        tags.take(**tag, name, tag.span(), errors);
    }
}

fn check_skipped(field: &FieldAttributes, errors: &mut Accumulator) {
    let others = field.tag.is_some()
        || field.since.is_some()
        || field.default.is_some()
        || field.max_len.is_some()
        || field.with.is_some()
        || field.rename.is_some();
    if others {
        let complaint = "a field that is skipped is not in the stream: `skip` stands alone";
        errors.push(Error::custom(complaint).with_span(&field.span()));
    }
}

/// The lowest tag above all that were ever used.
fn next_tag(taken: impl Iterator<Item = u16>) -> u16 {
    taken.max().unwrap_or(0).saturating_add(1)
}

/// Who has which tag.
struct Tags {
    what: &'static str,
    taken: HashMap<u16, String>,
}

impl Tags {
    fn new(what: &'static str) -> Self {
        Self { what, taken: HashMap::new() }
    }

    fn take(&mut self, tag: u16, name: String, span: Span, errors: &mut Accumulator) {
        if tag == 0 {
            errors.push(Error::custom("tags are 1 to 65535").with_span(&span));
        } else if let Some(other) = self.taken.insert(tag, name) {
            let complaint = format!("tag {tag} is taken by {} `{other}`", self.what);
            errors.push(Error::custom(complaint).with_span(&span));
        }
    }
}
