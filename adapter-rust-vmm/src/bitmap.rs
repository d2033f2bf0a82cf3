//! Dirty tracking of what the VMM itself writes, by `vm-memory`'s [`AtomicBitmap`].
//!
//! Where guest memory is made with such bitmaps (`GuestMemoryMmap<AtomicBitmap>`, vm-memory's
//! feature `backend-bitmap`), every write through vm-memory's interfaces sets the bits of the
//! pages it wrote, after it wrote them.

use std::ops::Range;
use std::sync::Arc;

use pageferry::dirty::DirtyBitmap;
use pageferry::memory::{GuestMemory, PAGE_BYTES, RawRegion};
use thiserror::Error;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use crate::bits::{merge_at, set_range};
use crate::misuse::MisuseError;
use crate::tracked::{Tracked, Tracker};

/// Why bitmaps of `vm-memory` cannot be a dirty source.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BitmapError {
    /// The engine's memory map is not that of this `vm-memory` object.
    #[error("the engine's memory map and vm-memory's have different regions")]
    OtherMemory,
    /// A region has no bitmap: vm-memory writes to it unseen.
    #[error("the region at guest address {guest_addr:#x} has no bitmap")]
    NoBitmap {
        /// The region's guest physical address.
        guest_addr: u64,
    },
    /// A bitmap was made for fewer bytes than its region has.
    #[error(
        "the bitmap of the region at guest address {guest_addr:#x} is for {bitmap_len_bytes} of \
         its {len_bytes} bytes"
    )]
    Short {
        /// The region's guest physical address.
        guest_addr: u64,
        /// Its length in bytes.
        len_bytes: u64,
        /// Bytes the bitmap was made for.
        bitmap_len_bytes: usize,
    },
    /// A bitmap's pages are not a power of two.
    #[error(
        "the bitmap of the region at guest address {guest_addr:#x}, {bits} bits for {len_bytes} \
         bytes, has pages that are not a power of two"
    )]
    PageSize {
        /// The region's guest physical address.
        guest_addr: u64,
        /// Bits the bitmap has.
        bits: usize,
        /// Bytes it was made for.
        len_bytes: usize,
    },
    /// The source was called against its contract.
    #[error(transparent)]
    Misuse(#[from] MisuseError),
}

/// The bitmap of a region, if it has one.
pub type BitmapOf<R> = fn(&R) -> Option<&AtomicBitmap>;

/// `vm-memory`'s bitmaps: what the VMM's device emulation writes to guest memory.
///
/// Beside it the engine needs a source for vCPUs. Writes that go around vm-memory's interfaces (by
/// a pointer from `get_host_address`, by a device that was given the memory) set no bit unless
/// the VMM calls `mark_dirty`.
///
/// A harvest takes the bits, and that is all the re-arming there is: vm-memory sets a bit after
/// the bytes are written, so a bit that was taken belongs to bytes that will be read, and a write
/// whose bit comes later is in the next harvest. (Between the two a page may be read half
/// written; it is read again.) Devices must stand still when the machine is paused, with no
/// write begun and not yet marked.
///
/// While it tracks, the bits are this source's: another user of the same bitmap (incremental
/// snapshots) does not see what was written meanwhile, and `start` drops what was set before.
///
/// The bitmap's pages may be any power of two.
///
/// # Thread safety
///
/// As [`DirtySource`](pageferry::dirty::DirtySource) asks; devices write while it harvests. A harvest is
/// an atomic exchange of
/// each word of the bitmaps, and allocates a copy of them: vm-memory gives no other access.
///
/// # Resource cleanup
///
/// Nothing but memory is held: vm-memory sets bits whether or not anyone looks. The `vm-memory`
/// object is kept until the value is dropped.
pub type AtomicBitmapSource<M> = Tracked<BitmapTracker<M>>;

/// How [`AtomicBitmapSource`] sees writes.
pub struct BitmapTracker<M: GuestMemoryBackend> {
    memory: Arc<M>,
    bitmap_of: BitmapOf<M::R>,
    /// In the engine's order.
    regions: Vec<Region>,
}

#[derive(Debug)]
struct Region {
    /// Its number in `vm-memory`'s order.
    index: usize,
    pages: u64,
    /// Bytes for one bit.
    bit_bytes: u64,
}

impl<M: GuestMemoryBackend> std::fmt::Debug for BitmapTracker<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BitmapTracker").field("regions", &self.regions).finish_non_exhaustive()
    }
}

