//! Holes of memory in huge pages: they are known without being allocated.
#![expect(unsafe_code, reason = "another mapping of the same file")]

use std::fs::File;
use std::sync::Arc;

use pageferry::memory::PAGE_BYTES;
use pageferry_rust_vmm::guest_memory;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

const HUGE_BYTES: u64 = 2 << 20;
const HUGE_PAGES: u64 = 8;
/// Pages in one.
const PAGES: u64 = HUGE_BYTES / PAGE_BYTES;

/// Those that nobody has.
fn free() -> u64 {
    let counter = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free = std::fs::read_to_string(counter).ok();
    free.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

#[test]
fn of_huge_pages_are_known_and_stay_holes() {
    let before = free();
    if before < HUGE_PAGES {
        return eprintln!(
            "skipped, because {before} huge pages of 2 MiB are free and {HUGE_PAGES} are needed"
        );
    }
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = File::from(memfd_create("holes", flags).unwrap());
    let len = usize::try_from(HUGE_PAGES * HUGE_BYTES).unwrap();
    ftruncate(&file, HUGE_PAGES * HUGE_BYTES).unwrap();
    let file = Arc::new(file);
    let region = MmapRegionBuilder::<()>::new_with_bitmap(len, ())
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED)
        .with_hugetlbfs(true)
        .with_file_offset(FileOffset::from_arc(Arc::clone(&file), 0))
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    let ram = Arc::new(GuestMemoryMmap::from_regions(vec![region]).unwrap());
    let memory = guest_memory(Arc::clone(&ram)).unwrap();

    // The guest writes one page, and a device by a mapping of its own another, and reads a third.
    ram.write_obj(7_u64, GuestAddress(2 * HUGE_BYTES + 5 * PAGE_BYTES)).unwrap();
    let (read_write, shared) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    // SAFETY: a mapping of its own of that file.
    let other = unsafe { mmap(std::ptr::null_mut(), len, read_write, shared, &*file, 0) }.unwrap();
    let at = |huge: u64| other.wrapping_byte_add(usize::try_from(huge * HUGE_BYTES).unwrap());
    // SAFETY: inside that mapping.
    unsafe { at(5).cast::<u64>().write_volatile(7) };
    // SAFETY: likewise.
    assert_eq!(unsafe { at(6).cast::<u64>().read_volatile() }, 0);
    let used = free();

    let data = |from| memory.next_data(0, from, HUGE_PAGES * PAGES);
    assert_eq!(data(0), Some(2 * PAGES..3 * PAGES));
    assert_eq!(data(2 * PAGES + 100), Some(2 * PAGES + 100..3 * PAGES));
    // What was only read is zero, wherever it is.
    assert_eq!(data(3 * PAGES), Some(5 * PAGES..6 * PAGES));
    assert_eq!(data(6 * PAGES), None);
    assert_eq!(memory.next_data(0, 0, 2 * PAGES + 1), Some(2 * PAGES..2 * PAGES + 1));
    assert_eq!(free(), used, "asking has allocated some");
    // SAFETY: nothing uses it any more.
    unsafe { munmap(other, len) }.unwrap();
}
