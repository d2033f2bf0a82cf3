//! Guest memory as the engine sees it: regions of pages at host addresses.
//!
//! The engine never forms a `&[u8]` over guest memory. vCPUs and devices write to it while we
//! look, so a shared slice would be undefined behaviour. What leaves this module is raw
//! addresses for the kernel or a NIC ([`HostSpan`]), and the few loads and stores the engine
//! itself needs (zero check, zero fill, digest), all volatile.
#![expect(unsafe_code, reason = "guest memory is reached through raw host pointers")]

mod backing;
mod layout;
mod zero;

use std::any::Any;
use std::fmt;
use std::io;
use std::ops::Range;

pub use backing::FileBacking;
pub use layout::{
    Layout, LayoutError, MAX_REGION_PAGES, MAX_REGIONS, OutOfRange, PAGE_BYTES, PageRange,
    RegionLayout,
};

/// One region for [`GuestMemory::from_raw_parts`].
#[derive(Debug, Clone, Copy)]
pub struct RawRegion {
    /// Where the guest sees it, and how long it is.
    pub layout: RegionLayout,
    /// Where this process has it mapped; page-aligned.
    pub host_addr: *mut u8,
    /// The file behind it, if any.
    pub file: Option<FileBacking>,
}

/// Bytes of guest memory at a host address, for a kernel call or a work request.
///
/// Valid as long as the [`GuestMemory`] it came from. Others write to it concurrently: hand it
/// to the kernel or a NIC, never make a reference of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostSpan {
    /// First byte.
    pub addr: *mut u8,
    /// Length in bytes.
    pub len_bytes: usize,
}

/// The guest memory of one VM, mapped in this process.
///
/// # Thread safety
///
/// `Send` and `Sync`. All access is by raw pointer and volatile; callers order their accesses
/// by who owns which page (see the partition of the bitmap).
///
/// # Resource cleanup
///
/// Owns no mapping. The owner given at construction is dropped with the last clone of the `Arc`
/// around this value; the engine drops its clones before a migration returns.
pub struct GuestMemory {
    layout: Layout,
    regions: Vec<RawRegion>,
    _owner: Option<Box<dyn Any + Send + Sync>>,
}

// SAFETY: the pointers are plain addresses of mappings that any thread may use; from_raw_parts
// makes its caller promise that they stay valid for the value's lifetime.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; shared access is volatile or by the kernel, never through references.
unsafe impl Sync for GuestMemory {}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemory").field("regions", &self.regions).finish_non_exhaustive()
    }
}

impl GuestMemory {
    /// Describes guest memory by raw parts.
    ///
    /// `owner` is kept until the value is dropped; give the mapping's owner here if the value
    /// should keep the mapping alive, `None` if something else does.
    ///
    /// # Safety
    ///
    /// For each region, until the value is dropped:
    /// - `host_addr..host_addr + len_bytes` is one mapping, readable and writable, that is not
    ///   unmapped, moved, shrunk or made inaccessible, and no file behind it is truncated;
    /// - the program holds no Rust reference into it: everyone reaches it by raw pointers, the
    ///   way vm-memory does, for the engine may write to any page of it at a destination;
    /// - regions do not overlap in host memory;
    /// - `file`, if given, describes the same bytes.
    pub unsafe fn from_raw_parts(
        regions: Vec<RawRegion>,
        owner: Option<Box<dyn Any + Send + Sync>>,
    ) -> Result<Self, LayoutError> {
        let layout = Layout::new(regions.iter().map(|region| region.layout).collect())?;
        for (index, region) in regions.iter().enumerate() {
            let host_addr = region.host_addr.addr();
            if host_addr == 0 || !(host_addr as u64).is_multiple_of(PAGE_BYTES) {
                return Err(LayoutError::BadHostAddress { index, host_addr });
            }
        }
        Ok(Self { layout, regions, _owner: owner })
    }

    /// The memory map.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The regions with their host addresses, in the layout's order.
    pub fn regions(&self) -> &[RawRegion] {
        &self.regions
    }

