//! What may be shared: atomics, locks, and `Arc` of them. Loading goes through to the value, so
//! that everybody who shares it sees what was loaded.

use std::marker::PhantomData;
use std::sync::atomic::{
    AtomicBool, AtomicI8, AtomicI16, AtomicI32, AtomicI64, AtomicU8, AtomicU16, AtomicU32,
    AtomicU64, Ordering,
};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::{Scalar, ScalarValue};
use crate::declare::{Codec, Value};
use crate::error::{DecodeError, EncodeError};
use crate::kind::Kind;
use crate::schema::Shape;
use crate::wire::{Reader, Writer};

/// The codec of `Mutex` and `RwLock`, for values that have the codec `C`. A lock that is poisoned
/// is taken all the same: what matters is what it holds.
#[derive(Debug)]
pub struct Locked<C>(PhantomData<C>);

/// The codec of atomics: as what they hold. Loads and stores are sequentially consistent.
#[derive(Debug)]
pub struct Atomic;

/// The codec of `Arc` of a value that has the codec `C`.
#[derive(Debug)]
pub struct Shared<C>(PhantomData<C>);

/// Stores values of type `T` that others may have as well.
pub trait SharedCodec<T>: Codec<T> {
    /// As [`Codec::encode`].
    fn encode_shared(value: &T, max_len: u32, out: &mut Writer) -> Result<(), EncodeError>;

    /// As [`Codec::decode`].
    fn decode_shared(value: &T, max_len: u32, input: &mut Reader<'_>) -> Result<(), DecodeError>;

    /// As [`Codec::set`].
    fn set_shared(value: &T, new: T);
}

/// A lock around a value.
pub trait LockedValue {
    /// What it holds.
    type Inner;

    /// A lock around it.
    fn new(inner: Self::Inner) -> Self;

    /// What it held.
    fn into_inner(self) -> Self::Inner;

    /// Takes the lock, and does something with what it holds.
    fn with<R>(&self, f: impl FnOnce(&mut Self::Inner) -> R) -> R;
}

impl<T> LockedValue for Mutex<T> {
    type Inner = T;

    fn new(inner: T) -> Self {
        Self::new(inner)
    }

