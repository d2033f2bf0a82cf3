//! Another process's writes, by the soft-dirty bits of its page tables.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use pageferry::dirty::DirtyBitmap;
use pageferry::memory::{GuestMemory, PAGE_BYTES};
use thiserror::Error;

use super::entries::{Entries, SOFT_DIRTY};
use super::error::ForeignError;
use super::process::ForeignProcess;
use super::standstill::{Pulsed, Standstill};
use crate::addresses::Mapped;
use crate::misuse::MisuseError;
use crate::tracked::{Tracked, Tracker};

/// What is written to `clear_refs` to clear soft-dirty bits.
const CLEAR: &[u8] = b"4";

/// Why soft-dirty bits do not tell what was written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SoftDirtyError {
    /// The kernel has no such bits.
    #[error(
        "this kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY; those of Debian and others have them on \
         x86-64)"
    )]
    Unsupported,
    /// Whether it has could not be found out.
    #[error("failed to try soft-dirty bits on this process")]
    Try(#[source] io::Error),
    /// Huge pages have none.
    #[error(
        "the region at guest address {guest_addr:#x} is in huge pages of hugetlbfs, which have no soft-dirty bits"
    )]
    HugePages {
        /// The region's guest physical address.
        guest_addr: u64,
    },
    /// The bits could not be read or cleared.
    #[error("failed to {operation}")]
    PageMap {
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// The process, or its memory, is not what it has to be.
    #[error(transparent)]
    Foreign(#[from] ForeignError),
    /// The source was called against its contract.
    #[error(transparent)]
    Misuse(#[from] MisuseError),
}

/// Tracks every write to guest memory through the page tables of another process, on kernels that have
/// soft-dirty bits and not what [`ForeignPagemapScan`](super::ForeignPagemapScan) needs
/// (Documentation/admin-guide/mm/soft-dirty.rst of the kernel).
///
/// The kernel reads bits and clears them in two steps, and clears all of a process: what is written in between
/// would be lost. So the other process has to [stand still](Standstill) for each harvest, and for the start.
///
/// The kernel forgets bits of shared memory that it reclaims or gathers into huge pages. So guest memory must
/// not be swapped (`mlock`, or no swap), nor be on a tmpfs with `huge=`. Nobody else may clear the bits of the
/// process meanwhile (CRIU does).
///
/// # Thread safety
///
/// As [`DirtySource`](pageferry::dirty::DirtySource) asks. Re-arming takes no lock and no system call.
pub type SoftDirty = Pulsed<Tracked<SoftDirtyTracker>>;

/// How [`SoftDirty`] sees writes.
#[derive(Debug)]
pub struct SoftDirtyTracker {
    process: ForeignProcess,
    mapped: Vec<Mapped>,
    bits: Mutex<Bits>,
}

impl SoftDirty {
    /// Prepares to track what `process` writes to `memory`, whose regions are shared mappings of files that it
    /// has mapped too.
    pub fn new(
        process: ForeignProcess,
        memory: &GuestMemory,
        standstill: Arc<dyn Standstill>,
    ) -> Result<Self, SoftDirtyError> {
        Self::supported()?;
        if let Some(huge) =
            memory.layout().regions().iter().find(|region| region.backing_page_bytes != PAGE_BYTES)
        {
            return Err(SoftDirtyError::HugePages { guest_addr: huge.guest_addr });
        }
        let mapped = process.mapped(memory)?;
        let clear_refs = File::options()
            .write(true)
            .open(process.proc_path("clear_refs"))
            .map_err(|cause| process.not_permitted_or(cause, "open clear_refs"))?;
        let bits = Mutex::new(Bits::new(process.pagemap()?, clear_refs));
        let tracker = SoftDirtyTracker { process, mapped, bits };
        Ok(Self::by(Tracked::by(tracker, memory.layout()), standstill))
    }

    /// Whether this kernel has soft-dirty bits, tried on this process.
    pub fn supported() -> Result<(), SoftDirtyError> {
        let mut bits = File::open("/proc/self/pagemap")
            .and_then(|pagemap| {
                let clear_refs = File::options().write(true).open("/proc/self/clear_refs")?;
                Ok(Bits::new(pagemap, clear_refs))
            })
            .map_err(SoftDirtyError::Try)?;
        if bits.tell_writes().map_err(SoftDirtyError::Try)? {
            Ok(())
        } else {
            Err(SoftDirtyError::Unsupported)
        }
    }
}

impl Tracker for SoftDirtyTracker {
    const NAME: &'static str = "soft-dirty bits";
    const LEFT: &'static str = "nothing behind";

    type Error = SoftDirtyError;

    fn start(&self) -> Result<(), SoftDirtyError> {
        // What was written before does not count.
        let bits = self.bits.lock().unwrap_or_else(PoisonError::into_inner);
        bits.clear()?;
        Ok(self.process.check_alive()?)
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), SoftDirtyError> {
        let mut bits = self.bits.lock().unwrap_or_else(PoisonError::into_inner);
        let read = self.mapped.iter().try_for_each(|mapped| bits.read(mapped, into));
        // Only once all is known: what was read and not cleared is read again.
        let harvested = read.and_then(|()| bits.clear());
        // An empty address space has no written pages either.
        self.process.check_alive()?;
        harvested
    }

    /// A harvest has cleared the bits already.
    fn rearm(&self, _: u16, _: u64, _: &[u64]) -> Result<(), SoftDirtyError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), SoftDirtyError> {
        Ok(())
    }
}

/// The soft-dirty bits of a process.
#[derive(Debug)]
struct Bits {
    entries: Entries,
    clear_refs: File,
}

impl Bits {
    fn new(pagemap: File, clear_refs: File) -> Self {
        Self { entries: Entries::of(pagemap), clear_refs }
    }

    /// Clears all bits of the process.
    fn clear(&self) -> Result<(), SoftDirtyError> {
        let cleared = self.clear_refs.write_all_at(CLEAR, 0);
        cleared
            .map_err(|cause| SoftDirtyError::PageMap { operation: "clear soft-dirty bits", cause })
    }

    /// Adds the pages that were written.
    fn read(&mut self, mapped: &Mapped, into: &mut DirtyBitmap) -> Result<(), SoftDirtyError> {
        let failed = |cause| SoftDirtyError::PageMap { operation: "read soft-dirty bits", cause };
        self.entries.with(SOFT_DIRTY, mapped, into).map_err(failed)
    }

    /// Whether a write of this process, whose bits they are, is told, and no write is not.
    fn tell_writes(&mut self) -> io::Result<bool> {
        let page_bytes = usize::try_from(PAGE_BYTES).unwrap_or(usize::MAX);
        let mut pages = vec![1_u8; 2 * page_bytes];
        let whole = pages.as_ptr().addr().next_multiple_of(page_bytes) - pages.as_ptr().addr();
        let address = (pages.as_ptr().addr() + whole) as u64;
        let is_dirty =
            |bits: &Self| Ok::<_, io::Error>(bits.entries.at(address)? & SOFT_DIRTY != 0);
        self.clear_refs.write_all_at(CLEAR, 0)?;
        let before = is_dirty(self)?;
        pages[whole] = std::hint::black_box(2);
        std::hint::black_box(&mut pages);
        Ok(!before && is_dirty(self)?)
    }
}
