//! Guest memory as registered buffers.
//!
//! The kernel takes buffers of at most 1 GiB, and a table of at most 16384 of them. The table is
//! filled once, on a ring that does nothing else, and cloned to the rings of the channels; where
//! the kernel cannot clone (before Linux 6.12) each ring registers for itself.
#![expect(unsafe_code, reason = "the kernel keeps the addresses of guest memory")]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use io_uring::IoUring;
use pageferry::memory::GuestMemory;
use pageferry::transport::{Registration, TransportError};

use crate::features::Feature;
use crate::huge;
use crate::limits::memlock_limit;
use crate::setup::RingSetup;

/// Longest buffer.
const MAX_SLICE_BYTES: usize = 1 << 30;
/// Most buffers in a table.
const MAX_SLICES: usize = 1 << 14;

/// A piece of guest memory that is one registered buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Slice {
    addr: usize,
    len_bytes: usize,
}

/// A part of a run that is one zero-copy send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) addr: usize,
    pub(crate) len_bytes: usize,
    /// The one it lies in, if memory is registered.
    pub(crate) buffer: Option<u16>,
}

impl Piece {
    /// As a request has it.
    pub(crate) fn raw(&self) -> (*const u8, u32) {
        let len = u32::try_from(self.len_bytes).unwrap_or(u32::MAX);
        (std::ptr::with_exposed_provenance(self.addr), len)
    }
}

/// Registered guest memory.
///
/// # Resource cleanup
///
/// Dropping it revokes the registration. What was cloned from it stays until the ring is gone.
pub(crate) struct Table {
    memory: Arc<GuestMemory>,
    /// Sorted by address; the position is the index of the buffer.
    slices: Vec<Slice>,
    /// The ring that holds the registration: to clone from, or the first channel's if this kernel
    /// cannot clone, and then gone when that has been taken.
    ring: Mutex<Option<IoUring>>,
    clones: bool,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table").field("slices", &self.slices.len()).finish_non_exhaustive()
    }
}

impl Table {
    /// Registers all of guest memory, slice by slice; `check` can end it between two.
    pub(crate) fn register(
        memory: &Arc<GuestMemory>,
        setup: &RingSetup,
        check: impl Fn() -> Result<(), TransportError>,
    ) -> Result<(Arc<Self>, Registration), TransportError> {
        let began = Instant::now();
        let slices = slices_of(memory, MAX_SLICE_BYTES, MAX_SLICES)?;
        let clones = setup.features.has(Feature::CloneBuffers);
        let ring = if clones { IoUring::new(1) } else { setup.build() };
        let failed = |cause| TransportError::Io { operation: "set up a ring", cause };
        let ring = ring.map_err(failed)?;
        fill(&ring, &slices, memory.layout().len_bytes(), check)?;
        let table =
            Self { memory: Arc::clone(memory), slices, ring: Mutex::new(Some(ring)), clones };
        let registered_bytes = memory.layout().len_bytes();
        Ok((Arc::new(table), Registration { registered_bytes, took: began.elapsed() }))
    }

    /// A ring that has the table, not enabled yet.
    pub(crate) fn attached_ring(
        &self,
        setup: &RingSetup,
        check: impl Fn() -> Result<(), TransportError>,
    ) -> Result<IoUring, TransportError> {
        let mut held = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.clones
            && let Some(ring) = held.take()
        {
            return Ok(ring);
        }
        let failed = |cause| TransportError::Io { operation: "set up a ring", cause };
        let ring = setup.build().map_err(failed)?;
        let len_bytes = self.memory.layout().len_bytes();
        match held.as_ref() {
            Some(source) => ring
                .submitter()
                .register_buffers_clone(source.as_raw_fd())
                .map_err(|cause| refused(cause, len_bytes))?,
            None => fill(&ring, &self.slices, len_bytes, check)?,
        }
        Ok(ring)
    }

    /// Whether sends from these buffers starve on a socket. Linux 6.12 and newer make one entry of
    /// each huge page of a buffer, and count a packet as all that comes before it in its page too:
    /// up to 2 MiB for 64 KiB, so that a send buffer of ordinary size holds one packet at a time,
    /// and each waits for its acknowledgement. Where the kernel does not tell, it is taken to be so.
    pub(crate) fn starves_sends(&self) -> bool {
        let slices = self.slices.iter().map(|slice| (slice.addr, slice.len_bytes));
        match huge::any_in(slices) {
            Ok(huge) => huge,
            // Before Linux 6.7: one that old does not do it.
            Err(error) => error.raw_os_error() != Some(libc::ENOTTY),
        }
    }

    /// The buffers that a piece of guest memory lies in.
    pub(crate) fn pieces(&self, addr: usize, len_bytes: usize) -> impl Iterator<Item = Piece> {
        let first = self.slices.partition_point(|slice| slice.addr + slice.len_bytes <= addr);
        let end = addr + len_bytes;
        (first..self.slices.len()).zip(&self.slices[first..]).map_while(move |(index, slice)| {
            let from = slice.addr.max(addr);
            let to = (slice.addr + slice.len_bytes).min(end);
            let buffer = u16::try_from(index).ok()?;
            (from < to).then(|| Piece { addr: from, len_bytes: to - from, buffer: Some(buffer) })
        })
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // Closing a ring lets go of its buffers some time later; this does now.
        let held = self.ring.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(ring) = held {
            let _ = ring.submitter().unregister_buffers();
        }
    }
}

