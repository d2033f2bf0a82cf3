//! Guest memory: how it is backed and where it sits in the guest's physical address space.
#![expect(unsafe_code, reason = "madvise on a mapping this module has just made")]

use std::fs::File;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::{fmt, fs, io};

use clap::ValueEnum;
use rustix::fs::MemfdFlags;
use rustix::mm::Advice;
use serde::{Deserialize, Serialize};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap,
};

/// Where RAM stops below 4 GiB, leaving room for the interrupt controllers' MMIO.
const LOW_RAM_END: u64 = 3 << 30;
/// Where RAM goes on above the hole.
const HIGH_RAM_START: u64 = 4 << 30;
/// The pages of [`Backing::Hugetlb`].
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;
const BASE_PAGE_BYTES: u64 = 4096;
/// Bytes for one bit: the engine's pages.
const BITMAP_PAGE_BYTES: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
const HUGE_PAGE_COUNTERS: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// What backs guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Backing {
    /// Private anonymous memory, with transparent huge pages asked for.
    Anonymous,
    /// A memfd mapped shared: others can map the same pages by descriptor and offset.
    Memfd,
    /// A memfd of reserved 2 MiB huge pages.
    Hugetlb,
}

impl Backing {
    /// Memory is a multiple of that.
    pub fn page_bytes(self) -> u64 {
        match self {
            Self::Anonymous | Self::Memfd => BASE_PAGE_BYTES,
            Self::Hugetlb => HUGE_PAGE_BYTES,
        }
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "anonymous",
            Self::Memfd => "memfd",
            Self::Hugetlb => "hugetlb",
        })
    }
}

impl std::str::FromStr for Backing {
    type Err = UnknownBacking;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "anonymous" => Ok(Self::Anonymous),
            "memfd" => Ok(Self::Memfd),
            "hugetlb" => Ok(Self::Hugetlb),
            _ => Err(UnknownBacking(name.to_owned())),
        }
    }
}

/// A name that is no [`Backing`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown memory backing \"{0}\": it is anonymous, memfd or hugetlb")]
pub struct UnknownBacking(String);

