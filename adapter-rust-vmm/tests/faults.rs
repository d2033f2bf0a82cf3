//! `UffdFaults` over each kind of memory a VMM may have: whoever touches a missing page sees all of it, or waits.
#![expect(unsafe_code, reason = "system calls on guest memory")]

use std::collections::HashSet;
use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use pageferry::dirty::DirtyBitmap;
use pageferry::faults::{Fault, FaultSource};
use pageferry::memory::{GuestMemory, PAGE_BYTES, PageRange};
use pageferry_rust_vmm::guest_memory;
use pageferry_rust_vmm::uffd_faults::{UffdFaults, UffdFaultsError};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

const MIB: u64 = 1 << 20;
const HUGE_BYTES: u64 = 2 << 20;
/// There for a hang only.
const LONG: Duration = Duration::from_secs(120);
const WORDS: u64 = PAGE_BYTES / 8;
const READERS: u32 = 4;

fn described(regions: Vec<(u64, MmapRegion)>) -> Arc<GuestMemory> {
    let regions = regions
        .into_iter()
        .map(|(at, region)| GuestRegionMmap::new(region, GuestAddress(at)).unwrap());
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_regions(regions.collect()).unwrap();
    Arc::new(guest_memory(Arc::new(memory)).unwrap())
}

fn memfd(len_bytes: u64, flags: MemfdFlags) -> MmapRegion {
    let file = File::from(memfd_create("guest", flags | MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, len_bytes).unwrap();
    MmapRegion::from_file(FileOffset::new(file, 0), usize::try_from(len_bytes).unwrap()).unwrap()
}

fn anonymous(len_bytes: u64) -> MmapRegion {
    MmapRegion::new(usize::try_from(len_bytes).unwrap()).unwrap()
}

/// The source, if this machine has one; says so if not.
fn source(memory: &Arc<GuestMemory>) -> Option<Arc<UffdFaults>> {
    match UffdFaults::new(Arc::clone(memory)) {
        Ok(source) => Some(Arc::new(source)),
        Err(
            error @ (UffdFaultsError::NotPermitted(_)
            | UffdFaultsError::Userfaultfd(_)
            | UffdFaultsError::FeatureMissing { .. }),
        ) => {
            eprintln!(
                "skipped, because pages cannot be missing here: {}: {:?}",
                error,
                error.source()
            );
            None
        }
        Err(error) => panic!("{error}: {:?}", error.source()),
    }
}

fn word(memory: &GuestMemory, region: u16, page: u64, word: u64) -> *mut u64 {
    let span = memory.span(PageRange { region, first_page: page, pages: 1 }).unwrap();
    span.addr.wrapping_add(usize::try_from(word * 8).unwrap()).cast()
}

fn read(memory: &GuestMemory, region: u16, page: u64, at: u64) -> u64 {
    // SAFETY: a word of guest memory, which everyone here accesses by volatile loads and stores.
    unsafe { word(memory, region, page, at).read_volatile() }
}

fn write(memory: &GuestMemory, region: u16, page: u64, words: std::ops::Range<u64>, value: u64) {
    for at in words {
        // SAFETY: likewise.
        unsafe { word(memory, region, page, at).write_volatile(value) };
    }
}

/// What the guest is to see in each word of a page: among others zeros.
fn expected(region: u16, page: u64) -> u64 {
    if page % 7 == 1 { 0 } else { 1 + page + (u64::from(region) << 32) }
}

const STALE: u64 = u64::MAX;

fn land(landing: &GuestMemory, region: u16, page: u64) {
    let value = expected(region, page);
    if value == 0 {
        return landing.fill_zero(PageRange { region, first_page: page, pages: 1 }).unwrap();
    }
    write(landing, region, page, 0..WORDS / 2, value);
    thread::yield_now();
    write(landing, region, page, WORDS / 2..WORDS, value);
}

/// All pages of all regions, in an order of its own for each reader.
fn order(memory: &GuestMemory, reader: u32) -> Vec<(u16, u64)> {
    let regions = (0..).zip(memory.layout().regions());
    let all: Vec<_> = regions
        .flat_map(|(index, region)| (0..region.pages()).map(move |page| (index, page)))
        .collect();
    let (len, step) = (all.len() as u64, [1, 7919, 104_729, 1_299_709][reader as usize]);
    // A prime that does not divide the length goes to each once.
    assert!(len % step != 0 || step == 1);
    (0..len).map(|at| all[usize::try_from(at * step % len).unwrap()]).collect()
}

/// A guest's thread: it looks at both ends of each page. The last one by system calls, which look by themselves.
fn look(memory: &GuestMemory, reader: u32) {
    let by_kernel = reader == READERS - 1;
    let (mut output, input) = std::io::pipe().unwrap();
    for (region, page) in order(memory, reader) {
        let value = expected(region, page);
        if by_kernel {
            let span = memory.span(PageRange { region, first_page: page, pages: 1 }).unwrap();
            // SAFETY: a page of guest memory; the kernel reads it.
            let wrote = unsafe { libc::write(input.as_raw_fd(), span.addr.cast(), span.len_bytes) };
            assert_eq!(usize::try_from(wrote).unwrap(), span.len_bytes);
            let mut seen = [0; 4096];
            output.read_exact(&mut seen).unwrap();
            assert!(
                seen.chunks_exact(8).all(|word| word == value.to_ne_bytes()),
                "page {page} by the kernel"
            );
        } else {
            for at in [0, WORDS / 2 - 1, WORDS / 2, WORDS - 1] {
                assert_eq!(
                    read(memory, region, page, at),
                    value,
                    "word {at} of page {page} of region {region}"
                );
            }
        }
    }
}

/// Says that one who looked does so no more, whatever has ended that.
struct Leaves {
    source: Arc<UffdFaults>,
    looking: Arc<AtomicU32>,
}

impl Drop for Leaves {
    fn drop(&mut self) {
        self.looking.fetch_sub(1, Ordering::SeqCst);
        self.source.wake();
    }
}

/// Several threads look at everything while two of three pages are missing.
fn is_seen_whole_or_not_at_all(memory: &Arc<GuestMemory>) -> Option<u64> {
    let source = source(memory)?;
    let mut missing = DirtyBitmap::new(memory.layout());
    for (region, page) in order(memory, 0) {
        if page % 3 == 0 {
            write(memory, region, page, 0..WORDS, expected(region, page));
        } else {
            write(memory, region, page, 0..WORDS, STALE);
            missing.set(region, page);
        }
    }
    source.begin(&missing).unwrap();
    assert!(source.end().is_err(), "{} pages are missing", missing.count());
    let looking = Arc::new(AtomicU32::new(READERS));
    let readers: Vec<_> = (0..READERS)
        .map(|reader| {
            let (memory, source, looking) =
                (Arc::clone(memory), Arc::clone(&source), Arc::clone(&looking));
            thread::spawn(move || {
                let _leaves = Leaves { source, looking };
                look(&memory, reader);
            })
        })
        .collect();

    let mut background =
        order(memory, 0).into_iter().filter(|(region, page)| missing.get(*region, *page));
    let (mut landed, mut faults, mut waits) = (HashSet::new(), Vec::new(), 0);
    let mut more = true;
    while looking.load(Ordering::SeqCst) > 0 {
        source.next(&mut faults, if more { Duration::ZERO } else { LONG }).unwrap();
        let mut wanted: Vec<_> =
            faults.drain(..).map(|Fault { region, page, .. }| (region, page)).collect();
        waits += wanted.len();
        let next = background.next();
        more = next.is_some();
        wanted.extend(next);
        for (region, page) in wanted {
            assert!(missing.get(region, page));
            if landed.insert((region, page)) {
                land(source.landing(), region, page);
                source.resolve(PageRange { region, first_page: page, pages: 1 }).unwrap();
            }
        }
    }
    for reader in readers {
        reader.join().unwrap();
    }
    for (region, page) in background {
        if landed.insert((region, page)) {
            land(source.landing(), region, page);
            source.resolve(PageRange { region, first_page: page, pages: 1 }).unwrap();
        }
    }
    assert!(waits > 0);
    // Once more, which changes nothing.
    source.resolve(PageRange { region: 0, first_page: 1, pages: 2 }).unwrap();
    source.end().unwrap();
    (0..READERS).for_each(|reader| look(memory, reader));
    eprintln!("{waits} faults, {} pages, {} bytes copied", landed.len(), source.copied_bytes());
    Some(source.copied_bytes())
}

#[test]
fn a_page_of_a_memfd_is_seen_whole_or_not_at_all() {
    let regions = vec![
        (0, memfd(4 * MIB, MemfdFlags::empty())),
        (MIB << 12, memfd(MIB, MemfdFlags::empty())),
    ];
    assert!(matches!(is_seen_whole_or_not_at_all(&described(regions)), None | Some(0)));
}

#[test]
fn a_page_of_anonymous_memory_is_seen_whole_or_not_at_all() {
    let memory =
        described(vec![(0, anonymous(4 * MIB)), (MIB << 12, anonymous(MIB + 5 * PAGE_BYTES))]);
    is_seen_whole_or_not_at_all(&memory);
}

#[test]
fn a_page_of_a_huge_one_is_seen_whole_or_not_at_all() {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free = free.ok().and_then(|free| free.trim().parse::<u64>().ok()).unwrap_or(0);
    if free < 3 {
        return eprintln!("skipped, because {free} huge pages of 2 MiB are free and 3 are needed");
    }
    let region = memfd(3 * HUGE_BYTES, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB);
    assert!(matches!(is_seen_whole_or_not_at_all(&described(vec![(0, region)])), None | Some(0)));
}

/// A file's mapping of its own at a huge page's boundary, for good.
fn aligned(file: &File, huge_pages: usize) -> *mut u8 {
    let len = huge_pages << 21;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping, wherever there is room.
    let room =
        unsafe { mmap_anonymous(ptr::null_mut(), len + (2 << 20), ProtFlags::empty(), flags) };
    let room = room.unwrap().cast::<u8>();
    let start = room.map_addr(|address| address.next_multiple_of(2 << 20));
    let (protection, flags) =
        (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED);
    // SAFETY: in place of a part of that, which is nothing else's.
    unsafe { mmap(start.cast(), len, protection, flags, file, 0) }.unwrap().cast()
}

/// Makes huge pages of a mapping's pages, and maps them as such.
fn collapse(mapping: *mut u8, huge_pages: usize) -> std::io::Result<()> {
    // SAFETY: a mapping that lives; no byte changes.
    match unsafe { libc::madvise(mapping.cast(), huge_pages << 21, libc::MADV_COLLAPSE) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// A huge page that is mapped for one page would show 511 others.
#[test]
fn transparent_huge_pages_show_nothing_that_is_missing() {
    const HUGE_PAGES: usize = 3;
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    let len = HUGE_PAGES << 21;
    ftruncate(&file, len as u64).unwrap();
    let (guest, beside) = (aligned(&file, HUGE_PAGES), aligned(&file, HUGE_PAGES));
    let region = MmapRegionBuilder::<()>::new_with_bitmap(len, ())
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED)
        .with_file_offset(FileOffset::new(file, 0));
    // SAFETY: a mapping of that file and length, for good.
    let region = unsafe { region.with_raw_mmap_pointer(guest) }.build().unwrap();
    let memory = described(vec![(0, region)]);
    let Some(source) = source(&memory) else { return };
    for (region, page) in order(&memory, 0) {
        write(&memory, region, page, 0..WORDS, expected(region, page));
    }
    if let Err(error) = collapse(guest, HUGE_PAGES) {
        return eprintln!("skipped, because this kernel makes no huge pages of a memfd: {error}");
    }
    let pages = [600, 601, 1200];
    let mut missing = DirtyBitmap::new(memory.layout());
    for page in pages {
        missing.set(0, page);
    }
    source.begin(&missing).unwrap();
    for page in pages {
        let (seen, told) = (Arc::clone(&memory), Arc::clone(&source));
        let reader = thread::spawn(move || {
            let read = (read(&seen, 0, page - 5, 0), read(&seen, 0, page, 0));
            told.wake();
            read
        });
        let mut faults = Vec::new();
        while faults.is_empty() {
            // The other page is there, but in no page table: the source sees to that itself.
            source.next(&mut faults, LONG).unwrap();
            assert!(!faults.is_empty() || !reader.is_finished(), "page {page} was seen");
        }
        assert_eq!((faults[0].region, faults[0].page), (0, page));
        write(source.landing(), 0, page, 0..WORDS, 77);
        // As the kernel does by itself, sooner or later.
        let (refused, made) = (collapse(guest, HUGE_PAGES), collapse(beside, HUGE_PAGES));
        eprintln!("the guest's: {refused:?}, the file's: {made:?}");
        source.resolve(PageRange { region: 0, first_page: page, pages: 1 }).unwrap();
        assert_eq!(reader.join().unwrap(), (expected(0, page - 5), 77));
    }
    source.end().unwrap();
}

#[test]
fn what_is_missing_for_good_is_never_seen() {
    let memory = described(vec![(0, anonymous(MIB))]);
    let Some(first) = source(&memory) else { return };
    let mut missing = DirtyBitmap::new(memory.layout());
    missing.set(0, 9);
    write(&memory, 0, 8, 0..WORDS, 8);
    first.begin(&missing).unwrap();
    drop(first);
    // Who waits still waits: nobody else gets the memory.
    let error = UffdFaults::new(Arc::clone(&memory)).unwrap_err();
    assert!(error.to_string().contains("another userfaultfd has it"), "{error}");
    assert_eq!(read(&memory, 0, 8, 0), 8);
}

#[test]
fn what_is_asked_wrongly_is_refused() {
    let memory = described(vec![(0, anonymous(MIB))]);
    let Some(source) = source(&memory) else { return };
    let cause = |error: pageferry::faults::FaultError| error.cause.to_string();
    let other = DirtyBitmap::new(described(vec![(0, anonymous(2 * MIB))]).layout());
    assert!(cause(source.begin(&other).unwrap_err()).contains("another memory map"));
    let nothing = DirtyBitmap::new(memory.layout());
    source.begin(&nothing).unwrap();
    assert!(cause(source.begin(&nothing).unwrap_err()).contains("begins once"));
    let outside = PageRange { region: 0, first_page: 255, pages: 2 };
    source.resolve(outside).unwrap_err();
    source.resolve(PageRange { region: 1, ..outside }).unwrap_err();
    source.wake();
    let mut faults = Vec::new();
    source.next(&mut faults, Duration::MAX).unwrap();
    assert!(faults.is_empty());
    source.end().unwrap();
}

/// A file on a disk has no faults to tell of.
#[test]
fn other_files_are_refused_before_anything_begins() {
    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.set_len(MIB).unwrap();
    let region = MmapRegion::from_file(FileOffset::new(file, 0), 1 << 20).unwrap();
    match UffdFaults::new(described(vec![(0, region)])) {
        Err(UffdFaultsError::Register { guest_addr: 0, .. }) => {}
        Err(UffdFaultsError::NotPermitted(_) | UffdFaultsError::FeatureMissing { .. }) => {
            eprintln!("skipped, because pages cannot be missing here");
        }
        other => panic!("{other:?}"),
    }
}
