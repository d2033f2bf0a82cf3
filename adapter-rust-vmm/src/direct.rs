//! Dirty tracking of writes that go past the page tables: `O_DIRECT` reads, io_uring reads, DMA.
//!
//! Who lets the kernel or a device write to pages that are pinned gives their addresses away first, and
//! the bytes come at some time later. A tracker that looks at page tables notes the first and not the
//! second: a harvest between the two reports the page and protects it again, the engine sends what is
//! there, and the bytes that then come are seen by nobody. KVM's trackers see neither. So the
//! VMM says when such a write begins and when it has ended.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry::dirty::{DirtyBitmap, DirtyError, DirtySource};
use pageferry::memory::{GuestMemory, Layout, PAGE_BYTES};
use thiserror::Error;

use crate::misuse::{MisuseError, check_bitmap, check_words, dirty_error};
use crate::pages::AtomicPages;

/// Name of the source in messages and statistics.
const NAME: &str = "direct writes";

/// A write that is not inside one region of guest memory.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[error(
    "{len_bytes} bytes at guest address {guest_addr:#x} are not inside one region of guest memory"
)]
#[non_exhaustive]
pub struct OutsideMemory {
    /// Guest physical address of the first byte.
    pub guest_addr: u64,
    /// Length in bytes.
    pub len_bytes: u64,
}

/// Writes did not end in time.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[error("{writes} direct writes to guest memory are still under way after {waited_ms} ms")]
#[non_exhaustive]
pub struct StillUnderWay {
    /// How many.
    pub writes: usize,
    /// How long they were waited for.
    pub waited_ms: u128,
}

/// The dirty source for writes that go past the page tables, as the VMM tells of them.
///
/// A clone is a handle to the same: one goes to the engine, the others to the devices. A device
///
/// 1. calls [`begin`](Self::begin) before it submits a request that writes to guest memory, and keeps what
///    it gets with the request;
/// 2. drops it when the request has ended, however it did, and before it tells the guest: the pages
///    count as written from then on.
///
/// And the [`Machine`](pageferry::Machine) whose `pause` is called has its devices submit nothing more, and
/// [waits](Self::wait) until nothing is under way: what comes after the last harvest is lost, whoever tells
/// of it.
///
/// Devices do so at all times, not during migrations alone: a request may be under way when one begins.
///
/// # Which writes
///
/// All that the kernel or a device does to pages that it was given before: `read` of a file that
/// was opened with `O_DIRECT`, reads by io_uring into registered buffers, and into others if the file is
/// `O_DIRECT`; Linux AIO; `process_vm_writev` into this process; receives into RDMA memory regions; DMA
/// by a device (VFIO) whose every request the VMM sees. Where a tracker for the rest is one that sees
/// page tables ([`PagemapScan`](crate::PagemapScan), [`UffdWp`](crate::UffdWp)), other system calls need
/// not be told of. Where it is KVM's, this is a way to tell of all that the VMM writes,
/// as [`AtomicBitmapSource`](crate::AtomicBitmapSource) is for who writes by `vm-memory`.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::fs::File;
/// use std::io::Read;
/// use std::sync::Arc;
/// use std::time::Duration;
///
/// use pageferry::dirty::DirtySources;
/// use pageferry_rust_vmm::{DirectWrites, guest_memory, process_memory_source};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// let ram = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?);
/// let memory = Arc::new(guest_memory(Arc::clone(&ram))?);
/// let direct = DirectWrites::new(&memory);
///
/// // A block device serves a request of the guest's:
/// let mut disk = File::open("/dev/zero")?;
/// let write = direct.begin(0x1000, 8192)?;
/// ram.read_exact_volatile_from(GuestAddress(0x1000), &mut disk, 8192)?;
/// drop(write);
///
/// // A migration has both:
/// let vcpus = process_memory_source(&memory)?;
/// let sources = DirtySources::new(vec![vcpus, Box::new(direct.clone())]);
///
/// // Machine::pause, when the devices take no more requests:
/// direct.wait(Duration::from_secs(5))?;
/// # Ok(())
/// # }
/// ```
///
/// # Thread safety
///
/// All methods may be called from any thread; a write may end on another one than it began on.
/// Beginning and ending one take a lock for some nanoseconds.
///
/// # Resource cleanup
///
/// Holds a bit for each page of guest memory, and no guest memory. A [`DirectWrite`] that is forgotten
/// (`mem::forget`) counts as under way for good.
#[derive(Debug, Clone)]
pub struct DirectWrites(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    layout: Layout,
    /// Written, and not re-armed since; or put back.
    pages: AtomicPages,
    started: AtomicBool,
    under_way: Mutex<usize>,
    /// Nothing is under way.
    idle: Condvar,
}