/// Cuts guest memory into buffers.
fn slices_of(
    memory: &GuestMemory,
    slice_bytes: usize,
    most: usize,
) -> Result<Vec<Slice>, TransportError> {
    let region_slices = |len_bytes: u64| len_bytes.div_ceil(slice_bytes as u64);
    let regions = memory.regions();
    let needed: u64 = regions.iter().map(|region| region_slices(region.layout.len_bytes)).sum();
    if needed > most as u64 {
        let advice = format!(
            "io_uring takes {most} buffers of at most {slice_bytes} bytes, and this guest's memory \
             needs {needed}; use another transport for it"
        );
        return Err(TransportError::Register { advice, cause: io::ErrorKind::InvalidInput.into() });
    }
    let mut slices = Vec::new();
    for region in regions {
        let start = region.host_addr.addr();
        let len_bytes = usize::try_from(region.layout.len_bytes).unwrap_or(usize::MAX);
        for offset in (0..len_bytes).step_by(slice_bytes) {
            let len_bytes = slice_bytes.min(len_bytes - offset);
            slices.push(Slice { addr: start + offset, len_bytes });
        }
    }
    slices.sort_unstable_by_key(|slice| slice.addr);
    Ok(slices)
}

/// Registers slices with a ring that has no buffers.
fn fill(
    ring: &IoUring,
    slices: &[Slice],
    all_bytes: u64,
    check: impl Fn() -> Result<(), TransportError>,
) -> Result<(), TransportError> {
    let submitter = ring.submitter();
    let count = u32::try_from(slices.len()).unwrap_or(u32::MAX);
    submitter.register_buffers_sparse(count).map_err(|cause| refused(cause, all_bytes))?;
    for (index, slice) in (0..).zip(slices) {
        check()?;
        let vector = libc::iovec {
            iov_base: std::ptr::with_exposed_provenance_mut(slice.addr),
            iov_len: slice.len_bytes,
        };
        // SAFETY: the slice is a part of a region of guest memory, which stays mapped as long as
        // its owner, and whoever holds a ring with these buffers holds that.
        let registered = unsafe { submitter.register_buffers_update(index, &[vector], None) };
        registered.map_err(|cause| refused(cause, all_bytes))?;
    }
    Ok(())
}

fn refused(cause: io::Error, all_bytes: u64) -> TransportError {
    let advice = match cause.raw_os_error() {
        Some(libc::ENOMEM | libc::EPERM | libc::EAGAIN) => {
            let limit = memlock_limit();
            format!(
                "it must be locked, {all_bytes} bytes for the guest (for each channel where the \
                 kernel is older than 6.12), and this user's limit is {limit}: raise RLIMIT_MEMLOCK \
                 (ulimit -l, LimitMEMLOCK= of systemd), give CAP_IPC_LOCK, or use another transport"
            )
        }
        Some(libc::EFAULT) => format!(
            "{all_bytes} bytes must be allocated for it, and a part could not be: give the machine \
             more memory or huge pages"
        ),
        Some(libc::EOPNOTSUPP) => {
            "it is a mapping of a file on a disk, and only anonymous memory, \
                                   memfds and huge pages can be registered: use another transport"
                .to_owned()
        }
        _ => "the kernel takes no buffers; another transport may do".to_owned(),
    };
    TransportError::Register { advice, cause }
}

#[cfg(test)]
mod tests {
    use pageferry::testing::TestMemory;

    use super::*;

    #[test]
    fn memory_is_cut_into_slices() {
        let memory = TestMemory::new(&[5, 2, 7]);
        let slices = slices_of(memory.memory(), 4 * 4096, 5).unwrap();
        let mut lens: Vec<usize> = slices.iter().map(|slice| slice.len_bytes / 4096).collect();
        lens.sort_unstable();
        assert_eq!(lens, [1, 2, 3, 4, 4]);
        assert!(slices.is_sorted_by_key(|slice| slice.addr));
    }

    #[test]
    fn more_memory_than_the_table_holds_is_refused() {
        let memory = TestMemory::new(&[5, 2, 7]);
        let error = slices_of(memory.memory(), 4 * 4096, 4).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, TransportError::Register { .. }));
        assert!(text.contains("4 buffers of at most 16384 bytes") && text.contains("needs 5"));
    }

    #[test]
    fn a_run_over_a_border_is_two_pieces() {
        let memory = TestMemory::new(&[8]);
        let slices = slices_of(memory.memory(), 4 * 4096, 5).unwrap();
        let start = slices[0].addr;
        let ring = Mutex::new(None);
        let table = Table { memory: Arc::clone(memory.memory()), slices, ring, clones: false };
        let pieces: Vec<_> = table.pieces(start + 3 * 4096, 2 * 4096).collect();
        let piece =
            |page: usize, buffer| Piece { addr: start + page * 4096, len_bytes: 4096, buffer };
        assert_eq!(pieces, [piece(3, Some(0)), piece(4, Some(1))]);
        assert_eq!(table.pieces(start, 4 * 4096).count(), 1);
    }

    #[test]
    fn a_small_limit_is_named() {
        let error = refused(io::Error::from_raw_os_error(libc::ENOMEM), 1 << 30);
        let text = error.to_string();
        assert!(text.contains("RLIMIT_MEMLOCK") && text.contains("1073741824"), "{text}");
    }
}
