//! Guest memory for tests: anonymous or of memfds, all zero at first.
#![expect(unsafe_code, reason = "describes its own mappings by raw parts")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use memmap2::MmapRaw;
use rustix::fs::{MemfdFlags, memfd_create};

use super::Random;
use crate::pages::memory::{
    FileBacking, GuestMemory, Layout, PAGE_BYTES, PageRange, RawRegion, RegionLayout,
};

fn layout(region_pages: &[u64]) -> Layout {
    let mut guest_addr = 0;
    let regions = region_pages.iter().map(|pages| {
        let len_bytes = pages * PAGE_BYTES;
        let region = RegionLayout { guest_addr, len_bytes, backing_page_bytes: PAGE_BYTES };
        guest_addr += len_bytes + (1 << 30);
        region
    });
    Layout::new(regions.collect()).expect("a test's layout makes sense")
}

fn len(region: &RegionLayout) -> usize {
    usize::try_from(region.len_bytes).expect("fits into the address space")
}

/// Guest memory that a test owns.
#[derive(Debug, Clone)]
pub struct TestMemory {
    memory: Arc<GuestMemory>,
    files: Arc<Vec<File>>,
}

impl TestMemory {
    /// Anonymous regions of so many pages each, with gaps between them in guest addresses.
    ///
    /// # Panics
    ///
    /// If the machine gives no memory or the layout makes no sense; so do the other
    /// constructors.
    pub fn new(region_pages: &[u64]) -> Self {
        Self::with_layout(&layout(region_pages))
    }

    /// Anonymous memory of a given layout.
    pub fn with_layout(layout: &Layout) -> Self {
        let map = |region: &RegionLayout| {
            let mapping = memmap2::MmapMut::map_anon(len(region)).expect("memory for a test");
            (mapping.into(), None)
        };
        Self::of_mappings(layout, layout.regions().iter().map(map).collect())
    }

    /// As [`new`](Self::new), each region a shared mapping of a memfd.
    pub fn of_memfds(region_pages: &[u64]) -> Self {
        let layout = layout(region_pages);
        let map = |region: &RegionLayout| {
            let fd = memfd_create("test memory", MemfdFlags::CLOEXEC).expect("a memfd");
            let file = File::from(fd);
            file.set_len(region.len_bytes).expect("memory for a test");
            let options = memmap2::MmapOptions::new().len(len(region)).to_owned();
            (options.map_raw(&file).expect("a mapping of the memfd"), Some(file))
        };
        Self::of_mappings(&layout, layout.regions().iter().map(map).collect())
    }

    fn of_mappings(layout: &Layout, mappings: Vec<(MmapRaw, Option<File>)>) -> Self {
        let regions = layout
            .regions()
            .iter()
            .zip(&mappings)
            .map(|(layout, (mapping, file))| RawRegion {
                layout: *layout,
                host_addr: mapping.as_mut_ptr(),
                file: file
                    .as_ref()
                    .map(|file| FileBacking { fd: file.as_raw_fd(), offset_bytes: 0 }),
            })
            .collect();
        let (mappings, files): (Vec<_>, Vec<_>) = mappings.into_iter().unzip();
        let files = Arc::new(files.into_iter().flatten().collect::<Vec<File>>());
        let owner = Box::new((mappings, Arc::clone(&files)));
        // SAFETY: the mappings are as long as the regions, readable and writable, owned by the
        // value as `owner` together with their files, which nobody truncates; and nobody makes
        // references into a MmapRaw.
        let memory = unsafe { GuestMemory::from_raw_parts(regions, Some(owner)) };
        Self { memory: Arc::new(memory.expect("the layout was checked")), files }
    }

    /// To hand to the engine or a transport.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Bytes that the memfds have allocated: what was ever touched.
    ///
    /// # Panics
    ///
    /// If the machine does not tell.
    pub fn allocated_bytes(&self) -> u64 {
        let blocks = |file: &File| file.metadata().expect("a memfd has metadata").blocks();
        // stat(2) counts in units of 512 bytes.
        self.files.iter().map(|file| blocks(file) * 512).sum()
    }

    /// Fills a page with bytes that depend on `seed`, none of them a run of zeros.
    ///
    /// # Panics
    ///
    /// If the page is not in the memory; so do the other methods.
    pub fn fill_page(&self, region: u16, page: u64, seed: u64) {
        let mut random = Random::new(seed ^ (page << 20) ^ (u64::from(region) << 60));
        let words = PAGE_BYTES / 8;
        let bytes: Vec<u8> =
            (0..words).flat_map(|_| (random.next_u64() | 1).to_le_bytes()).collect();
        self.write(region, page, &bytes);
    }