    /// The host bytes of a page range.
    pub fn span(&self, range: PageRange) -> Result<HostSpan, OutOfRange> {
        let region = self.regions.get(usize::from(range.region)).ok_or(OutOfRange { range })?;
        let end = range.first_page.checked_add(u64::from(range.pages));
        if end.is_none_or(|end| end > region.layout.pages()) {
            return Err(OutOfRange { range });
        }
        let offset_bytes = usize::try_from(range.first_page * PAGE_BYTES);
        let len_bytes = usize::try_from(range.len_bytes());
        let (Ok(offset_bytes), Ok(len_bytes)) = (offset_bytes, len_bytes) else {
            return Err(OutOfRange { range });
        };
        // SAFETY: checked above to be inside the region, which is one mapping.
        let addr = unsafe { region.host_addr.add(offset_bytes) };
        Ok(HostSpan { addr, len_bytes })
    }

    /// Whether a page holds only zero bytes. The guest may write meanwhile; a page written after
    /// its re-arm comes back with the next harvest, so either answer is right.
    pub fn is_zero(&self, region: u16, page: u64) -> Result<bool, OutOfRange> {
        let span = self.span(PageRange { region, first_page: page, pages: 1 })?;
        // SAFETY: a whole page inside a readable mapping.
        Ok(unsafe { zero::is_zero(span.addr, span.len_bytes) })
    }

    /// How many pages from `first_page` on, at most `most`, are like it: all zero, or all not.
    /// Returns also whether they are zero. As for [`is_zero`](Self::is_zero), either answer is
    /// right for a page that the guest writes to meanwhile.
    pub(crate) fn alike(
        &self,
        region: u16,
        first_page: u64,
        most: u64,
    ) -> Result<(u64, bool), OutOfRange> {
        let pages = u32::try_from(most).unwrap_or(u32::MAX);
        let range = PageRange { region, first_page, pages };
        let span = self.span(range)?;
        if span.len_bytes == 0 {
            return Err(OutOfRange { range });
        }
        // SAFETY: whole pages inside a readable mapping, at least one.
        let (pages, zero) = unsafe { zero::alike(span.addr, span.len_bytes) };
        Ok((pages as u64, zero))
    }

    /// The next run of pages that may hold something, at or after `from_page` and before `before_page`,
    /// where it ends at the latest. Pages outside were never written when this was asked: they are
    /// zero, and reading them would allocate memory for nothing. Costs by the number of pages that are
    /// asked about, however far a run goes on.
    ///
    /// Known for regions with a file behind them (memfd), by `SEEK_DATA` (lseek(2)) and mincore(2), and of hugetlbfs
    /// by mincore(2) and by reading what is not mapped here. Elsewhere all pages may hold something, and on hosts
    /// whose own pages are not of [`PAGE_BYTES`].
    pub fn next_data(&self, region: u16, from_page: u64, before_page: u64) -> Option<Range<u64>> {
        let RawRegion { layout, host_addr, file } = self.regions.get(usize::from(region))?;
        let pages = from_page..before_page.min(layout.pages());
        if pages.is_empty() {
            return None;
        }
        match file.as_ref().filter(|_| has_host_pages()) {
            // SAFETY: all of the region is one mapping, of this file.
            Some(file) if layout.backing_page_bytes > PAGE_BYTES => unsafe {
                file.next_data_in_huge_pages(*host_addr, layout.backing_page_bytes, pages)
            },
            // SAFETY: likewise.
            Some(file) => unsafe { file.next_data(*host_addr, pages) },
            None => Some(pages),
        }
    }

    /// The runs of pages that may hold something, by [`next_data`](Self::next_data). Once there
    /// are `most`, the last one reaches to the end of its region, and regions after it are whole, as are those in
    /// huge pages.
    pub(crate) fn data_ranges(&self, most: usize) -> Vec<PageRange> {
        let mut ranges: Vec<PageRange> = Vec::new();
        for (region, layout) in (0..).zip(self.layout.regions()) {
            let mut page = 0;
            // To look for holes of huge pages may take long.
            let whole = layout.backing_page_bytes > PAGE_BYTES;
            let next = |page| {
                if whole {
                    return Some(page..layout.pages()).filter(|pages| !pages.is_empty());
                }
                self.next_data(region, page, layout.pages())
            };
            while let Some(data) = next(page) {
                let end = if ranges.len() + 1 < most { data.end } else { layout.pages() };
                // A run may be longer than a range can say.
                let most_pages = data.start.saturating_add(u64::from(u32::MAX));
                let end = end.min(most_pages);
                let pages = u32::try_from(end - data.start).unwrap_or(u32::MAX);
                ranges.push(PageRange { region, first_page: data.start, pages });
                page = end;
            }
        }
        ranges
    }

