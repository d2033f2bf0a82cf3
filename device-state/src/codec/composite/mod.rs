//! Structs and enums: three visitors of their declarations.

mod decode;
mod encode;
mod shape;

use crate::declare::{Codec, DeviceState};
use crate::error::{DecodeError, EncodeError};
use crate::kind::Kind;
use crate::schema::Shape;
use crate::wire::{Reader, Writer};

pub(crate) use decode::decode_body;
pub(crate) use encode::encode_body;
pub(crate) use shape::struct_schema;

/// The codec of what derives [`DeviceState`].
#[derive(Debug)]
pub struct Composite;

impl<S: DeviceState> Codec<S> for Composite {
    const KIND: Kind = S::DECLARED.kind;

    fn shape(_: u32) -> Shape {
        shape::shape::<S>()
    }

    fn blank() -> S {
        S::blank()
    }

    fn encode(state: &mut S, _: u32, out: &mut Writer) -> Result<(), EncodeError> {
        out.u16(S::DECLARED.version);
        encode_body(state, out)
    }

    fn decode(state: &mut S, _: u32, input: &mut Reader<'_>) -> Result<(), DecodeError> {
        let at = input.offset_bytes();
        let version = input.u16()?;
        decode_body(state, version, at, input)
    }
}
