//! How values become bytes and come back. A [`Value`](crate::Value) names its codec; only adapters
//! and values of a new kind need this module by name.

mod adapted;
mod container;
mod impls;
mod scalar;
mod shared;
mod text;

pub use adapted::{Adapted, Adapter};
pub use container::{List, Maybe};
pub use scalar::{Scalar, ScalarValue};
pub use shared::{Atomic, AtomicValue, Locked, LockedValue, Shared, SharedCodec};
pub use text::Text;

pub use crate::composite::Composite;

use crate::error::{DecodeError, EncodeError};
use crate::schema::Shape;
use crate::wire::{Kind, Reader, Writer};

/// Stores values of type `T`.
///
/// What [`encode`](Self::encode) writes, [`decode`](Self::decode) reads to its last byte; the
/// length is stored around it. Decoding is total: any bytes give a value or an error, and take
/// memory in proportion to their number.
pub trait Codec<T> {
    /// The kind of the bytes.
    const KIND: Kind;

    /// The type, for schemas. `max_len` is the field's bound.
    fn shape(max_len: u32) -> Shape;

    /// A value to be decoded into.
    fn blank() -> T;

    /// Appends the value. Mutably, since hooks may bring it up to date first.
    fn encode(value: &mut T, max_len: u32, out: &mut Writer) -> Result<(), EncodeError>;

    /// Reads the value. After an error it may be a mix of old and new.
    fn decode(value: &mut T, max_len: u32, input: &mut Reader<'_>) -> Result<(), DecodeError>;

    /// Makes the value another one, in place: who shares it sees the new one.
    fn set(value: &mut T, new: T) {
        *value = new;
    }

    /// Appends the elements of a list.
    fn encode_all(values: &mut [T], max_len: u32, out: &mut Writer) -> Result<(), EncodeError> {
        for (index, value) in values.iter_mut().enumerate() {
            out.sized(|out| Self::encode(value, max_len, out))
                .map_err(|error| error.in_element(index))?;
        }
        Ok(())
    }

    /// Reads the elements of a list, as many as there are values.
    fn decode_all(
        values: &mut [T],
        max_len: u32,
        input: &mut Reader<'_>,
    ) -> Result<(), DecodeError> {
        for (index, value) in values.iter_mut().enumerate() {
            let mut element = input.sized().map_err(|error| error.in_element(index))?;
            Self::decode(value, max_len, &mut element)
                .and_then(|()| element.end())
                .map_err(|error| error.in_element(index))?;
        }
        Ok(())
    }
}
