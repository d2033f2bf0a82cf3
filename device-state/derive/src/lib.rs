//! `#[derive(DeviceState)]` of [`pageferry-device-state`], where it is documented and re-exported
//! from.
//!
//! [`pageferry-device-state`]: ../pageferry_device_state/index.html

mod attributes;
mod codec;
mod enums;
mod expand;
mod rules;
mod structs;

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

/// Describes a struct or an enum as device state; see the documentation of
/// `pageferry_device_state`.
#[proc_macro_derive(DeviceState, attributes(device_state))]
pub fn derive_device_state(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    expand::expand(&input).unwrap_or_else(darling::Error::write_errors).into()
}
