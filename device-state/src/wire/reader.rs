//! Taking off a stream. Every length is checked before it is believed.

use super::{SUBSECTION_TAG, check_name};
use crate::error::{DecodeError, Problem};
use crate::kind::Kind;

/// Bytes that are decoded, and where in the stream they are.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    rest: &'a [u8],
    offset_bytes: u64,
    /// Whether `post_load` is called: not while a stream is only tried.
    hooks: bool,
}

/// Header of a field.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FieldHeader {
    pub(crate) tag: u16,
    pub(crate) kind: u8,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, offset_bytes: 0, hooks: true }
    }

    /// The same bytes, without hooks.
    pub(crate) fn without_hooks(&self) -> Self {
        Self { hooks: false, ..self.clone() }
    }

    pub(crate) fn has_hooks(&self) -> bool {
        self.hooks
    }

    /// Bytes that are left.
    #[inline]
    pub fn left(&self) -> usize {
        self.rest.len()
    }

    #[inline]
    pub(crate) fn offset_bytes(&self) -> u64 {
        self.offset_bytes
    }

    pub(crate) fn error(&self, problem: Problem) -> DecodeError {
        DecodeError::new(self.offset_bytes, problem)
    }

    /// Takes so many bytes.
    #[inline]
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let Some((head, rest)) = self.rest.split_at_checked(len) else {
            let (needed, left) = (len as u64, self.rest.len() as u64);
            return Err(self.error(Problem::Truncated { needed, left }));
        };
        self.rest = rest;
        self.offset_bytes += len as u64;
        Ok(head)
    }

    /// Takes all that is left.
    pub(crate) fn take_rest(&mut self) -> &'a [u8] {
        let rest = std::mem::take(&mut self.rest);
        self.offset_bytes += rest.len() as u64;
        rest
    }

    #[inline]
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    #[inline]
    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array::<1>().map(|[byte]| byte)
    }

    #[inline]
    pub(crate) fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_le_bytes)
    }

    #[inline]
    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Takes bytes that must be zero.
    pub(crate) fn reserved<const N: usize>(&mut self) -> Result<(), DecodeError> {
        let at = self.offset_bytes;
        let found =
            self.array::<N>()?.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        if found == 0 { Ok(()) } else { Err(DecodeError::new(at, Problem::Reserved { found })) }
    }

    /// The next so many bytes, to be read apart from what follows.
    #[inline]
    pub(crate) fn part(&mut self, len: usize) -> Result<Self, DecodeError> {
        let (offset_bytes, hooks) = (self.offset_bytes, self.hooks);
        Ok(Self { rest: self.take(len)?, offset_bytes, hooks })
    }

    /// A length, and a reader of as many bytes behind it.
    #[inline]
    pub(crate) fn sized(&mut self) -> Result<Self, DecodeError> {
        let len = self.u32()?;
        // What does not fit a usize is more than there is.
        self.part(usize::try_from(len).unwrap_or(usize::MAX))
    }

    /// Everything must have been taken.
    #[inline]
    pub(crate) fn end(&self) -> Result<(), DecodeError> {
        match self.rest.len() as u64 {
            0 => Ok(()),
            extra => Err(self.error(Problem::Trailing { extra })),
        }
    }

    /// The tag of the next field without taking it; `None` at the end and before a subsection.
    #[inline]
    pub(crate) fn peek_tag(&self) -> Result<Option<u16>, DecodeError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let tag = self.clone().u16()?;
        Ok((tag != SUBSECTION_TAG).then_some(tag))
    }

    /// A field's header, and a reader of its payload.
    #[inline]
    pub(crate) fn field(&mut self) -> Result<(FieldHeader, Self), DecodeError> {
        let (tag, kind) = (self.u16()?, self.u8()?);
        self.reserved::<1>()?;
        Ok((FieldHeader { tag, kind }, self.sized()?))
    }

    /// The next subsection's name, and a reader of its version and body.
    pub(crate) fn subsection(&mut self) -> Result<(&'a str, Self), DecodeError> {
        let at = self.offset_bytes;
        let (header, mut payload) = self.field()?;
        if header.tag != SUBSECTION_TAG {
            return Err(DecodeError::new(at, Problem::Order));
        }
        expect_kind(Kind::Subsection, header.kind, at)?;
        let len = payload.u8()?;
        let name = payload.take(len.into())?;
        Ok((check_name(name, at)?, payload))
    }
}

/// The kind must be the one declared.
#[inline]
pub(crate) fn expect_kind(expected: Kind, found: u8, at: u64) -> Result<(), DecodeError> {
    if found == expected as u8 {
        return Ok(());
    }
    Err(DecodeError::new(at, Problem::Kind { found, expected }))
}
