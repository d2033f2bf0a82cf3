//! Which codec a field has.

use proc_macro2::{Span, TokenStream};
use quote::{quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{GenericArgument, Path, PathArguments, Type};

/// Where a part of the declaration stands, for errors; its names are this macro's own also where
/// that part came out of another macro.
pub(crate) fn at(part: &impl Spanned) -> Span {
    Span::call_site().located_at(part.span())
}

/// The codec of a field of that type. An adapter is for what is inside `Option`, `Vec`, arrays and
/// boxed slices.
pub(crate) fn codec(ty: &Type, with: Option<&Path>) -> TokenStream {
    let Some(adapter) = with else {
        // Spanned, so that a type that is no value is complained about where it stands.
        return quote_spanned!(at(ty)=> <#ty as ::pageferry_device_state::Value>::Codec);
    };
    let inner = |element: &Type| codec(element, with);
    match ty {
        Type::Array(array) => {
            let element = inner(&array.elem);
            quote!(::pageferry_device_state::codec::List<#element>)
        }
        Type::Group(group) => codec(&group.elem, with),
        Type::Paren(paren) => codec(&paren.elem, with),
        _ => match container(ty) {
            Some(("Option", element)) => {
                let element = inner(element);
                quote!(::pageferry_device_state::codec::Maybe<#element>)
            }
            Some(("Vec", element)) => {
                let element = inner(element);
                quote!(::pageferry_device_state::codec::List<#element>)
            }
            Some(("Box", Type::Slice(slice))) => {
                let element = inner(&slice.elem);
                quote!(::pageferry_device_state::codec::List<#element>)
            }
            _ => quote_spanned! {at(adapter)=>
                ::pageferry_device_state::codec::Adapted<#adapter>
            },
        },
    }
}

/// Whether a value of the type may be of any length.
pub(crate) fn is_unbounded(ty: &Type) -> bool {
    match ty {
        Type::Array(array) => is_unbounded(&array.elem),
        Type::Group(group) => is_unbounded(&group.elem),
        Type::Paren(paren) => is_unbounded(&paren.elem),
        Type::Slice(_) => true,
        Type::Path(path) => path.path.segments.last().is_some_and(|last| {
            last.ident == "Vec"
                || last.ident == "String"
                || arguments(&last.arguments).any(is_unbounded)
        }),
        _ => false,
    }
}

/// `Name<Element>` by its syntax; the macro knows no more of a type.
fn container(ty: &Type) -> Option<(&'static str, &Type)> {
    let Type::Path(path) = ty else { return None };
    let last = path.path.segments.last()?;
    let name = ["Option", "Vec", "Box"].into_iter().find(|name| last.ident == name)?;
    Some((name, arguments(&last.arguments).next()?))
}

fn arguments(arguments: &PathArguments) -> impl Iterator<Item = &Type> {
    let given = match arguments {
        PathArguments::AngleBracketed(given) => Some(&given.args),
        _ => None,
    };
    given.into_iter().flatten().filter_map(|argument| match argument {
        GenericArgument::Type(ty) => Some(ty),
        _ => None,
    })
}