/// Why guest memory could not be allocated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// A region is empty, not page-aligned, or does not fit the address space.
    #[error(
        "failed to lay out guest memory: region at {guest_address:#x} of {len_bytes} bytes is \
         empty, unaligned or too long"
    )]
    BadRegion {
        /// Guest physical address of the region.
        guest_address: u64,
        /// Its length.
        len_bytes: u64,
    },
    /// The regions overlap, are unsorted, or there are none.
    #[error("failed to lay out guest memory")]
    Regions(#[from] GuestRegionCollectionError),
    /// Huge pages are 2 MiB, so regions backed by them must be as well.
    #[error(
        "failed to back guest memory with huge pages: region at {guest_address:#x} of \
         {len_bytes} bytes is not a multiple of 2 MiB"
    )]
    NotHugePageMultiple {
        /// Guest physical address of the region.
        guest_address: u64,
        /// Its length.
        len_bytes: u64,
    },
    /// Fewer huge pages are free than the guest needs.
    #[error(
        "failed to back guest memory with huge pages: {needed_pages} pages of 2 MiB are needed \
         and {available_pages} are available; raise /proc/sys/vm/nr_hugepages (now {total_pages}) \
         to at least {}", total_pages + needed_pages.saturating_sub(*available_pages)
    )]
    NotEnoughHugePages {
        /// Huge pages the guest needs.
        needed_pages: u64,
        /// Huge pages neither used nor promised to others.
        available_pages: u64,
        /// Size of the pool now.
        total_pages: u64,
    },
    /// The kernel's huge page counters could not be read.
    #[error("failed to read the number of free huge pages from {path}")]
    HugePageCounters {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The memory file could not be made.
    #[error("failed to create a memory file of {len_bytes} bytes")]
    CreateFile {
        /// Length wanted.
        len_bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// Mapping failed.
    #[error("failed to map {len_bytes} bytes of guest memory")]
    Map {
        /// Length wanted.
        len_bytes: u64,
        /// Why.
        source: MmapRegionError,
    },
}

/// Memory for guests, where `B` notes what is written to it through vm-memory. Clones share it.
#[derive(Debug)]
pub struct Ram<B = ()> {
    memory: Arc<GuestMemoryMmap<B>>,
    backing: Backing,
    len_bytes: u64,
}

/// A guest's memory, with a bitmap if its writes are to be noted there.
pub type GuestRam = Ram<Option<AtomicBitmap>>;

impl<B> Clone for Ram<B> {
    fn clone(&self) -> Self {
        Self { memory: Arc::clone(&self.memory), ..*self }
    }
}

impl Ram {
    /// Maps memory for the regions of (guest physical address, length in bytes), all zero.
    pub fn allocate(regions: &[(u64, u64)], backing: Backing) -> Result<Self, RamError> {
        Self::map(regions, backing, |_| ())
    }

    /// The regions of a PC with that much memory: below 3 GiB, and the rest above 4 GiB.
    pub fn pc_regions(memory_bytes: u64) -> Vec<(u64, u64)> {
        let low_bytes = memory_bytes.min(LOW_RAM_END);
        let mut regions = vec![(0, low_bytes)];
        if memory_bytes > low_bytes {
            regions.push((HIGH_RAM_START, memory_bytes - low_bytes));
        }
        regions
    }
}

impl GuestRam {
    /// As [`Ram::allocate`], with a bitmap or without.
    pub fn for_guest(
        regions: &[(u64, u64)],
        backing: Backing,
        with_bitmap: bool,
    ) -> Result<Self, RamError> {
        Self::map(regions, backing, |len| {
            with_bitmap.then(|| AtomicBitmap::new(len, BITMAP_PAGE_BYTES))
        })
    }
}

impl<B: Bitmap> Ram<B> {
    fn map(
        regions: &[(u64, u64)],
        backing: Backing,
        bitmap: impl Fn(usize) -> B,
    ) -> Result<Self, RamError> {
        let mut total_bytes = 0u64;
        for &(guest_address, len_bytes) in regions {
            let bad = RamError::BadRegion { guest_address, len_bytes };
            let aligned = guest_address.is_multiple_of(BASE_PAGE_BYTES)
                && len_bytes.is_multiple_of(BASE_PAGE_BYTES);
            if len_bytes == 0 || !aligned || guest_address.checked_add(len_bytes).is_none() {
                return Err(bad);
            }
            total_bytes = total_bytes.checked_add(len_bytes).ok_or(bad)?;
            if backing == Backing::Hugetlb && !len_bytes.is_multiple_of(HUGE_PAGE_BYTES) {
                return Err(RamError::NotHugePageMultiple { guest_address, len_bytes });
            }
        }
        let file = match backing {
            Backing::Anonymous => None,
            Backing::Memfd => Some(create_file(total_bytes, MemfdFlags::CLOEXEC)?),
            Backing::Hugetlb => {
                check_huge_pages(total_bytes / HUGE_PAGE_BYTES)?;
                let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
                Some(create_file(total_bytes, flags)?)
            }
        };
        let mut mapped = Vec::with_capacity(regions.len());
        let mut file_offset_bytes = 0;
        for &(guest_address, len_bytes) in regions {
            let file = file.as_ref().map(|f| FileOffset::from_arc(f.clone(), file_offset_bytes));
            mapped.push(map_region(guest_address, len_bytes, file, backing, &bitmap)?);
            file_offset_bytes += len_bytes;
        }
        let memory = Arc::new(GuestMemoryMmap::from_regions(mapped)?);
        Ok(Self { memory, backing, len_bytes: total_bytes })
    }

    /// The mapped memory.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap<B>> {
        &self.memory
    }

    /// Its length, all regions together.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// What backs it.
    pub fn backing(&self) -> Backing {
        self.backing
    }
}

fn create_file(len_bytes: u64, flags: MemfdFlags) -> Result<Arc<File>, RamError> {
    let failed =
        |errno: rustix::io::Errno| RamError::CreateFile { len_bytes, source: errno.into() };
    let fd = rustix::fs::memfd_create(c"pageferry-guest-memory", flags).map_err(failed)?;
    rustix::fs::ftruncate(&fd, len_bytes).map_err(failed)?;
    Ok(Arc::new(File::from(fd)))
}

