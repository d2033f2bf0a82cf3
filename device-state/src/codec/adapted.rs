//! Types of others.

use std::marker::PhantomData;

use crate::declare::{Codec, Value};
use crate::error::{DecodeError, EncodeError, EncodeProblem, HookError, Problem};
use crate::kind::Kind;
use crate::schema::Shape;
use crate::wire::{Reader, Writer};

/// Stores values of a type that is not yours, `T`, as values of one that can be stored. Named in
/// `#[device_state(with = path)]`.
pub trait Adapter<T> {
    /// What is stored.
    type Stored: Value;

    /// A value to be decoded into.
    fn blank() -> T;

    /// What is stored for a value.
    fn store(value: &T) -> Result<Self::Stored, HookError>;

    /// The value back. What is stored may be anything of its type.
    fn restore(stored: Self::Stored) -> Result<T, HookError>;
}

/// The codec of values with an adapter `A`.
#[derive(Debug)]
pub struct Adapted<A>(PhantomData<A>);

type StoredCodec<T, A> = <<A as Adapter<T>>::Stored as Value>::Codec;

impl<T, A: Adapter<T>> Codec<T> for Adapted<A> {
    const KIND: Kind = <StoredCodec<T, A> as Codec<A::Stored>>::KIND;

    fn shape(max_len: u32) -> Shape {
        StoredCodec::<T, A>::shape(max_len)
    }

    fn blank() -> T {
        A::blank()
    }

    fn encode(value: &mut T, max_len: u32, out: &mut Writer) -> Result<(), EncodeError> {
        let stored = A::store(value);
        let mut stored = stored.map_err(|cause| EncodeError::new(EncodeProblem::Adapter(cause)))?;
        StoredCodec::<T, A>::encode(&mut stored, max_len, out)
    }

    fn decode(value: &mut T, max_len: u32, input: &mut Reader<'_>) -> Result<(), DecodeError> {
        let at = input.offset_bytes();
        let mut stored = StoredCodec::<T, A>::blank();
        StoredCodec::<T, A>::decode(&mut stored, max_len, input)?;
        *value =
            A::restore(stored).map_err(|cause| DecodeError::new(at, Problem::Adapter(cause)))?;
        Ok(())
    }
}
