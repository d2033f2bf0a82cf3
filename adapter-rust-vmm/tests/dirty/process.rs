//! `PagemapScan` and `UffdWp` over each kind of memory a VMM may have.
#![expect(unsafe_code, reason = "system calls on guest memory")]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Barrier};

use crate::suite::{self, Bench, Writer};
use crate::threads::Threads;
use pageferry::dirty::{DirtyBitmap, DirtySource};
use pageferry::memory::{GuestMemory, PAGE_BYTES, PageRange};
use pageferry_rust_vmm::uffd_wp::Untouched;
use pageferry_rust_vmm::{PagemapScan, UffdWp, guest_memory, process_memory_source};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

const MIB: u64 = 1 << 20;

/// A source over all memory of this process's guest, under test.
#[derive(Clone, Copy)]
enum Kind {
    Scan,
    Wp(Untouched),
}

impl Kind {
    fn source(self, memory: &Arc<GuestMemory>) -> Box<dyn DirtySource> {
        let memory = Arc::clone(memory);
        match self {
            Self::Scan => Box::new(PagemapScan::new(memory)),
            Self::Wp(untouched) => Box::new(UffdWp::new(memory).untouched(untouched)),
        }
    }

    /// Whether to go on; says so if not.
    fn supported(self) -> bool {
        let supported = match self {
            Self::Scan => PagemapScan::supported().map_err(|error| error.to_string()),
            Self::Wp(_) => UffdWp::supported().map_err(|error| error.to_string()),
        };
        if let Err(error) = &supported {
            eprintln!("skipped, because pages cannot be tracked here: {error}");
        }
        supported.is_ok()
    }
}

macro_rules! for_kind {
    ($kind:expr, $($test:ident),*) => {
        $(#[test]
        fn $test() {
            if $kind.supported() {
                super::$test($kind);
            }
        })*
    };
}

/// The tests below for each kind, where it is supported.
macro_rules! for_each_kind {
    ($($test:ident),* $(,)?) => {
        mod scan {
            use super::Kind;
            for_kind!(Kind::Scan, $($test),*);
        }
        mod wp {
            use super::{Kind, Untouched};
            for_kind!(Kind::Wp(Untouched::Marked), $($test),*);
        }
        mod wp_read_first {
            use super::{Kind, Untouched};
            for_kind!(Kind::Wp(Untouched::ReadFirst), $($test),*);
        }
    };
}

for_each_kind!(
    anonymous_memory,
    anonymous_memory_with_transparent_huge_pages,
    shared_memory_of_a_memfd,
    huge_pages,
    writes_by_system_calls_are_seen,
    reads_are_not_reported,
    memory_that_is_tracked_already_is_refused,
);