/// A write under way, until it is dropped: see [`DirectWrites`].
#[derive(Debug)]
#[must_use = "a write that is dropped at once counts as ended"]
pub struct DirectWrite {
    to: Arc<Inner>,
    region: u16,
    pages: Range<u64>,
}

impl DirectWrites {
    /// For writes to `memory`.
    pub fn new(memory: &GuestMemory) -> Self {
        let layout = memory.layout().clone();
        Self(Arc::new(Inner {
            pages: AtomicPages::new(&layout),
            layout,
            started: AtomicBool::new(false),
            under_way: Mutex::new(0),
            idle: Condvar::new(),
        }))
    }

    /// A write to guest memory begins: `len_bytes` from a guest physical address on, in one region.
    pub fn begin(&self, guest_addr: u64, len_bytes: u64) -> Result<DirectWrite, OutsideMemory> {
        let place = (0..).zip(self.0.layout.regions()).find_map(|(region, layout)| {
            let begin = guest_addr.checked_sub(layout.guest_addr)?;
            let end = begin.checked_add(len_bytes).filter(|end| *end <= layout.len_bytes)?;
            Some((region, begin / PAGE_BYTES..end.div_ceil(PAGE_BYTES)))
        });
        let (region, pages) = place.ok_or(OutsideMemory { guest_addr, len_bytes })?;
        *self.0.under_way() += 1;
        Ok(DirectWrite { to: Arc::clone(&self.0), region, pages })
    }

    /// Waits until no write is under way. That none begins meanwhile is up to the caller.
    pub fn wait(&self, timeout: Duration) -> Result<(), StillUnderWay> {
        let began = Instant::now();
        let (under_way, _) = self
            .0
            .idle
            .wait_timeout_while(self.0.under_way(), timeout, |writes| *writes > 0)
            .unwrap_or_else(PoisonError::into_inner);
        match *under_way {
            0 => Ok(()),
            writes => Err(StillUnderWay { writes, waited_ms: began.elapsed().as_millis() }),
        }
    }

    fn check_started(&self) -> Result<(), MisuseError> {
        let started = self.0.started.load(Ordering::Acquire);
        if started { Ok(()) } else { Err(MisuseError::NotStarted) }
    }

    fn try_start(&self) -> Result<(), MisuseError> {
        let started = self.0.started.swap(true, Ordering::AcqRel);
        // What is noted stays: it may have been put back, and the first re-arm clears the rest.
        if started { Err(MisuseError::AlreadyStarted) } else { Ok(()) }
    }

    fn try_harvest(&self, into: &mut DirtyBitmap) -> Result<(), MisuseError> {
        self.check_started()?;
        check_bitmap(&self.0.layout, into)?;
        self.0.pages.merge_into(into);
        Ok(())
    }

    fn try_rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), MisuseError> {
        self.check_started()?;
        check_words(&self.0.layout, region, first_page, words)?;
        // A write that ended before is in the bytes that will be read.
        self.0.pages.clear(region, first_page, words);
        Ok(())
    }

    fn try_put_back(&self, pages: &DirtyBitmap) -> Result<(), MisuseError> {
        check_bitmap(&self.0.layout, pages)?;
        self.0.pages.add(pages);
        Ok(())
    }

    fn try_stop(&self) -> Result<(), MisuseError> {
        let started = self.0.started.swap(false, Ordering::AcqRel);
        if started { Ok(()) } else { Err(MisuseError::NotStarted) }
    }
}

