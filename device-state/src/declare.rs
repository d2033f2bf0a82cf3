//! How state is declared: one description of a type, shown to visitors.

use crate::error::{DecodeError, EncodeError, HookError};
use crate::kind::Kind;
use crate::schema::Shape;
use crate::wire::{Reader, Writer};

/// A type that is stored by a codec of its own.
///
/// Integers, `bool`, `String`, `Option`, `Vec`, arrays, boxed slices, atomics, `Mutex`, `RwLock`
/// and `Arc` of the last three are values, and so is what derives [`DeviceState`]. `usize` is
/// none: it is of another length on another machine.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be stored as device state",
    label = "no device state",
    note = "derive `DeviceState` for it, or name an adapter: `with = path`"
)]
pub trait Value: Sized {
    /// How it is stored.
    type Codec: Codec<Self>;
}

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

/// Fields that are stored and loaded together. Derive it.
///
/// The derived [`visit`](Self::visit) shows the declaration to a [`Visitor`]: encoding, decoding
/// and the schema are three of them, so that there is one description of a type and no second one
/// to forget.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not declared as device state",
    note = "derive `DeviceState` for it"
)]
pub trait DeviceState: Value {
    /// What is declared for the whole type.
    const DECLARED: Declared;

    /// A value to be decoded into.
    fn blank() -> Self;

    /// Shows the visitor all fields in the order of their tags, then all subsections in the order
    /// of their names; of an enum, all variants.
    fn visit<V: Visitor<Self>>(visitor: &mut V) -> Result<(), V::Error>;

    /// Called before the value is encoded.
    fn pre_save(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    /// Called after the value was decoded, its subsections included.
    fn post_load(&mut self) -> Result<(), HookError> {
        Ok(())
    }
}

/// State that is a section of its own. Derive it, with a name:
/// `#[device_state(name = "serial")]`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no section",
    note = "give it a name: `#[device_state(name = \"…\")]`"
)]
pub trait Section: DeviceState {
    /// Name of the section.
    const NAME: &'static str;
    /// What is saved and loaded first: the highest.
    const PRIORITY: i32;
    /// Sections that are loaded before this one, where they exist.
    const AFTER: &'static [&'static str];
}

/// What is declared for a whole type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Declared {
    /// [`Kind::Struct`] or [`Kind::Enum`].
    pub kind: Kind,
    /// The version that is written.
    pub version: u16,
    /// The oldest version that is read.
    pub min_version: u16,
    /// Fields that older versions had.
    pub retired: &'static [Retired],
}

/// A field that older versions had: read over in their streams, unknown in others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retired {
    /// Its tag, never used again.
    pub tag: u16,
    /// The last version that had it.
    pub until: u16,
}

/// A field of type `T` in a state of type `S`.
#[derive(Debug)]
pub struct Field<S, T> {
    /// Identifies it in streams of all versions.
    pub tag: u16,
    /// Name in schemas, errors and print-outs. May change.
    pub name: &'static str,
    /// The version that brought it.
    pub since: u16,
    /// Most elements or bytes of each list and text in it.
    pub max_len: u32,
    /// What it is in state of a version that does not have it.
    pub default: Option<fn() -> T>,
    /// Finds it; `None` where the state is of another variant.
    pub get: fn(&mut S) -> Option<&mut T>,
}

/// A part of a state of type `S` that is sent only when it is needed.
#[derive(Debug)]
pub struct Subsection<S, T> {
    /// Identifies it in streams.
    pub name: &'static str,
    /// Whether it is.
    pub needed: fn(&S) -> bool,
    /// What it is when it was not sent.
    pub default: fn() -> T,
    /// Finds it.
    pub get: fn(&mut S) -> &mut T,
}

/// A variant of an enum `S`.
#[derive(Debug)]
pub struct Variant<S> {
    /// Identifies it in streams of all versions.
    pub tag: u16,
    /// Name in schemas, errors and print-outs. May change.
    pub name: &'static str,
    /// The version that brought it.
    pub since: u16,
    /// Whether the state is of it.
    pub is: fn(&S) -> bool,
    /// One to be decoded into.
    pub make: fn() -> S,
}

/// Is shown a declaration. What it does with the state is its own.
pub trait Visitor<S> {
    /// What ends the visit early.
    type Error;

    /// A field, stored by the codec `C`.
    fn field<T, C: Codec<T>>(&mut self, field: &Field<S, T>) -> Result<(), Self::Error>;

    /// A subsection.
    fn subsection<T: DeviceState>(
        &mut self,
        subsection: &Subsection<S, T>,
    ) -> Result<(), Self::Error>;

    /// A variant; `fields` shows its fields.
    fn variant(
        &mut self,
        variant: &Variant<S>,
        fields: impl FnOnce(&mut Self) -> Result<(), Self::Error>,
    ) -> Result<(), Self::Error>
    where
        Self: Sized;
}