fn passes_all(
    kind: Kind,
    regions: Vec<(u64, MmapRegion)>,
    granule_pages: u64,
    prepare: impl Fn(&GuestMemory),
) {
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
    let source = kind.source(&memory);
    let source = source.as_ref();
    suite::passes_all(&Bench { memory: &memory, source, writer: &writer, granule_pages });
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

fn anonymous_memory(kind: Kind) {
    // The second region is not a whole number of words.
    let regions = vec![(0, anonymous(4 * MIB)), (16 * MIB, anonymous(MIB + 5 * PAGE_BYTES))];
    passes_all(kind, regions, 1, |_| ());
}

fn anonymous_memory_with_transparent_huge_pages(kind: Kind) {
    passes_all(kind, vec![(0, anonymous(12 * MIB))], 1, |memory| {
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

fn shared_memory_of_a_memfd(kind: Kind) {
    let file = memfd(8 * MIB, 0);
    let low = mapped_file(file.try_clone().unwrap(), 0, 4 * MIB);
    let high = mapped_file(file, 4 * MIB, 4 * MIB);
    passes_all(kind, vec![(0, low), (1 << 32, high)], 1, |_| ());
}

/// Whether there are huge pages for these tests at once; says so if not.
fn huge_pages_free() -> bool {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free = free.ok().and_then(|free| free.trim().parse::<u64>().ok()).unwrap_or(0);
    if free < 8 {
        eprintln!("skipped, because {free} huge pages of 2 MiB are free and 8 are needed");
    }
    free >= 8
}

fn has_huge_pages(memory: &GuestMemory) {
    assert_eq!(memory.layout().regions()[0].backing_page_bytes, 2 * MIB);
}

/// Both kinds, one after the other, so that they need not share the huge pages there are.
fn huge_pages(kind: Kind) {
    if !huge_pages_free() {
        return;
    }
    let file = memfd(8 * MIB, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB);
    passes_all(kind, vec![(0, mapped_file(file, 0, 8 * MIB))], 512, has_huge_pages);

    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let region = MmapRegion::build(None, 8 << 20, protection, flags).unwrap();
    passes_all(kind, vec![(0, region)], 512, has_huge_pages);
}

/// System calls write for the process too, though the userfaultfd is for user-mode faults only.
fn writes_by_system_calls_are_seen(kind: Kind) {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let memory = Arc::new(guest_memory(Arc::new(memory)).unwrap());
    let source = kind.source(&memory);
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
    let source = kind.source(&memory);
    source.start().unwrap();
    source.stop().unwrap();
}

/// Reading memory nobody wrote to, as the engine does with all pages, is not writing.
fn reads_are_not_reported(kind: Kind) {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap();
    let memory = Arc::new(guest_memory(Arc::new(memory)).unwrap());
    let source = kind.source(&memory);
    source.start().unwrap();
    assert!((0..2048).all(|page| memory.is_zero(0, page).unwrap()));
    let mut found = DirtyBitmap::new(memory.layout());
    source.harvest(&mut found).unwrap();
    assert_eq!(found.count(), 0);
}

/// Two trackers cannot have the same memory; the second says why, and leaves the first alone.
fn memory_that_is_tracked_already_is_refused(kind: Kind) {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let memory = Arc::new(guest_memory(Arc::new(memory)).unwrap());
    let first = kind.source(&memory);
    let second = kind.source(&memory);
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

/// The thread is the host's to start, once for each start, and is gone after `stop`.
#[test]
fn write_faults_are_served_by_the_hosts_thread() {
    if !Kind::Wp(Untouched::Marked).supported() {
        return;
    }
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let memory = Arc::new(guest_memory(Arc::new(memory)).unwrap());
    let (started, ended) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let counts = (Arc::clone(&started), Arc::clone(&ended));
    let source = UffdWp::new(Arc::clone(&memory)).threads(Arc::new(move |body| {
        let (started, ended) = (Arc::clone(&counts.0), Arc::clone(&counts.1));
        std::thread::Builder::new().spawn(move || {
            started.fetch_add(1, Ordering::Relaxed);
            body();
            ended.fetch_add(1, Ordering::Relaxed);
        })
    }));
    for round in 1..3 {
        source.start().unwrap();
        Threads { memory: &memory, ranges: Vec::new() }.add_one(0, 5);
        source.stop().unwrap();
        assert_eq!([&started, &ended].map(|count| count.load(Ordering::Relaxed)), [round; 2]);
    }
    let refusing = UffdWp::new(Arc::clone(&memory))
        .threads(Arc::new(|_| Err(std::io::ErrorKind::OutOfMemory.into())));
    refusing.start().unwrap_err();
    // Nothing is left protected: nobody would serve this.
    Threads { memory: &memory, ranges: Vec::new() }.add_one(0, 5);
    source.start().unwrap();
}

/// Threads that write to the same pages raise a fault each, some of which are served late.
#[test]
fn late_faults_lose_nothing() {
    const PAGES: u32 = 64;
    if !Kind::Wp(Untouched::Marked).supported() {
        return;
    }
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let memory = Arc::new(guest_memory(Arc::new(memory)).unwrap());
    let source = UffdWp::new(Arc::clone(&memory));
    source.start().unwrap();
    let range = PageRange { region: 0, first_page: 0, pages: PAGES };
    let stop = AtomicBool::new(false);
    let mut bytes = Vec::new();
    let mut counts = vec![0_u32; PAGES as usize];
    let read = |page: u64, bytes: &mut Vec<u8>| {
        memory.copy_out(PageRange { region: 0, first_page: page, pages: 1 }, bytes).unwrap();
        u32::from_ne_bytes(*bytes.first_chunk().unwrap())
    };
    let round = |counts: &mut [u32], bytes: &mut Vec<u8>| {
        let mut found = DirtyBitmap::new(memory.layout());
        source.harvest(&mut found).unwrap();
        source.rearm(0, 0, found.region_words(0)).unwrap();
        for (page, count) in (0..).zip(counts).filter(|(page, _)| found.get(0, *page)) {
            *count = read(page, bytes);
        }
        found.count()
    };
    let mut found = 0;
    for _ in 0..100 {
        stop.store(false, Ordering::Relaxed);
        // No round before all write: a busy machine may let them wait.
        let all = Barrier::new(5);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    all.wait();
                    Threads { memory: &memory, ranges: vec![range] }.hammer(&stop);
                });
            }
            all.wait();
            for _ in 0..20 {
                found += round(&mut counts, &mut bytes);
            }
            stop.store(true, Ordering::Relaxed);
        });
        found += round(&mut counts, &mut bytes);
        for (page, count) in (0..).zip(&counts) {
            assert_eq!(*count, read(page, &mut bytes), "a write to page {page} was lost");
        }
    }
    eprintln!("{found} pages found");
    assert!(found > u64::from(PAGES), "the writers were not seen at all");
}

#[test]
fn the_best_source_is_picked() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let memory = Arc::new(guest_memory(Arc::new(memory)).unwrap());
    let (scan, wp) = (PagemapScan::supported(), UffdWp::supported());
    match process_memory_source(&memory) {
        Ok(source) if scan.is_ok() => assert_eq!(source.name(), "pagemap scan"),
        Ok(source) => {
            assert_eq!(source.name(), "uffd write-protect");
            wp.unwrap();
        }
        Err(error) => {
            eprintln!("this process cannot track its memory: {error}");
            assert!(scan.is_err() && wp.is_err());
        }
    }
}
