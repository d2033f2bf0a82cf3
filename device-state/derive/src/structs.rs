//! Structs.

use darling::util::Override;
use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::{Index, Member};

use crate::attributes::FieldAttributes;
use crate::codec::{at, codec};

/// A value to be decoded into.
pub(crate) fn blank(fields: &[FieldAttributes]) -> TokenStream {
    let fields = blank_fields(fields);
    quote!(Self { #fields })
}

/// The fields of such a value, named or by their positions.
pub(crate) fn blank_fields(fields: &[FieldAttributes]) -> TokenStream {
    let fields = fields.iter().enumerate().map(|(position, field)| {
        let (member, ty) = (member(field, position), &field.ty);
        let blank = if field.is_skipped() {
            quote_spanned!(at(ty)=> ::core::default::Default::default())
        } else {
            let codec = codec(ty, field.with.as_ref());
            quote_spanned!(at(ty)=> <#codec as ::pageferry_device_state::Codec<#ty>>::blank())
        };
        quote!(#member: #blank)
    });
    quote!(#(#fields),*)
}

/// Shows the visitor all fields in the order of their tags, then all subsections in the order of
/// their names: as they stand in a stream.
pub(crate) fn visit(fields: &[FieldAttributes]) -> TokenStream {
    let getter = |member: &Member| quote!(|state: &mut Self| ::core::option::Option::Some(&mut state.#member));
    let tagged = visit_fields(fields, getter);
    let mut subsections: Vec<_> = fields
        .iter()
        .enumerate()
        .filter_map(|(position, field)| {
            let name = field.subsection.as_ref()?.as_str();
            Some((name, subsection(name, field, position)))
        })
        .collect();
    subsections.sort_by_key(|(name, _)| *name);
    let subsections = subsections.into_iter().map(|(_, tokens)| tokens);
    quote!(#tagged #(#subsections)*)
}

/// Shows the visitor fields in the order of their tags; `getter` finds one in the state.
pub(crate) fn visit_fields(
    fields: &[FieldAttributes],
    getter: impl Fn(&Member) -> TokenStream,
) -> TokenStream {
    let mut visits: Vec<_> = fields
        .iter()
        .enumerate()
        .filter(|(_, field)| !field.is_skipped())
        .filter_map(|(position, field)| {
            let tag = **field.tag.as_ref()?;
            let getter = getter(&member(field, position));
            Some((tag, visit_field(tag, field, position, &getter)))
        })
        .collect();
    visits.sort_by_key(|(tag, _)| *tag);
    let visits = visits.into_iter().map(|(_, tokens)| tokens);
    quote!(#(#visits)*)
}

fn visit_field(
    tag: u16,
    field: &FieldAttributes,
    position: usize,
    getter: &TokenStream,
) -> TokenStream {
    let (name, since, ty) = (field.name(position), field.since(), &field.ty);
    let codec = codec(ty, field.with.as_ref());
    let max_len = field.max_len.as_ref();
    let max_len =
        max_len.map_or_else(|| quote!(::core::primitive::u32::MAX), |max_len| quote!(#max_len));
    let default = field.default.as_ref().map(default);
    let default = default.map_or_else(
        || quote!(::core::option::Option::None),
        |default| quote!(::core::option::Option::Some(|| #default)),
    );
    quote_spanned! {at(ty)=>
        ::pageferry_device_state::Visitor::field::<#ty, #codec>(
            visitor,
            &::pageferry_device_state::Field {
                tag: #tag,
                name: #name,
                since: #since,
                max_len: #max_len,
                default: #default,
                get: #getter,
            },
        )?;
    }
}

fn subsection(name: &str, field: &FieldAttributes, position: usize) -> TokenStream {
    let (member, ty, needed) = (member(field, position), &field.ty, &field.needed);
    let default = field.default.as_ref().map_or_else(|| default(&Override::Inherit), default);
    quote_spanned! {at(ty)=>
        ::pageferry_device_state::Visitor::subsection::<#ty>(
            visitor,
            &::pageferry_device_state::Subsection {
                name: #name,
                needed: |state: &Self| (#needed)(state),
                default: || #default,
                get: |state: &mut Self| &mut state.#member,
            },
        )?;
    }
}

fn default(given: &Override<syn::Expr>) -> TokenStream {
    match given {
        Override::Inherit => quote!(::core::default::Default::default()),
        Override::Explicit(expression) => quote!(#expression),
    }
}

fn member(field: &FieldAttributes, position: usize) -> Member {
    match &field.ident {
        Some(ident) => Member::Named(ident.clone()),
        None => Member::Unnamed(Index::from(position)),
    }
}
