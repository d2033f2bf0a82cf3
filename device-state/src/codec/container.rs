//! Lists and options.

use crate::declare::Codec;
use crate::error::{DecodeError, EncodeError, EncodeProblem, Problem};
use crate::kind::Kind;
use crate::schema::{Length, Shape};
use crate::wire::{Reader, Writer, expect_kind};

/// The codec of `Vec`, arrays and boxed slices, for elements that have the codec `C`.
#[derive(Debug)]
pub struct List<C>(std::marker::PhantomData<C>);

/// The codec of `Option`, for values that have the codec `C`.
#[derive(Debug)]
pub struct Maybe<C>(std::marker::PhantomData<C>);

/// Bytes of an element on the wire, at least.
fn element_bytes(kind: Kind) -> usize {
    // Elements of different lengths have theirs before them.
    kind.width_bytes().unwrap_or(4)
}

fn encode_list<T, C: Codec<T>>(
    values: &mut [T],
    max_len: u32,
    out: &mut Writer,
) -> Result<(), EncodeError> {
    let bytes = values.len();
    let Ok(count) = u32::try_from(values.len()) else {
        return Err(EncodeError::new(EncodeProblem::TooLarge { bytes }));
    };
    out.u8(C::KIND as u8);
    out.put(&[0; 3]);
    out.u32(count);
    C::encode_all(values, max_len, out)
}

/// Number of elements that follow; there are bytes for so many.
fn list_header<T, C: Codec<T>>(input: &mut Reader<'_>) -> Result<usize, DecodeError> {
    let at = input.offset_bytes();
    expect_kind(C::KIND, input.u8()?, at)?;
    input.reserved::<3>()?;
    let count = input.u32()?;
    let needed = u64::from(count) * element_bytes(C::KIND) as u64;
    let left = input.left() as u64;
    if needed > left {
        return Err(input.error(Problem::Truncated { needed, left }));
    }
    // It is not more than there are bytes in memory.
    Ok(usize::try_from(count).unwrap_or(usize::MAX))
}

fn check_len(found: usize, max_len: u32) -> Result<(), EncodeError> {
    if found <= max_len as usize {
        return Ok(());
    }
    Err(EncodeError::new(EncodeProblem::TooLong { found, max: max_len }))
}

impl<T, C: Codec<T>> Codec<Vec<T>> for List<C> {
    const KIND: Kind = Kind::List;

    fn shape(max_len: u32) -> Shape {
        Shape::List { element: Box::new(C::shape(max_len)), len: Length::AtMost(max_len) }
    }

    fn blank() -> Vec<T> {
        Vec::new()
    }

    fn encode(values: &mut Vec<T>, max_len: u32, out: &mut Writer) -> Result<(), EncodeError> {
        check_len(values.len(), max_len)?;
        encode_list::<T, C>(values, max_len, out)
    }

    fn decode(
        values: &mut Vec<T>,
        max_len: u32,
        input: &mut Reader<'_>,
    ) -> Result<(), DecodeError> {
        let at = input.offset_bytes();
        let count = list_header::<T, C>(input)?;
        if count > max_len as usize {
            let (found, max) = (count as u64, u64::from(max_len));
            return Err(DecodeError::new(at, Problem::TooLong { found, max }));
        }
        // What is decoded in place keeps what was skipped: each element begins as it would anew.
        values.clear();
        values.resize_with(count, C::blank);
        C::decode_all(values, max_len, input)
    }
}

impl<T, C: Codec<T>> Codec<Box<[T]>> for List<C> {
    const KIND: Kind = Kind::List;

    fn shape(max_len: u32) -> Shape {
        <Self as Codec<Vec<T>>>::shape(max_len)
    }

    fn blank() -> Box<[T]> {
        Box::default()
    }

    fn encode(values: &mut Box<[T]>, max_len: u32, out: &mut Writer) -> Result<(), EncodeError> {
        check_len(values.len(), max_len)?;
        encode_list::<T, C>(values, max_len, out)
    }

    fn decode(
        values: &mut Box<[T]>,
        max_len: u32,
        input: &mut Reader<'_>,
    ) -> Result<(), DecodeError> {
        let mut new = std::mem::take(values).into_vec();
        <Self as Codec<Vec<T>>>::decode(&mut new, max_len, input)?;
        *values = new.into_boxed_slice();
        Ok(())
    }
}

impl<T, const N: usize, C: Codec<T>> Codec<[T; N]> for List<C> {
    const KIND: Kind = Kind::List;

    fn shape(max_len: u32) -> Shape {
        let len = u32::try_from(N).unwrap_or(u32::MAX);
        Shape::List { element: Box::new(C::shape(max_len)), len: Length::Exactly(len) }
    }

    fn blank() -> [T; N] {
        std::array::from_fn(|_| C::blank())
    }

    fn encode(values: &mut [T; N], max_len: u32, out: &mut Writer) -> Result<(), EncodeError> {
        encode_list::<T, C>(values, max_len, out)
    }

    fn decode(
        values: &mut [T; N],
        max_len: u32,
        input: &mut Reader<'_>,
    ) -> Result<(), DecodeError> {
        let at = input.offset_bytes();
        let count = list_header::<T, C>(input)?;
        if count != N {
            let (found, expected) = (count as u64, N as u64);
            return Err(DecodeError::new(at, Problem::Length { found, expected }));
        }
        C::decode_all(values, max_len, input)
    }
}

impl<T, C: Codec<T>> Codec<Option<T>> for Maybe<C> {
    const KIND: Kind = Kind::Option;

    fn shape(max_len: u32) -> Shape {
        Shape::Option(Box::new(C::shape(max_len)))
    }

    fn blank() -> Option<T> {
        None
    }

    fn encode(value: &mut Option<T>, max_len: u32, out: &mut Writer) -> Result<(), EncodeError> {
        let Some(value) = value else { return Ok(()) };
        out.u8(C::KIND as u8);
        C::encode(value, max_len, out)
    }

    fn decode(
        value: &mut Option<T>,
        max_len: u32,
        input: &mut Reader<'_>,
    ) -> Result<(), DecodeError> {
        if input.left() == 0 {
            *value = None;
            return Ok(());
        }
        let at = input.offset_bytes();
        expect_kind(C::KIND, input.u8()?, at)?;
        C::decode(value.get_or_insert_with(C::blank), max_len, input)
    }
}