impl Inner {
    fn under_way(&self) -> MutexGuard<'_, usize> {
        // A number is always whole.
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for DirectWrite {
    fn drop(&mut self) {
        // Before it counts as ended: who waits for that harvests next.
        self.to.pages.set(self.region, self.pages.clone());
        let mut under_way = self.to.under_way();
        *under_way -= 1;
        if *under_way == 0 {
            self.to.idle.notify_all();
        }
    }
}

impl DirtySource for DirectWrites {
    fn name(&self) -> &'static str {
        NAME
    }

    fn start(&self) -> Result<(), DirtyError> {
        self.try_start().map_err(|error| dirty_error(NAME, "start", error))
    }

    fn harvest(&self, into: &mut DirtyBitmap) -> Result<(), DirtyError> {
        self.try_harvest(into).map_err(|error| dirty_error(NAME, "harvest", error))
    }

    fn rearm(&self, region: u16, first_page: u64, words: &[u64]) -> Result<(), DirtyError> {
        self.try_rearm(region, first_page, words)
            .map_err(|error| dirty_error(NAME, "re-arm", error))
    }

    fn put_back(&self, pages: &DirtyBitmap) -> Result<(), DirtyError> {
        self.try_put_back(pages).map_err(|error| dirty_error(NAME, "put pages back", error))
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.try_stop().map_err(|error| dirty_error(NAME, "stop", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    fn direct() -> (GuestMemory, DirectWrites) {
        let regions = [(GuestAddress(0x10_0000), 1 << 20), (GuestAddress(1 << 32), 8192)];
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&regions).unwrap();
        let memory = crate::guest_memory(Arc::new(memory)).unwrap();
        let direct = DirectWrites::new(&memory);
        (memory, direct)
    }

    fn harvest(memory: &GuestMemory, direct: &DirectWrites) -> Vec<(u16, u64)> {
        let mut found = DirtyBitmap::new(memory.layout());
        direct.harvest(&mut found).unwrap();
        let pages = |region| (0..found.region_pages(region)).map(move |page| (region, page));
        (0..2).flat_map(pages).filter(|(region, page)| found.get(*region, *page)).collect()
    }

    #[test]
    fn pages_count_as_written_when_the_write_has_ended() {
        let (memory, direct) = direct();
        direct.start().unwrap();
        // A byte of the first page to a byte of the third; the other region's last byte; nothing.
        let first = direct.begin(0x10_0fff, 4098).unwrap();
        let last = direct.begin((1 << 32) + 8191, 1).unwrap();
        drop(direct.begin(0x10_0000, 0).unwrap());
        assert_eq!(harvest(&memory, &direct), []);
        drop(last);
        assert_eq!(harvest(&memory, &direct), [(1, 1)]);
        drop(first);
        assert_eq!(harvest(&memory, &direct), [(0, 0), (0, 1), (0, 2), (1, 1)]);
        direct.rearm(0, 0, &[0b101]).unwrap();
        assert_eq!(harvest(&memory, &direct), [(0, 1), (1, 1)]);
    }

    #[test]
    fn what_is_not_guest_memory_is_refused() {
        let (_memory, direct) = direct();
        let outside = [
            (0x10_0000, (1 << 20) + 1),
            (0xf_ffff, 1),
            (0x20_0000, 1),
            (1 << 32, u64::MAX),
            (u64::MAX, 1),
        ];
        for (guest_addr, len_bytes) in outside {
            let refused = direct.begin(guest_addr, len_bytes).unwrap_err();
            assert_eq!(refused, OutsideMemory { guest_addr, len_bytes });
        }
        direct.wait(Duration::ZERO).unwrap();
    }

    #[test]
    fn who_pauses_waits_for_what_is_under_way() {
        let (memory, direct) = direct();
        direct.start().unwrap();
        direct.wait(Duration::ZERO).unwrap();
        let write = direct.begin(0x10_0000, 1).unwrap();
        let other = direct.begin(0x10_1000, 1).unwrap();
        assert_eq!(direct.wait(Duration::ZERO).unwrap_err().writes, 2);
        drop(other);
        std::thread::scope(|scope| {
            scope.spawn(|| drop(write));
            direct.wait(Duration::from_secs(60)).unwrap();
        });
        assert_eq!(harvest(&memory, &direct), [(0, 0), (0, 1)]);
    }
}
