//! Which containers are values.

use super::{List, Maybe};
use crate::declare::Value;

impl<T: Value> Value for Option<T> {
    type Codec = Maybe<T::Codec>;
}

impl<T: Value> Value for Vec<T> {
    type Codec = List<T::Codec>;
}

impl<T: Value> Value for Box<[T]> {
    type Codec = List<T::Codec>;
}

impl<T: Value, const N: usize> Value for [T; N] {
    type Codec = List<T::Codec>;
}
