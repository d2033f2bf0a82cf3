//! `PagemapScan` over each kind of memory a VMM may have.
#![expect(unsafe_code, reason = "the writer writes to guest memory by raw pointer")]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::suite::{self, Bench, Writer};
use pageferry::dirty::{DirtyBitmap, DirtySource};
use pageferry::memory::{GuestMemory, PAGE_BYTES, PageRange};
use pageferry_rust_vmm::{PagemapScan, guest_memory};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

const MIB: u64 = 1 << 20;

/// Threads of this process.
struct Threads<'m> {
    memory: &'m GuestMemory,
    ranges: Vec<PageRange>,
}

impl Threads<'_> {
    fn add_one(&self, region: u16, page: u64) {
        let span = self.memory.span(PageRange { region, first_page: page, pages: 1 }).unwrap();
        // SAFETY: the start of a page of guest memory: aligned, mapped, and everyone else here
        // accesses it by volatile loads.
        let counter = unsafe { AtomicU32::from_ptr(span.addr.cast()) };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

impl Writer for Threads<'_> {
    fn ranges(&self) -> Vec<PageRange> {
        self.ranges.clone()
    }

    fn touch(&self, range: PageRange) {
        let end = range.first_page + u64::from(range.pages);
        (range.first_page..end).for_each(|page| self.add_one(range.region, page));
    }

    fn hammer(&self, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            self.ranges.iter().for_each(|range| self.touch(*range));
        }
    }
}

/// Whether to go on; says so if not.
fn supported() -> bool {
    match PagemapScan::supported() {
        Ok(()) => true,
        Err(error) => {
            eprintln!("SKIPPED, because pages cannot be tracked here: {error}");
            false
        }
    }
}

fn passes_all(regions: Vec<(u64, MmapRegion)>, granule_pages: u64, prepare: impl Fn(&GuestMemory)) {
    let regions = regions
        .into_iter()
        .map(|(addr, region)| GuestRegionMmap::new(region, GuestAddress(addr)).unwrap())
        .collect();
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_regions(regions).unwrap();
    let memory = Arc::new(guest_memory(Arc::new(memory)).unwrap());
    prepare(&memory);
    // All but a few pages at the ends of each region.
    let ranges = (0..).zip(memory.layout().regions()).map(|(region, layout)| PageRange {
        region,
        first_page: 3,
        pages: u32::try_from(layout.pages() - 8).unwrap(),
    });
    let writer = Threads { memory: &memory, ranges: ranges.collect() };
    let source = PagemapScan::new(Arc::clone(&memory));
    suite::passes_all(&Bench { memory: &memory, source: &source, writer: &writer, granule_pages });
}

fn anonymous(len_bytes: u64) -> MmapRegion {
    MmapRegion::new(usize::try_from(len_bytes).unwrap()).unwrap()
}

fn memfd(len_bytes: u64, flags: libc::c_uint) -> File {
    // SAFETY: a string literal and flags.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), flags) };
    assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
    // SAFETY: just opened, and owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len_bytes).unwrap();
    file
}

fn mapped_file(file: File, offset: u64, len_bytes: u64) -> MmapRegion {
    let file_offset = FileOffset::new(file, offset);
    MmapRegion::from_file(file_offset, usize::try_from(len_bytes).unwrap()).unwrap()
}

/// Bytes in huge pages of this process's anonymous memory.
fn anon_huge_bytes() -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = smaps.lines().find_map(|line| line.strip_prefix("AnonHugePages:")).unwrap();
    line.trim().strip_suffix("kB").unwrap().trim().parse::<u64>().unwrap() * 1024
}

#[test]
fn anonymous_memory() {
    if supported() {
        // The second region is not a whole number of words.
        let regions = vec![(0, anonymous(4 * MIB)), (16 * MIB, anonymous(MIB + 5 * PAGE_BYTES))];
        passes_all(regions, 1, |_| ());
    }
}

#[test]
fn anonymous_memory_with_transparent_huge_pages() {
    if !supported() {
        return;
    }
    passes_all(vec![(0, anonymous(12 * MIB))], 1, |memory| {
        let region = memory.regions()[0];
        let len_bytes = usize::try_from(region.layout.len_bytes).unwrap();
        // SAFETY: advice on a mapping that lives; it changes no byte.
        let advised =
            unsafe { libc::madvise(region.host_addr.cast(), len_bytes, libc::MADV_HUGEPAGE) };
        assert_eq!(advised, 0);
        let all = PageRange { region: 0, first_page: 0, pages: 3072 };
        Threads { memory, ranges: vec![all] }.touch(all);
        if anon_huge_bytes() == 0 {
            eprintln!("note: this machine gave no transparent huge pages");
        }
    });
}

