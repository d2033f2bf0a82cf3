//! A digest of all guest memory, independent of how its pages travelled.
//!
//! For tests and for the careful: the source takes it when the guest is paused at the end, the
//! destination before it resumes. It reads every page, so the guest stands still for longer.

use std::fmt;

use xxhash_rust::xxh3::Xxh3Default;

use crate::memory::{GuestMemory, OutOfRange};

/// Pages read at once: small enough to stay in the L2 cache between copy and hash.
const CHUNK_PAGES: u32 = 16;

/// 128 bits of XXH3 over all pages in the order of the layout.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest(pub [u8; 16]);

impl Digest {
    /// Reads all guest memory. Nobody may write to it meanwhile.
    ///
    /// Zero pages are hashed by number only, so that untouched memory is cheap.
    pub fn of(memory: &GuestMemory) -> Result<Self, OutOfRange> {
        let mut hasher = Xxh3Default::new();
        let mut bytes = Vec::new();
        for region in memory.region_indices() {
            for chunk in memory.chunks(region, CHUNK_PAGES) {
                memory.copy_out(chunk, &mut bytes)?;
                if bytes.iter().any(|byte| *byte != 0) {
                    hasher.update(&region.to_le_bytes());
                    hasher.update(&chunk.first_page.to_le_bytes());
                    hasher.update(&bytes);
                }
            }
        }
        Ok(Self(hasher.digest128().to_le_bytes()))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}