fn map_region<B: Bitmap>(
    guest_address: u64,
    len_bytes: u64,
    file: Option<FileOffset>,
    backing: Backing,
    bitmap: impl Fn(usize) -> B,
) -> Result<GuestRegionMmap<B>, RamError> {
    let bad = RamError::BadRegion { guest_address, len_bytes };
    let Ok(len) = usize::try_from(len_bytes) else { return Err(bad) };
    // Reserving swap for guest memory would refuse overcommitted guests; hugetlb on the other hand
    // reserves its pages at mmap time, which turns a shortage into an error here, not a SIGBUS.
    let flags = match backing {
        Backing::Anonymous => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        Backing::Memfd => libc::MAP_SHARED | libc::MAP_NORESERVE,
        Backing::Hugetlb => libc::MAP_SHARED,
    };
    let mut builder = MmapRegionBuilder::new_with_bitmap(len, bitmap(len))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags)
        .with_hugetlbfs(backing == Backing::Hugetlb);
    if let Some(file) = file {
        builder = builder.with_file_offset(file);
    }
    let mapping = builder.build().map_err(|source| RamError::Map { len_bytes, source })?;
    if backing == Backing::Anonymous {
        let start = mapping.as_ptr().cast();
        // SAFETY: start and len are those of the mapping made above, which lives on here, and
        // asking for huge pages changes nothing about its contents.
        let advised = unsafe { rustix::mm::madvise(start, len, Advice::LinuxHugepage) };
        if let Err(error) = advised {
            // A kernel without transparent huge pages is slower, not broken.
            tracing::debug!(%error, "transparent huge pages are not available for guest memory");
        }
    }
    GuestRegionMmap::new(mapping, GuestAddress(guest_address)).ok_or(bad)
}

/// Whether so many huge pages are there and not promised to anybody.
pub fn check_huge_pages(needed_pages: u64) -> Result<(), RamError> {
    let free = huge_page_counter("free_hugepages")?;
    let reserved = huge_page_counter("resv_hugepages")?;
    let available_pages = free.saturating_sub(reserved);
    if available_pages < needed_pages {
        let total_pages = huge_page_counter("nr_hugepages")?;
        return Err(RamError::NotEnoughHugePages { needed_pages, available_pages, total_pages });
    }
    Ok(())
}

fn huge_page_counter(name: &str) -> Result<u64, RamError> {
    let path = Path::new(HUGE_PAGE_COUNTERS).join(name);
    let failed = |source| RamError::HugePageCounters { path: path.display().to_string(), source };
    let text = fs::read_to_string(&path).map_err(failed)?;
    text.trim().parse().map_err(|e| failed(io::Error::new(io::ErrorKind::InvalidData, e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pc_regions_leave_the_hole_below_4_gib() {
        assert_eq!(Ram::pc_regions(1 << 20), [(0, 1 << 20)]);
        assert_eq!(Ram::pc_regions(3 << 30), [(0, 3 << 30)]);
        assert_eq!(Ram::pc_regions(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }

    #[test]
    fn bad_regions_are_typed_errors() {
        let bad = |regions: &[(u64, u64)]| Ram::allocate(regions, Backing::Anonymous).unwrap_err();
        assert!(matches!(bad(&[(0, 0)]), RamError::BadRegion { .. }));
        assert!(matches!(bad(&[(1, 4096)]), RamError::BadRegion { .. }));
        assert!(matches!(bad(&[(u64::MAX - 4095, 8192)]), RamError::BadRegion { .. }));
        assert!(matches!(bad(&[]), RamError::Regions(_)));
        assert!(matches!(bad(&[(0, 8192), (4096, 4096)]), RamError::Regions(_)));
    }

    #[test]
    fn hugetlb_wants_multiples_of_2_mib() {
        let error = Ram::allocate(&[(0, 4096)], Backing::Hugetlb).unwrap_err();
        assert!(matches!(error, RamError::NotHugePageMultiple { len_bytes: 4096, .. }));
    }

    #[test]
    fn too_few_huge_pages_names_the_knob() {
        let error = Ram::allocate(&[(0, 1 << 45)], Backing::Hugetlb).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("/proc/sys/vm/nr_hugepages"), "{text}");
        assert!(text.contains(&(1u64 << 24).to_string()), "{text}");
    }

    #[test]
    fn names_round_trip() {
        for backing in [Backing::Anonymous, Backing::Memfd, Backing::Hugetlb] {
            assert_eq!(backing.to_string().parse(), Ok(backing));
        }
        assert!("ramdisk".parse::<Backing>().is_err());
    }
}