#[test]
fn shared_memory_of_a_memfd() {
    if supported() {
        let file = memfd(8 * MIB, 0);
        let low = mapped_file(file.try_clone().unwrap(), 0, 4 * MIB);
        let high = mapped_file(file, 4 * MIB, 4 * MIB);
        passes_all(vec![(0, low), (1 << 32, high)], 1, |_| ());
    }
}

/// Whether there are huge pages for these tests at once; says so if not.
fn huge_pages_free() -> bool {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free = free.ok().and_then(|free| free.trim().parse::<u64>().ok()).unwrap_or(0);
    if free < 8 {
        eprintln!("SKIPPED, because {free} huge pages of 2 MiB are free and 8 are needed");
    }
    free >= 8
}

fn has_huge_pages(memory: &GuestMemory) {
    assert_eq!(memory.layout().regions()[0].backing_page_bytes, 2 * MIB);
}

/// Both kinds, one after the other, so that they need not share the huge pages there are.
#[test]
fn huge_pages() {
    if !supported() || !huge_pages_free() {
        return;
    }
    let file = memfd(8 * MIB, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB);
    passes_all(vec![(0, mapped_file(file, 0, 8 * MIB))], 512, has_huge_pages);

    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let region = MmapRegion::build(None, 8 << 20, protection, flags).unwrap();
    passes_all(vec![(0, region)], 512, has_huge_pages);
}

/// System calls write for the process too, though the userfaultfd is for user-mode faults only.
#[test]
fn writes_by_system_calls_are_seen() {
    if !supported() {
        return;
    }
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let memory = Arc::new(guest_memory(Arc::new(memory)).unwrap());
    let source = PagemapScan::new(Arc::clone(&memory));
    source.start().unwrap();
    let zero = File::open("/dev/zero").unwrap();
    let span = memory.span(PageRange { region: 0, first_page: 17, pages: 2 }).unwrap();
    // SAFETY: the span is guest memory of that length.
    let read = unsafe { libc::read(zero.as_raw_fd(), span.addr.cast(), span.len_bytes) };
    assert_eq!(usize::try_from(read).unwrap(), span.len_bytes);
    let mut found = DirtyBitmap::new(memory.layout());
    source.harvest(&mut found).unwrap();
    assert!(found.get(0, 17) && found.get(0, 18));
    assert_eq!(found.count(), 2);
    // Dropped while it tracks: the next one can have the memory.
    drop(source);
    let source = PagemapScan::new(memory);
    source.start().unwrap();
    source.stop().unwrap();
}

/// Reading memory nobody wrote to, as the engine does with all pages, is not writing.
#[test]
fn reads_are_not_reported() {
    if !supported() {
        return;
    }
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap();
    let memory = Arc::new(guest_memory(Arc::new(memory)).unwrap());
    let source = PagemapScan::new(Arc::clone(&memory));
    source.start().unwrap();
    assert!((0..2048).all(|page| memory.is_zero(0, page).unwrap()));
    let mut found = DirtyBitmap::new(memory.layout());
    source.harvest(&mut found).unwrap();
    assert_eq!(found.count(), 0);
}

/// Two trackers cannot have the same memory; the second says why, and leaves the first alone.
#[test]
fn memory_that_is_tracked_already_is_refused() {
    if !supported() {
        return;
    }
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let memory = Arc::new(guest_memory(Arc::new(memory)).unwrap());
    let first = PagemapScan::new(Arc::clone(&memory));
    let second = PagemapScan::new(Arc::clone(&memory));
    first.start().unwrap();
    let error = second.start().unwrap_err();
    let cause = std::error::Error::source(&error).expect("a cause").to_string();
    assert!(cause.contains("another userfaultfd has it"), "{cause}");
    Threads { memory: &memory, ranges: Vec::new() }.add_one(0, 5);
    let mut found = DirtyBitmap::new(memory.layout());
    first.harvest(&mut found).unwrap();
    assert!(found.get(0, 5) && found.count() == 1);
    first.stop().unwrap();
}