    /// Has the kernel allocate pages for writing (`MADV_POPULATE_WRITE`). Their contents stay.
    #[cfg(target_os = "linux")]
    pub(crate) fn populate(&self, range: PageRange) -> io::Result<()> {
        use rustix::mm::{Advice, madvise};

        if !has_host_pages() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this host's pages are not of 4096 bytes",
            ));
        }
        let span = self.span(range).map_err(io::Error::other)?;
        // SAFETY: inside a mapping that the guest may write to; this advice changes no contents
        // and unmaps nothing.
        unsafe { madvise(span.addr.cast(), span.len_bytes, Advice::LinuxPopulateWrite)? };
        Ok(())
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn populate(&self, _range: PageRange) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this is not Linux"))
    }

    /// Fills pages with zero bytes.
    pub fn fill_zero(&self, range: PageRange) -> Result<(), OutOfRange> {
        let span = self.span(range)?;
        // SAFETY: the span is inside a writable mapping, and no reference to it exists.
        unsafe { std::ptr::write_bytes(span.addr, 0, span.len_bytes) };
        Ok(())
    }

    /// Fills pages with zero bytes, 2 MiB at a time, and asks before each piece whether to go on: who
    /// does it for a peer has to notice an interrupt meanwhile. The first error ends it.
    pub fn fill_zero_while<E: From<OutOfRange>>(
        &self,
        range: PageRange,
        mut go_on: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        const PIECE_PAGES: u32 = 512;
        self.span(range)?;
        let mut rest = range;
        while rest.pages > 0 {
            go_on()?;
            let pages = rest.pages.min(PIECE_PAGES);
            self.fill_zero(PageRange { pages, ..rest })?;
            rest.first_page += u64::from(pages);
            rest.pages -= pages;
        }
        Ok(())
    }

    /// Copies pages out of guest memory. What `into` held before is replaced, where
    /// [`Machine::save`](crate::Machine::save) appends. A user-space copy of page bytes: nothing on the raw
    /// path may call it.
    pub fn copy_out(&self, range: PageRange, into: &mut Vec<u8>) -> Result<(), OutOfRange> {
        let span = self.span(range)?;
        into.resize(span.len_bytes, 0);
        let (chunks, _) = into.as_chunks_mut::<{ size_of::<u64>() }>();
        words(span).zip(chunks).for_each(|(word, chunk)| *chunk = word.to_ne_bytes());
        Ok(())
    }

    /// Copies bytes into guest memory; `bytes` must be as long as the range. A user-space copy
    /// of page bytes: nothing on the raw path may call it.
    pub fn copy_in(&self, range: PageRange, bytes: &[u8]) -> Result<(), OutOfRange> {
        let span = self.span(range)?;
        if bytes.len() != span.len_bytes {
            return Err(OutOfRange { range });
        }
        // SAFETY: source and destination are both `len_bytes` long; a Rust slice cannot overlap
        // guest memory, to which no reference exists.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), span.addr, span.len_bytes) };
        Ok(())
    }

    /// Indices of the regions.
    pub(crate) fn region_indices(&self) -> Range<u16> {
        // MAX_REGIONS fits.
        0..u16::try_from(self.regions.len()).unwrap_or(u16::MAX)
    }
}

/// Whether this host's own pages are of [`PAGE_BYTES`]: the kernel is asked about whole pages only.
fn has_host_pages() -> bool {
    rustix::param::page_size() as u64 == PAGE_BYTES
}

/// Volatile loads of a span, word by word.
fn words(span: HostSpan) -> impl Iterator<Item = u64> {
    (0..span.len_bytes / size_of::<u64>()).map(move |index| {
        // SAFETY: inside the span; spans are whole pages.
        let word = unsafe { span.addr.add(index * size_of::<u64>()) };
        #[expect(clippy::cast_ptr_alignment, reason = "spans start at page boundaries")]
        let word = word.cast::<u64>();
        // SAFETY: readable and aligned. Volatile because the guest may be writing it.
        unsafe { word.read_volatile() }
    })
}
