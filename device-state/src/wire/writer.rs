//! Appending to a stream. Little-endian.
//!
//! Codecs are compiled where types are declared, in other crates: what they call for each field is
//! marked to be inlined there.

use super::SUBSECTION_TAG;
use crate::error::{EncodeError, EncodeProblem};
use crate::kind::Kind;

/// Takes the bytes of state that is encoded.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// After the bytes that are there already.
    pub(crate) fn after(bytes: Vec<u8>) -> Self {
        Self { bytes }
    }

    /// What was written.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Appends bytes as they are.
    #[inline]
    pub fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    #[inline]
    pub(crate) fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    #[inline]
    pub(crate) fn u16(&mut self, value: u16) {
        self.put(&value.to_le_bytes());
    }

    #[inline]
    pub(crate) fn u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    /// Room for that many bytes, to be filled in.
    #[inline]
    pub(crate) fn room(&mut self, bytes: usize) -> &mut [u8] {
        let begin = self.bytes.len();
        self.bytes.resize(begin + bytes, 0);
        &mut self.bytes[begin..]
    }

    /// A field: header, and what `payload` writes.
    pub(crate) fn field(
        &mut self,
        tag: u16,
        kind: Kind,
        payload: impl FnOnce(&mut Self) -> Result<(), EncodeError>,
    ) -> Result<(), EncodeError> {
        let [low, high] = tag.to_le_bytes();
        self.put(&[low, high, kind as u8, 0]);
        self.sized(payload)
    }

    /// A subsection: header, name, version, and what `body` writes.
    pub(crate) fn subsection(
        &mut self,
        name: &str,
        version: u16,
        body: impl FnOnce(&mut Self) -> Result<(), EncodeError>,
    ) -> Result<(), EncodeError> {
        self.field(SUBSECTION_TAG, Kind::Subsection, |out| {
            // The macro checks that names are short.
            out.u8(u8::try_from(name.len()).unwrap_or(u8::MAX));
            out.put(name.as_bytes());
            out.u16(version);
            body(out)
        })
    }

    /// What `payload` writes, behind its length.
    pub(crate) fn sized(
        &mut self,
        payload: impl FnOnce(&mut Self) -> Result<(), EncodeError>,
    ) -> Result<(), EncodeError> {
        let at = self.bytes.len();
        self.u32(0);
        let begin = self.bytes.len();
        payload(self)?;
        let bytes = self.bytes.len() - begin;
        let Ok(len) = u32::try_from(bytes) else {
            return Err(EncodeError::new(EncodeProblem::TooLarge { bytes }));
        };
        self.bytes[at..begin].copy_from_slice(&len.to_le_bytes());
        Ok(())
    }
}
