//! What is behind a region, and where that holds something.

#![expect(
    unsafe_code,
    reason = "asks the kernel about a mapping that is only known by its address"
)]

use std::ops::Range;
use std::os::fd::{BorrowedFd, RawFd};

use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, pread};

use super::layout::PAGE_BYTES;

/// Pages to ask about at a time: few at first, since a run may be short, then more.
const FIRST_PIECE: u64 = 8;
const PIECE: usize = 512;

/// Bytes that are read from a file at a time.
const READ_BYTES: usize = 16 << 10;

/// The file behind a region, where there is one: the region is a shared mapping of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileBacking {
    /// Descriptor of the memfd or file; borrowed, open as long as the region is mapped.
    pub fd: RawFd,
    /// Offset in bytes of the region's first byte in the file.
    pub offset_bytes: u64,
}

impl FileBacking {
    /// The next run of pages among these (counted from the start of the region) that the file holds
    /// something for; the rest is a hole, which reads as zero and is allocated when it is read through a
    /// mapping. All of the rest where nobody can tell. Moves the descriptor's file position.
    ///
    /// `SEEK_HOLE` would tell where the run ends, and walk all of it for that, which at terabytes takes
    /// as long as a dead link. So the run is followed only as far as is asked: what is in memory is data,
    /// and of what is not (it may be swapped out) the file tells.
    ///
    /// # Safety
    ///
    /// `host_addr` is where the region is mapped, from its first page to the last of these.
    pub(crate) unsafe fn next_data(
        &self,
        host_addr: *mut u8,
        pages: Range<u64>,
    ) -> Option<Range<u64>> {
        let begin = self.next_page_of_data(pages.start)?;
        let mut page = begin;
        while page < pages.end {
            // SAFETY: pages of the mapping, says the caller.
            page = unsafe { end_of_resident(host_addr, page..pages.end) };
            if page < pages.end {
                if self.next_page_of_data(page) != Some(page) {
                    break;
                }
                page += 1;
            }
        }
        Some(begin..page.min(pages.end)).filter(|run| !run.is_empty())
    }

    /// As [`next_data`](Self::next_data), where the file is in huge pages: `SEEK_DATA` takes all of it for data
    /// there, and to read a hole through the mapping takes a whole huge page. What is mapped here is data; what is
    /// not may have been written through another mapping, and is read from the file, which allocates nothing.
    ///
    /// # Safety
    ///
    /// As of [`next_data`](Self::next_data).
    pub(crate) unsafe fn next_data_in_huge_pages(
        &self,
        host_addr: *mut u8,
        huge_page_bytes: u64,
        pages: Range<u64>,
    ) -> Option<Range<u64>> {
        let end_of_huge = |page: u64| {
            let addr = host_addr.addr() as u64 + page * PAGE_BYTES;
            let left_bytes = huge_page_bytes - addr % huge_page_bytes;
            (page + left_bytes.div_ceil(PAGE_BYTES)).min(pages.end)
        };
        let holds = |page: u64| {
            // SAFETY: a page of the mapping, says the caller.
            let mapped = unsafe { is_mapped(host_addr, page) };
            mapped || self.has_bytes(page..end_of_huge(page))
        };
        let mut begin = pages.start;
        while begin < pages.end && !holds(begin) {
            begin = end_of_huge(begin);
        }
        let mut end = begin;
        while end < pages.end && holds(end) {
            end = end_of_huge(end);
        }
        (begin < end).then_some(begin..end)
    }

    /// Whether any byte of these pages is not zero, as far as the file tells.
    fn has_bytes(&self, pages: Range<u64>) -> bool {
        // SAFETY: open as long as the region is mapped, says the type's contract.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd) };
        let mut piece = [0_u8; READ_BYTES];
        let (mut offset, end) = (pages.start * PAGE_BYTES, pages.end * PAGE_BYTES);
        while offset < end {
            let len = piece.len().min(usize::try_from(end - offset).unwrap_or(usize::MAX));
            match pread(fd, &mut piece[..len], self.offset_bytes + offset) {
                // Its end.
                Ok(0) => return false,
                Ok(read) if piece[..read].iter().all(|byte| *byte == 0) => offset += read as u64,
                // Nobody can tell.
                Ok(_) | Err(_) => return true,
            }
        }
        false
    }

    /// The first page from this one on that the file holds something for. `None` if there is none.
    fn next_page_of_data(&self, from: u64) -> Option<u64> {
        // SAFETY: open as long as the region is mapped, says the type's contract.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd) };
        match seek(fd, SeekFrom::Data(self.offset_bytes + from * PAGE_BYTES)) {
            // A page is data as soon as any of its bytes is.
            Ok(data) => Some((data.saturating_sub(self.offset_bytes) / PAGE_BYTES).max(from)),
            // Nothing but a hole until the end.
            Err(Errno::NXIO) => None,
            // The file system cannot tell.
            Err(_) => Some(from),
        }
    }
}

/// Whether a page is in this process's page tables; also where nobody can tell.
///
/// # Safety
///
/// It is inside a mapping, whose page 0 is at this address.
unsafe fn is_mapped(host_addr: *mut u8, page: u64) -> bool {
    let Ok(offset) = usize::try_from(page * PAGE_BYTES) else { return true };
    let mut told = 0_u8;
    let addr = host_addr.wrapping_add(offset).cast();
    // SAFETY: inside the mapping, says the caller; and there is a byte for the page.
    let asked = unsafe { libc::mincore(addr, 1, (&raw mut told).cast()) };
    asked != 0 || told & 1 != 0
}

/// The first of these pages that is not in memory, or the end of them where all are.
///
/// # Safety
///
/// They are inside one mapping, whose page 0 is at this address.
unsafe fn end_of_resident(host_addr: *mut u8, pages: Range<u64>) -> u64 {
    let mut resident = [0_u8; PIECE];
    let (mut page, mut most) = (pages.start, FIRST_PIECE);
    while page < pages.end {
        let piece = (pages.end - page).min(most);
        let (Ok(offset), Ok(len)) =
            (usize::try_from(page * PAGE_BYTES), usize::try_from(piece * PAGE_BYTES))
        else {
            return page;
        };
        let addr = host_addr.wrapping_add(offset).cast();
        // SAFETY: inside the mapping, says the caller; and there is a byte for each page.
        if unsafe { libc::mincore(addr, len, resident.as_mut_ptr().cast()) } != 0 {
            return page;
        }
        if let Some(absent) = (page..page + piece).zip(resident).find(|(_, told)| told & 1 == 0) {
            return absent.0;
        }
        page += piece;
        most = (most * 2).min(PIECE as u64);
    }
    pages.end
}
