//! What `#[device_state(…)]` may say.
#![expect(clippy::needless_continue, reason = "in what darling derives")]

use darling::ast::{Data, Fields};
use darling::util::{Flag, Override, SpannedValue};
use darling::{FromDeriveInput, FromField, FromMeta, FromVariant};
use proc_macro2::Span;
use syn::spanned::Spanned;
use syn::{Expr, Generics, Ident, Path, Type};

/// On the type.
#[derive(Debug, FromDeriveInput)]
#[darling(attributes(device_state), supports(struct_any, enum_any))]
pub(crate) struct Container {
    pub(crate) ident: Ident,
    pub(crate) generics: Generics,
    pub(crate) data: Data<VariantAttributes, FieldAttributes>,
    pub(crate) name: Option<SpannedValue<String>>,
    pub(crate) version: Option<SpannedValue<u16>>,
    pub(crate) min_version: Option<SpannedValue<u16>>,
    pub(crate) priority: Option<SpannedValue<Expr>>,
    #[darling(multiple)]
    pub(crate) after: Vec<SpannedValue<String>>,
    pub(crate) pre_save: Option<Path>,
    pub(crate) post_load: Option<Path>,
    #[darling(multiple)]
    pub(crate) retired: Vec<SpannedValue<Retired>>,
}

/// `retired(tag = 3, until = 2)`.
#[derive(Debug, FromMeta)]
pub(crate) struct Retired {
    pub(crate) tag: u16,
    pub(crate) until: u16,
}

/// On a field.
#[derive(Debug, FromField)]
#[darling(attributes(device_state))]
pub(crate) struct FieldAttributes {
    pub(crate) ident: Option<Ident>,
    pub(crate) ty: Type,
    pub(crate) tag: Option<SpannedValue<u16>>,
    pub(crate) since: Option<SpannedValue<u16>>,
    pub(crate) default: Option<Override<Expr>>,
    pub(crate) max_len: Option<Expr>,
    pub(crate) skip: Flag,
    pub(crate) with: Option<Path>,
    pub(crate) rename: Option<SpannedValue<String>>,
    pub(crate) subsection: Option<SpannedValue<String>>,
    pub(crate) needed: Option<Expr>,
}

/// On a variant.
#[derive(Debug, FromVariant)]
#[darling(attributes(device_state))]
pub(crate) struct VariantAttributes {
    pub(crate) ident: Ident,
    pub(crate) fields: Fields<FieldAttributes>,
    pub(crate) tag: Option<SpannedValue<u16>>,
    pub(crate) since: Option<SpannedValue<u16>>,
    pub(crate) rename: Option<SpannedValue<String>>,
}

impl Container {
    pub(crate) fn version(&self) -> u16 {
        self.version.as_ref().map_or(1, |version| **version)
    }

    pub(crate) fn min_version(&self) -> u16 {
        self.min_version.as_ref().map_or(1, |version| **version)
    }
}

impl FieldAttributes {
    /// Where the field is, for errors.
    pub(crate) fn span(&self) -> Span {
        self.ident.as_ref().map_or_else(|| self.ty.span(), Ident::span)
    }

    /// What it is called in the schema.
    pub(crate) fn name(&self, position: usize) -> String {
        match (&self.rename, &self.ident) {
            (Some(name), _) => name.as_ref().clone(),
            // Not with the r# of a raw one.
            (None, Some(ident)) => ident.to_string().trim_start_matches("r#").to_owned(),
            (None, None) => position.to_string(),
        }
    }

    pub(crate) fn since(&self) -> u16 {
        self.since.as_ref().map_or(1, |since| **since)
    }

    pub(crate) fn is_skipped(&self) -> bool {
        self.skip.is_present()
    }
}

impl VariantAttributes {
    pub(crate) fn name(&self) -> String {
        match &self.rename {
            Some(name) => name.as_ref().clone(),
            None => self.ident.to_string().trim_start_matches("r#").to_owned(),
        }
    }

    pub(crate) fn since(&self) -> u16 {
        self.since.as_ref().map_or(1, |since| **since)
    }
}
