//! The guest's memory map, and ranges of pages in it.

use std::fmt;
use std::ops::Range;

use thiserror::Error;

/// Bytes in one page, the unit of dirty tracking and of transfer. Larger pages of the backing
/// are a property of a region ([`RegionLayout::backing_page_bytes`]).
pub const PAGE_BYTES: u64 = 4096;

/// Most regions a layout may have; bounds what a peer can make us allocate.
pub const MAX_REGIONS: usize = 1024;

/// Most pages one region may have: 64 TiB, so that byte lengths stay far from overflow.
pub const MAX_REGION_PAGES: u64 = 1 << 34;

/// A region as both sides must agree on it: where the guest sees it and how long it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionLayout {
    /// Guest physical address of the first byte; a multiple of [`PAGE_BYTES`].
    pub guest_addr: u64,
    /// Length in bytes; a multiple of [`PAGE_BYTES`], not zero.
    pub len_bytes: u64,
    /// Size in bytes of the pages that back the region on this host (4096 for ordinary ones).
    /// The sides may differ in it.
    pub backing_page_bytes: u64,
}

impl RegionLayout {
    /// Number of [`PAGE_BYTES`] pages.
    pub fn pages(&self) -> u64 {
        self.len_bytes / PAGE_BYTES
    }
}

/// The guest's memory map: regions sorted by guest address, none overlapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    regions: Vec<RegionLayout>,
}

/// Why a description of guest memory was refused.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutError {
    /// No region at all.
    #[error("guest memory has no region")]
    Empty,
    /// More than [`MAX_REGIONS`].
    #[error("guest memory has {count} regions, at most {MAX_REGIONS} are supported")]
    TooManyRegions {
        /// How many there were.
        count: usize,
    },
    /// Address or length is not made of whole pages, or the length is zero or too large.
    #[error(
        "region {index} at {guest_addr:#x}, {len_bytes} bytes, is not a sensible run of whole pages"
    )]
    BadRegion {
        /// Index of the region.
        index: usize,
        /// Its guest physical address.
        guest_addr: u64,
        /// Its length in bytes.
        len_bytes: u64,
    },
    /// Regions overlap or are not sorted by guest address.
    #[error("region {index} at {guest_addr:#x} overlaps the one before it or is out of order")]
    Overlap {
        /// Index of the later region.
        index: usize,
        /// Its guest physical address.
        guest_addr: u64,
    },
    /// The host address is null or not page-aligned.
    #[error("region {index} has host address {host_addr:#x}, which is null or not page-aligned")]
    BadHostAddress {
        /// Index of the region.
        index: usize,
        /// The host address given.
        host_addr: usize,
    },
}

impl Layout {
    /// Checks and takes a memory map.
    pub fn new(regions: Vec<RegionLayout>) -> Result<Self, LayoutError> {
        if regions.is_empty() {
            return Err(LayoutError::Empty);
        }
        if regions.len() > MAX_REGIONS {
            return Err(LayoutError::TooManyRegions { count: regions.len() });
        }
        let mut end_of_previous = 0;
        for (index, region) in regions.iter().enumerate() {
            let RegionLayout { guest_addr, len_bytes, backing_page_bytes } = *region;
            let end = guest_addr.checked_add(len_bytes);
            let well_formed = guest_addr.is_multiple_of(PAGE_BYTES)
                && len_bytes.is_multiple_of(PAGE_BYTES)
                && len_bytes > 0
                && region.pages() <= MAX_REGION_PAGES
                && backing_page_bytes >= PAGE_BYTES
                && backing_page_bytes.is_power_of_two();
            let Some(end) = end.filter(|_| well_formed) else {
                return Err(LayoutError::BadRegion { index, guest_addr, len_bytes });
            };
            if guest_addr < end_of_previous {
                return Err(LayoutError::Overlap { index, guest_addr });
            }
            end_of_previous = end;
        }
        Ok(Self { regions })
    }

    /// The regions, sorted by guest address.
    pub fn regions(&self) -> &[RegionLayout] {
        &self.regions
    }

    /// All guest memory, in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.len_bytes).sum()
    }

    /// All guest memory, in pages.
    pub fn pages(&self) -> u64 {
        self.len_bytes() / PAGE_BYTES
    }

    /// Whether a guest sees the same memory in both: addresses and lengths, not backing.
    pub fn same_guest_view(&self, other: &Self) -> bool {
        self.regions.len() == other.regions.len()
            && self.regions.iter().zip(&other.regions).all(|(mine, theirs)| {
                mine.guest_addr == theirs.guest_addr && mine.len_bytes == theirs.len_bytes
            })
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, region) in self.regions.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            let end = region.guest_addr + region.len_bytes;
            write!(f, "{separator}{:#x}..{end:#x}", region.guest_addr)?;
        }
        Ok(())
    }
}

/// Pages of one region that lie one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRange {
    /// Index of the region in the layout.
    pub region: u16,
    /// First page, counted from the start of the region.
    pub first_page: u64,
    /// Number of pages.
    pub pages: u32,
}

impl PageRange {
    /// Those that a run of pages of a region is: one, unless it is longer than a range can say.
    pub fn of_run(region: u16, run: Range<u64>) -> impl Iterator<Item = Self> {
        let mut first_page = run.start;
        std::iter::from_fn(move || {
            let left = run.end.checked_sub(first_page).filter(|left| *left > 0)?;
            let pages = u32::try_from(left).unwrap_or(u32::MAX);
            let range = Self { region, first_page, pages };
            first_page += u64::from(pages);
            Some(range)
        })
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> u64 {
        u64::from(self.pages) * PAGE_BYTES
    }
}

/// A page range is not inside guest memory.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[error(
    "pages {first_page}..+{pages} of region {region} are not inside guest memory",
    region = range.region, first_page = range.first_page, pages = range.pages
)]
pub struct OutOfRange {
    /// The offending range.
    pub range: PageRange,
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_as_few_ranges_as_can_say_it() {
        let of_run = |run| PageRange::of_run(3, run).collect::<Vec<_>>();
        let range = |first_page, pages| PageRange { region: 3, first_page, pages };
        assert_eq!(of_run(7..9), [range(7, 2)]);
        assert_eq!(of_run(7..7), []);
        let most = u64::from(u32::MAX);
        assert_eq!(of_run(5..5 + most + 2), [range(5, u32::MAX), range(5 + most, 2)]);
    }
}
