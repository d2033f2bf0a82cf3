//! Enums.

use proc_macro2::TokenStream;
use quote::quote;
use syn::Member;

use crate::attributes::VariantAttributes;
use crate::structs::{blank_fields, visit_fields};

/// A value to be decoded into: the first variant.
pub(crate) fn blank(variants: &[VariantAttributes]) -> TokenStream {
    variants.first().map(make).unwrap_or_default()
}

fn make(variant: &VariantAttributes) -> TokenStream {
    let (ident, fields) = (&variant.ident, blank_fields(&variant.fields.fields));
    // Braces do for all kinds of variants, positions for names.
    quote!(Self::#ident { #fields })
}

/// Shows the visitor all variants, and the fields of those that it wants to see.
pub(crate) fn visit(variants: &[VariantAttributes]) -> TokenStream {
    let visits = variants.iter().map(|variant| {
        let (ident, name, since) = (&variant.ident, variant.name(), variant.since());
        let tag = variant.tag.as_ref().map_or(0, |tag| **tag);
        let make = make(variant);
        // With one variant only, the others would be a pattern that never matches.
        let (other, is_other) = if variants.len() > 1 {
            (quote!(_ => ::core::option::Option::None,), quote!(_ => false,))
        } else {
            (quote!(), quote!())
        };
        let fields = visit_fields(&variant.fields.fields, |member: &Member| {
            quote! {
                |state: &mut Self| match state {
                    Self::#ident { #member: value, .. } => ::core::option::Option::Some(value),
                    #other
                }
            }
        });
        quote! {
            ::pageferry_device_state::Visitor::variant(
                visitor,
                &::pageferry_device_state::Variant {
                    tag: #tag,
                    name: #name,
                    since: #since,
                    is: |state: &Self| match state {
                        Self::#ident { .. } => true,
                        #is_other
                    },
                    make: || #make,
                },
                |visitor| {
                    // Unused where the variant has no fields.
                    let _ = &visitor;
                    #fields
                    ::core::result::Result::Ok(())
                },
            )?;
        }
    });
    quote!(#(#visits)*)
}