impl AtomicBitmapSource<GuestMemoryMmap<AtomicBitmap>> {
    /// Tracks by the bitmaps of mapped memory; `guest` is the engine's view of it.
    pub fn new(
        memory: Arc<GuestMemoryMmap<AtomicBitmap>>,
        guest: &GuestMemory,
    ) -> Result<Self, BitmapError> {
        Self::with_bitmaps(memory, guest, |region: &GuestRegionMmap<AtomicBitmap>| {
            Some((**region).bitmap())
        })
    }
}

impl<M: GuestMemoryBackend + Send + Sync> AtomicBitmapSource<M> {
    /// Tracks by the bitmaps of any region type: a VMM's own, or one whose bitmap is optional.
    ///
    /// One bit of each bitmap is set to find out its page size.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use std::sync::Arc;
    ///
    /// use pageferry_rust_vmm::AtomicBitmapSource;
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
    ///
    /// type Region = GuestRegionMmap<Option<AtomicBitmap>>;
    /// # let bitmap = AtomicBitmap::new(1 << 20, std::num::NonZeroUsize::new(4096).unwrap());
    /// # let region = vm_memory::mmap::MmapRegionBuilder::new_with_bitmap(1 << 20, Some(bitmap))
    /// #     .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
    /// #     .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
    /// #     .build()?;
    /// # let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    /// let memory = Arc::new(GuestMemoryMmap::from_regions(vec![region])?);
    /// let guest = pageferry_rust_vmm::guest_memory(Arc::clone(&memory))?;
    /// let source =
    ///     AtomicBitmapSource::with_bitmaps(memory, &guest, |r: &Region| (**r).bitmap().as_ref())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_bitmaps(
        memory: Arc<M>,
        guest: &GuestMemory,
        bitmap_of: BitmapOf<M::R>,
    ) -> Result<Self, BitmapError> {
        let mut regions = Vec::new();
        for RawRegion { layout, host_addr, .. } in guest.regions() {
            let found = memory.iter().enumerate().find(|(_, region)| {
                region.start_addr().raw_value() == layout.guest_addr
                    && region.len() == layout.len_bytes
                    && region
                        .get_host_address(MemoryRegionAddress(0))
                        .is_ok_and(|addr| addr == *host_addr)
            });
            let (index, region) = found.ok_or(BitmapError::OtherMemory)?;
            let bit_bytes = checked(layout.guest_addr, layout.len_bytes, bitmap_of(region))?;
            regions.push(Region { index, pages: layout.pages(), bit_bytes });
        }
        if memory.iter().count() != regions.len() {
            return Err(BitmapError::OtherMemory);
        }
        Ok(Self::by(BitmapTracker { memory, bitmap_of, regions }, guest.layout()))
    }
}

impl<M: GuestMemoryBackend> BitmapTracker<M> {
    /// The bitmaps by the engine's region, with what is known of them.
    fn bitmaps(&self) -> impl Iterator<Item = (u16, &Region, &AtomicBitmap)> {
        (0..).zip(&self.regions).filter_map(|(index, tracked)| {
            let bitmap = (self.bitmap_of)(self.memory.iter().nth(tracked.index)?)?;
            Some((index, tracked, bitmap))
        })
    }
}

impl<M: GuestMemoryBackend + Send + Sync> Tracker for BitmapTracker<M> {
    const NAME: &'static str = "vmm bitmap";
    const LEFT: &'static str = "bitmaps in use";

    type Error = BitmapError;

    fn start(&self) -> Result<(), BitmapError> {
        // Whose bit is lost here began before `start` returned.
        self.bitmaps().for_each(|(_, _, bitmap)| bitmap.reset());
        Ok(())
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), BitmapError> {
        for (region, tracked, bitmap) in self.bitmaps() {
            tracked.merge(&bitmap.get_and_reset(), into.region_words_mut(region));
        }
        Ok(())
    }

    /// A harvest took the bits.
    fn rearm(&self, _: u16, _: u64, _: &[u64]) -> Result<(), BitmapError> {
        Ok(())
    }

    /// vm-memory sets bits whether or not anyone looks.
    fn stop(&self) -> Result<(), BitmapError> {
        Ok(())
    }
}

impl Region {
    /// Adds the bitmap's words to the engine's.
    fn merge(&self, words: &[u64], into: &mut [u64]) {
        if self.bit_bytes == PAGE_BYTES {
            return merge_at(into, 0, words, self.pages);
        }
        for (index, word) in (0..).zip(words) {
            let mut left = *word;
            while left != 0 {
                let bit = index * u64::from(u64::BITS) + u64::from(left.trailing_zeros());
                left &= left - 1;
                let Range { start, end } = self.pages_of(bit);
                set_range(into, start, end.min(self.pages));
            }
        }
    }

    fn pages_of(&self, bit: u64) -> Range<u64> {
        let start = bit.saturating_mul(self.bit_bytes);
        start / PAGE_BYTES..start.saturating_add(self.bit_bytes).div_ceil(PAGE_BYTES)
    }
}

