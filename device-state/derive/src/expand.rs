//! From the declaration to its implementations.

use darling::ast::Data;
use darling::{Error, FromDeriveInput};
use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::{DeriveInput, Path};

use crate::attributes::Container;
use crate::codec::at;
use crate::{enums, rules, structs};

pub(crate) fn expand(input: &DeriveInput) -> Result<TokenStream, Error> {
    let container = Container::from_derive_input(input)?;
    rules::check(&container)?;
    let ident = &container.ident;
    let (version, min_version) = (container.version(), container.min_version());
    let (kind, blank, visit) = match &container.data {
        Data::Struct(fields) => {
            let fields = &fields.fields;
            (quote!(Struct), structs::blank(fields), structs::visit(fields))
        }
        Data::Enum(variants) => (quote!(Enum), enums::blank(variants), enums::visit(variants)),
    };
    let retired = container.retired.iter().map(|retired| {
        let (tag, until) = (retired.tag, retired.until);
        quote!(::pageferry_device_state::Retired { tag: #tag, until: #until })
    });
    let pre_save = hook("pre_save", container.pre_save.as_ref());
    let post_load = hook("post_load", container.post_load.as_ref());
    let section = section(&container);
    Ok(quote! {
        #[automatically_derived]
        impl ::pageferry_device_state::DeviceState for #ident {
            const DECLARED: ::pageferry_device_state::Declared =
                ::pageferry_device_state::Declared {
                    kind: ::pageferry_device_state::Kind::#kind,
                    version: #version,
                    min_version: #min_version,
                    retired: &[#(#retired),*],
                };

            fn blank() -> Self {
                #blank
            }

            fn visit<V: ::pageferry_device_state::Visitor<Self>>(
                visitor: &mut V,
            ) -> ::core::result::Result<(), V::Error> {
                #visit
                ::core::result::Result::Ok(())
            }

            #pre_save
            #post_load
        }

        #[automatically_derived]
        impl ::pageferry_device_state::Value for #ident {
            type Codec = ::pageferry_device_state::codec::Composite;
        }

        #section
    })
}

fn hook(name: &str, path: Option<&Path>) -> Option<TokenStream> {
    let path = path?;
    let name = quote::format_ident!("{name}");
    // Spanned, so that a hook of another type is complained about where it is named.
    Some(quote_spanned! {at(path)=>
        fn #name(
            &mut self,
        ) -> ::core::result::Result<(), ::pageferry_device_state::HookError> {
            ::core::result::Result::map_err(#path(self), ::core::convert::Into::into)
        }
    })
}

fn section(container: &Container) -> Option<TokenStream> {
    let name = container.name.as_ref()?.as_str();
    let ident = &container.ident;
    let priority = container.priority.as_ref().map_or_else(
        || quote!(0),
        |p| {
            let priority = p.as_ref();
            quote!(#priority)
        },
    );
    let after = container.after.iter().map(|name| name.as_str());
    Some(quote! {
        #[automatically_derived]
        impl ::pageferry_device_state::Section for #ident {
            const NAME: &'static str = #name;
            const PRIORITY: i32 = #priority;
            const AFTER: &'static [&'static str] = &[#(#after),*];
        }
    })
}