    /// Fills every page.
    pub fn fill(&self, seed: u64) {
        for (region, layout) in (0..).zip(self.memory.layout().regions()) {
            (0..layout.pages()).for_each(|page| self.fill_page(region, page, seed));
        }
    }

    /// Writes a whole page.
    pub fn write(&self, region: u16, page: u64, bytes: &[u8]) {
        let range = PageRange { region, first_page: page, pages: 1 };
        self.memory.copy_in(range, bytes).expect("a page of this memory");
    }

    /// The bytes of a page.
    pub fn read(&self, region: u16, page: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        let range = PageRange { region, first_page: page, pages: 1 };
        self.memory.copy_out(range, &mut bytes).expect("a page of this memory");
        bytes
    }

    /// The first page in which two memories of the same layout differ.
    pub fn first_difference(&self, other: &Self) -> Option<(u16, u64)> {
        (0..).zip(self.memory.layout().regions()).find_map(|(region, layout)| {
            (0..layout.pages())
                .find(|page| self.read(region, *page) != other.read(region, *page))
                .map(|page| (region, page))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::time::{Duration, Instant};

    use rustix::fs::{FallocateFlags, fallocate};

    use super::*;

    #[test]
    fn runs_of_data_are_found_between_holes() {
        let memory = TestMemory::of_memfds(&[12, 4]);
        for page in [3, 4, 9] {
            memory.fill_page(0, page, 1);
        }
        let next = |from, before| memory.memory().next_data(0, from, before);
        assert_eq!(next(0, 12), Some(3..5));
        assert_eq!(next(4, 12), Some(4..5));
        assert_eq!(next(5, 12), Some(9..10));
        assert_eq!(next(10, 12), None);
        // Nobody looks further than was asked, however long the run is.
        assert_eq!(next(0, 4), Some(3..4));
        assert_eq!(next(5, 9), None);
        assert_eq!(next(12, 99), None);
        assert_eq!(memory.memory().next_data(1, 0, 4), None);
        assert_eq!(memory.memory().next_data(2, 0, 4), None, "no such region");
        // Without a file everything may hold something.
        assert_eq!(TestMemory::new(&[12]).memory().next_data(0, 5, 6), Some(5..6));
    }

    #[test]
    fn what_others_wrote_to_the_file_is_data_and_what_was_punched_out_is_not() {
        let memory = TestMemory::of_memfds(&[3000]);
        let next = |from, before| memory.memory().next_data(0, from, before);
        // Through the file, so that no page of it is mapped here.
        let page = [7; 4096];
        (1000..2500).for_each(|at| memory.files[0].write_all_at(&page, at * 4096).unwrap());
        assert_eq!(next(0, 3000), Some(1000..2500));
        assert_eq!(next(1700, 1800), Some(1700..1800));
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&memory.files[0], hole, 1777 * 4096, 4096).unwrap();
        assert_eq!(next(1500, 3000), Some(1500..1777));
        assert_eq!(next(1777, 3000), Some(1778..2500));
        assert_eq!(memory.read(0, 2499), page);
        assert_eq!(next(1778, 3000), Some(1778..2500), "one of them is mapped now");
    }

    /// Not a test: what a sender takes to find out where there is data.
    /// `cargo test --release -p pageferry -- --ignored --nocapture measure`
    #[test]
    #[ignore = "prints times and checks nothing: ci/test measure"]
    fn measure_looking_for_data() {
        const PAGES: u64 = (2 << 30) / 4096;
        for every in [1, 2] {
            let memory = TestMemory::of_memfds(&[PAGES]);
            (0..PAGES).step_by(every).for_each(|page| memory.fill_page(0, page, 1));
            let (mut longest, started) = (Duration::ZERO, Instant::now());
            for stripe in (0..PAGES).step_by(512) {
                let asked = Instant::now();
                let mut page = stripe;
                while let Some(data) = memory.memory().next_data(0, page, stripe + 512) {
                    page = data.end;
                }
                longest = longest.max(asked.elapsed());
            }
            let took = started.elapsed();
            eprintln!(
                "2 GiB with data in 1 of {every} pages: {took:?}, {longest:?} a stripe at most"
            );
        }
    }
}
