//! How values become bytes and come back. A [`Value`](crate::Value) names its codec; only adapters
//! and values of a new kind need this module by name.

mod adapted;
mod composite;
mod container;
mod impls;
mod scalar;
mod shared;
mod text;

pub use adapted::{Adapted, Adapter};
pub use composite::Composite;
pub use container::{List, Maybe};
pub use scalar::{Scalar, ScalarValue};
pub use shared::{Atomic, AtomicValue, Locked, LockedValue, Shared, SharedCodec};
pub use text::Text;

pub use crate::declare::Codec;

pub(crate) use composite::{decode_body, encode_body, struct_schema};