/// Bytes for one bit, after all else was checked.
fn checked(
    guest_addr: u64,
    len_bytes: u64,
    bitmap: Option<&AtomicBitmap>,
) -> Result<u64, BitmapError> {
    let bitmap = bitmap.ok_or(BitmapError::NoBitmap { guest_addr })?;
    let bitmap_len_bytes = bitmap.byte_size();
    if (bitmap_len_bytes as u64) < len_bytes {
        return Err(BitmapError::Short { guest_addr, len_bytes, bitmap_len_bytes });
    }
    bit_bytes(bitmap).ok_or(BitmapError::PageSize {
        guest_addr,
        bits: bitmap.len(),
        len_bytes: bitmap_len_bytes,
    })
}

/// Bytes for one bit, which must be a power of two: the bitmap does not tell, but for what bytes
/// and with how many bits it was made.
fn bit_bytes(bitmap: &AtomicBitmap) -> Option<u64> {
    let bits = bitmap.len();
    if bits <= 1 {
        // That bit is for all there is.
        return bitmap.byte_size().checked_next_power_of_two().map(|bytes| bytes as u64);
    }
    // Rounded up to whole bits, only one power of two gives this number.
    let guess = bitmap.byte_size().div_ceil(bits).next_power_of_two();
    if bitmap.byte_size().div_ceil(guess) != bits {
        return None;
    }
    // Other sizes may give it too. With the last bit set, that bit's bytes end where the first
    // byte is that has no bit, and with any larger page that byte is still the last bit's.
    bitmap.set_bit(bits - 1);
    let end = guess.checked_mul(bits)?;
    (bitmap.is_addr_set(end - 1) && !bitmap.is_addr_set(end)).then_some(guess as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry::dirty::DirtySource;
    use std::num::NonZeroUsize;

    #[test]
    fn the_page_size_is_found() {
        for page_bytes in [128, 512, 4096, 16384, 2 << 20] {
            for len_bytes in [1, 4096, 40_960, 40_961, 5 << 20, (5 << 20) + 4096] {
                let bitmap = AtomicBitmap::new(len_bytes, NonZeroUsize::new(page_bytes).unwrap());
                let found = bit_bytes(&bitmap).expect("a power of two");
                let all_in_one = page_bytes >= len_bytes && found >= len_bytes as u64;
                assert!(found == page_bytes as u64 || all_in_one, "{page_bytes} {len_bytes}");
            }
        }
    }

    #[test]
    fn odd_page_sizes_are_refused() {
        for page_bytes in [5000, 4097, 8191, 12_288, 3 << 20] {
            for len_bytes in [8 << 20, (8 << 20) + 1, 9 << 20] {
                let bitmap = AtomicBitmap::new(len_bytes, NonZeroUsize::new(page_bytes).unwrap());
                assert_eq!(bit_bytes(&bitmap), None, "{page_bytes} {len_bytes}");
            }
        }
        // Two bits either way.
        let bitmap = AtomicBitmap::new(8192, NonZeroUsize::new(5000).unwrap());
        assert_eq!(bit_bytes(&bitmap), None);
    }

    #[test]
    fn bits_become_pages() {
        let tracked = |bit_bytes, pages| Region { index: 0, pages, bit_bytes };
        let merged = |tracked: Region, words: &[u64]| {
            let mut into = [0; 2];
            tracked.merge(words, &mut into);
            into
        };
        assert_eq!(merged(tracked(4096, 70), &[1 << 63 | 1, u64::MAX]), [1 << 63 | 1, 0x3f]);
        assert_eq!(merged(tracked(16384, 70), &[0b11 << 16]), [0, 0x3f]);
        assert_eq!(merged(tracked(1024, 70), &[0b1_0011]), [0b11, 0]);
    }

    #[test]
    fn a_foreign_bitmap_takes_no_bits() {
        let memory: GuestMemoryMmap<AtomicBitmap> =
            GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 1 << 20)]).unwrap();
        let memory = Arc::new(memory);
        let guest = crate::guest_memory(Arc::clone(&memory)).unwrap();
        let source = AtomicBitmapSource::new(Arc::clone(&memory), &guest).unwrap();
        source.start().unwrap();
        let layout = pageferry::memory::Layout::new(vec![pageferry::memory::RegionLayout {
            len_bytes: 2 << 20,
            ..guest.layout().regions()[0]
        }]);
        let bitmap = (**memory.iter().next().unwrap()).bitmap();
        bitmap.set_bit(7);
        source.harvest(&mut DirtyBitmap::new(&layout.unwrap())).unwrap_err();
        assert!(bitmap.is_bit_set(7));
    }
}
