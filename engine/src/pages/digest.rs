//! A digest of all guest memory, independent of how its pages travelled, and of greetings.
//!
//! That of memory is for tests and for the careful: the source takes it when the guest is paused at the end, the
//! destination before it resumes. It reads every page, so the guest stands still for longer.

use std::fmt;

use xxhash_rust::xxh3::Xxh3Default;

use crate::pages::memory::{GuestMemory, OutOfRange, PageRange};

/// 128 bits of XXH3: of all pages in the order of the layout, or of a greeting.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Digest(pub [u8; 16]);

impl Digest {
    /// Reads all guest memory. Nobody may write to it meanwhile.
    ///
    /// Zero pages are left out, and all others hashed with their place.
    pub fn of(memory: &GuestMemory) -> Result<Self, OutOfRange> {
        let mut hasher = Xxh3Default::new();
        let mut bytes = Vec::new();
        for region in memory.region_indices() {
            let end = memory.layout().regions()[usize::from(region)].pages();
            let mut from = 0;
            while let Some(data) = memory.next_data(region, from, end) {
                from = data.end;
                for first_page in data {
                    if memory.is_zero(region, first_page)? {
                        continue;
                    }
                    memory.copy_out(PageRange { region, first_page, pages: 1 }, &mut bytes)?;
                    hasher.update(&region.to_le_bytes());
                    hasher.update(&first_page.to_le_bytes());
                    hasher.update(&bytes);
                }
            }
        }
        Ok(Self(hasher.digest128().to_le_bytes()))
    }

    /// Of bytes, one part after the other.
    pub(crate) fn of_bytes(parts: &[&[u8]]) -> Self {
        let mut hasher = Xxh3Default::new();
        for part in parts {
            hasher.update(part);
        }
        Self(hasher.digest128().to_le_bytes())
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
