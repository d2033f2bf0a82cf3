//! Bytes that are summed up on their way.

use std::io::{self, Read, Write};

use xxhash_rust::xxh3::Xxh3Default;

use super::DIGEST_BYTES;

/// Reads or writes, and knows the digest of all that went through.
pub(super) struct Summed<T> {
    inner: T,
    hasher: Xxh3Default,
}

impl<T> Summed<T> {
    pub(super) fn new(inner: T) -> Self {
        Self { inner, hasher: Xxh3Default::new() }
    }

    /// Of all bytes so far.
    pub(super) fn digest(&self) -> [u8; DIGEST_BYTES] {
        self.hasher.digest128().to_le_bytes()
    }
}

impl<T: Read> Read for Summed<T> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(into)?;
        self.hasher.update(&into[..read]);
        Ok(read)
    }
}

impl<T: Write> Write for Summed<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