    fn into_inner(self) -> T {
        self.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        f(&mut self.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<T> LockedValue for RwLock<T> {
    type Inner = T;

    fn new(inner: T) -> Self {
        Self::new(inner)
    }

    fn into_inner(self) -> T {
        self.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        f(&mut self.write().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<L: LockedValue, C: Codec<L::Inner>> Codec<L> for Locked<C> {
    const KIND: Kind = C::KIND;

    fn shape(max_len: u32) -> Shape {
        C::shape(max_len)
    }

    fn blank() -> L {
        L::new(C::blank())
    }

    fn encode(value: &mut L, max_len: u32, out: &mut Writer) -> Result<(), EncodeError> {
        Self::encode_shared(value, max_len, out)
    }

    fn decode(value: &mut L, max_len: u32, input: &mut Reader<'_>) -> Result<(), DecodeError> {
        Self::decode_shared(value, max_len, input)
    }

    fn set(value: &mut L, new: L) {
        Self::set_shared(value, new);
    }
}

impl<L: LockedValue, C: Codec<L::Inner>> SharedCodec<L> for Locked<C> {
    fn encode_shared(value: &L, max_len: u32, out: &mut Writer) -> Result<(), EncodeError> {
        value.with(|inner| C::encode(inner, max_len, out))
    }

    fn decode_shared(value: &L, max_len: u32, input: &mut Reader<'_>) -> Result<(), DecodeError> {
        value.with(|inner| C::decode(inner, max_len, input))
    }

    fn set_shared(value: &L, new: L) {
        value.with(|inner| C::set(inner, new.into_inner()));
    }
}

impl<T: Value> Value for Mutex<T> {
    type Codec = Locked<T::Codec>;
}

impl<T: Value> Value for RwLock<T> {
    type Codec = Locked<T::Codec>;
}

/// An atomic integer or `bool`.
pub trait AtomicValue {
    /// What it holds.
    type Inner: ScalarValue;

    /// One that holds it.
    fn new(inner: Self::Inner) -> Self;

    /// What it holds now.
    fn get(&self) -> Self::Inner;

    /// Has it hold something else.
    fn put(&self, inner: Self::Inner);
}

macro_rules! atomics {
    ($($atomic:ty: $inner:ty),+) => {$(
        impl AtomicValue for $atomic {
            type Inner = $inner;

            fn new(inner: $inner) -> Self {
                Self::new(inner)
            }

            fn get(&self) -> $inner {
                self.load(Ordering::SeqCst)
            }

            fn put(&self, inner: $inner) {
                self.store(inner, Ordering::SeqCst);
            }
        }

        impl Value for $atomic {
            type Codec = Atomic;
        }
    )+};
}

atomics!(
    AtomicBool: bool,
    AtomicU8: u8, AtomicU16: u16, AtomicU32: u32, AtomicU64: u64,
    AtomicI8: i8, AtomicI16: i16, AtomicI32: i32, AtomicI64: i64
);

impl<A: AtomicValue> Codec<A> for Atomic {
    const KIND: Kind = <A::Inner as ScalarValue>::KIND;

    fn shape(_: u32) -> Shape {
        Shape::of_scalar(<A::Inner as ScalarValue>::KIND)
    }

    fn blank() -> A {
        A::new(A::Inner::default())
    }

    fn encode(value: &mut A, max_len: u32, out: &mut Writer) -> Result<(), EncodeError> {
        Self::encode_shared(value, max_len, out)
    }

    fn decode(value: &mut A, max_len: u32, input: &mut Reader<'_>) -> Result<(), DecodeError> {
        Self::decode_shared(value, max_len, input)
    }

    // As scalars have it: side by side, without lengths.
    fn encode_all(values: &mut [A], max_len: u32, out: &mut Writer) -> Result<(), EncodeError> {
        let mut inner: Vec<_> = values.iter().map(A::get).collect();
        Scalar::encode_all(&mut inner, max_len, out)
    }

    fn decode_all(
        values: &mut [A],
        max_len: u32,
        input: &mut Reader<'_>,
    ) -> Result<(), DecodeError> {
        let mut inner = vec![A::Inner::default(); values.len()];
        Scalar::decode_all(&mut inner, max_len, input)?;
        for (value, inner) in values.iter().zip(inner) {
            value.put(inner);
        }
        Ok(())
    }
}

impl<A: AtomicValue> SharedCodec<A> for Atomic {
    fn encode_shared(value: &A, max_len: u32, out: &mut Writer) -> Result<(), EncodeError> {
        Scalar::encode(&mut value.get(), max_len, out)
    }

    fn decode_shared(value: &A, max_len: u32, input: &mut Reader<'_>) -> Result<(), DecodeError> {
        let mut inner = A::Inner::default();
        Scalar::decode(&mut inner, max_len, input)?;
        value.put(inner);
        Ok(())
    }

    fn set_shared(value: &A, new: A) {
        value.put(new.get());
    }
}

impl<T, C: SharedCodec<T>> Codec<Arc<T>> for Shared<C> {
    const KIND: Kind = C::KIND;

    fn shape(max_len: u32) -> Shape {
        C::shape(max_len)
    }

    fn blank() -> Arc<T> {
        Arc::new(C::blank())
    }

    fn encode(value: &mut Arc<T>, max_len: u32, out: &mut Writer) -> Result<(), EncodeError> {
        C::encode_shared(value, max_len, out)
    }

    fn decode(value: &mut Arc<T>, max_len: u32, input: &mut Reader<'_>) -> Result<(), DecodeError> {
        C::decode_shared(value, max_len, input)
    }

    fn set(value: &mut Arc<T>, new: Arc<T>) {
        match Arc::try_unwrap(new) {
            Ok(new) => C::set_shared(value, new),
            // A default that others have too is what is wanted.
            Err(shared) => *value = shared,
        }
    }
}

impl<T: Value> Value for Arc<T>
where
    T::Codec: SharedCodec<T>,
{
    type Codec = Shared<T::Codec>;
}
