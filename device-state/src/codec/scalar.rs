//! Integers and `bool`.

use crate::declare::{Codec, Value};
use crate::error::{DecodeError, EncodeError, Problem};
use crate::kind::Kind;
use crate::schema::Shape;
use crate::wire::{Reader, Writer};

/// The codec of integers and `bool`: little-endian, as wide as they are.
#[derive(Debug)]
pub struct Scalar;

/// An integer or `bool`.
pub trait ScalarValue: Copy + Default {
    /// Its kind.
    const KIND: Kind;
    /// Its width in bytes.
    const WIDTH_BYTES: usize = size_of::<Self>();

    /// Writes it to as many bytes as it is wide.
    fn write(self, bytes: &mut [u8]);

    /// Reads it from as many bytes; fails with what is wrong.
    fn read(bytes: &[u8]) -> Result<Self, Problem>;

    /// Appends values side by side.
    fn append(values: &[Self], out: &mut Writer) {
        let room = out.room(values.len() * Self::WIDTH_BYTES);
        for (bytes, value) in room.chunks_exact_mut(Self::WIDTH_BYTES).zip(values) {
            value.write(bytes);
        }
    }

    /// Reads values from as many bytes side by side; fails with the first that is wrong.
    fn read_all(values: &mut [Self], bytes: &[u8]) -> Result<(), (usize, Problem)> {
        let each = values.iter_mut().zip(bytes.chunks_exact(Self::WIDTH_BYTES)).enumerate();
        for (index, (value, bytes)) in each {
            *value = Self::read(bytes).map_err(|problem| (index, problem))?;
        }
        Ok(())
    }
}

macro_rules! integers {
    ($($type:ty: $kind:ident $({ $($fast:tt)* })?),+) => {$(
        impl ScalarValue for $type {
            const KIND: Kind = Kind::$kind;

            #[inline]
            fn write(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }

            #[inline]
            fn read(bytes: &[u8]) -> Result<Self, Problem> {
                let mut array = [0; size_of::<Self>()];
                array.copy_from_slice(bytes);
                Ok(Self::from_le_bytes(array))
            }

            $($($fast)*)?
        }

        impl Value for $type {
            type Codec = Scalar;
        }
    )+};
}

integers!(
    u8: U8 {
        // Bytes are what large devices are made of.
        fn append(values: &[Self], out: &mut Writer) {
            out.put(values);
        }

        fn read_all(values: &mut [Self], bytes: &[u8]) -> Result<(), (usize, Problem)> {
            values.copy_from_slice(bytes);
            Ok(())
        }
    },
    u16: U16, u32: U32, u64: U64, u128: U128,
    i8: I8, i16: I16, i32: I32, i64: I64, i128: I128
);

impl ScalarValue for bool {
    const KIND: Kind = Kind::Bool;

    fn write(self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&[u8::from(self)]);
    }

    fn read(bytes: &[u8]) -> Result<Self, Problem> {
        match bytes {
            [0] => Ok(false),
            [1] => Ok(true),
            other => Err(Problem::Bool { found: other.first().copied().unwrap_or_default() }),
        }
    }
}

impl Value for bool {
    type Codec = Scalar;
}

impl<T: ScalarValue> Codec<T> for Scalar {
    const KIND: Kind = T::KIND;

    fn shape(_: u32) -> Shape {
        Shape::of_scalar(T::KIND)
    }

    fn blank() -> T {
        T::default()
    }

    fn encode(value: &mut T, _: u32, out: &mut Writer) -> Result<(), EncodeError> {
        value.write(out.room(T::WIDTH_BYTES));
        Ok(())
    }

    fn decode(value: &mut T, _: u32, input: &mut Reader<'_>) -> Result<(), DecodeError> {
        let (found, expected) = (input.left() as u64, T::WIDTH_BYTES as u64);
        if found != expected {
            return Err(input.error(Problem::Length { found, expected }));
        }
        let at = input.offset_bytes();
        *value = T::read(input.take_rest()).map_err(|problem| DecodeError::new(at, problem))?;
        Ok(())
    }

    fn encode_all(values: &mut [T], _: u32, out: &mut Writer) -> Result<(), EncodeError> {
        T::append(values, out);
        Ok(())
    }

    fn decode_all(values: &mut [T], _: u32, input: &mut Reader<'_>) -> Result<(), DecodeError> {
        let at = input.offset_bytes();
        let bytes = input.take(values.len() * T::WIDTH_BYTES)?;
        T::read_all(values, bytes).map_err(|(index, problem)| {
            let at = at + (index * T::WIDTH_BYTES) as u64;
            DecodeError::new(at, problem).in_element(index)
        })
    }
}
