//! Memory of `vm-memory`, as the engine sees it.

use std::sync::Arc;

use pageferry::memory::{LayoutError, PAGE_BYTES, PageRange};
use pageferry_rust_vmm::guest_memory;
use pageferry_rust_vmm::memory::MemoryError;
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestMemoryResult, GuestRegionMmap, GuestUsize, MemoryRegionAddress,
    VolatileSlice,
};

/// A region of a VMM's own, wrong in a way of choice.
struct Odd {
    inner: GuestRegionMmap,
    start: u64,
    host_address: bool,
    shifted: bool,
}

impl GuestMemoryRegion for Odd {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.inner.len()
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_host_address(&self, addr: MemoryRegionAddress) -> GuestMemoryResult<*mut u8> {
        if self.host_address {
            let shift = if self.shifted { PAGE_BYTES } else { 0 };
            self.inner.get_host_address(MemoryRegionAddress(addr.0 + shift))
        } else {
            Err(vm_memory::GuestMemoryError::HostAddressNotAvailable)
        }
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> GuestMemoryResult<VolatileSlice<'_, BS<'_, ()>>> {
        self.inner.get_slice(offset, count)
    }
}

impl GuestMemoryRegionBytes for Odd {}

/// The same region any number of times, in descending order.
struct OddMemory(Vec<Odd>);

impl GuestMemoryBackend for OddMemory {
    type R = Odd;

    fn iter(&self) -> impl Iterator<Item = &Odd> {
        self.0.iter()
    }
}

fn odd(start: u64) -> Odd {
    let inner = GuestRegionMmap::from_range(GuestAddress(0), 1 << 16, None).unwrap();
    Odd { inner, start, host_address: true, shifted: false }
}

#[test]
fn regions_are_described_as_they_are() {
    let ranges = [(GuestAddress(0x1000), 0x3000), (GuestAddress(1 << 32), 0x10_0000)];
    let memory: Arc<GuestMemoryMmap<AtomicBitmap>> =
        Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let engine = guest_memory(Arc::clone(&memory)).unwrap();
    assert_eq!(engine.layout().to_string(), "0x1000..0x4000, 0x100000000..0x100100000");
    assert!(engine.layout().regions().iter().all(|region| region.backing_page_bytes == PAGE_BYTES));
    assert!(engine.regions().iter().all(|region| region.file.is_none()));

    // Both see the same bytes, and the engine keeps the mapping alive.
    memory.write_obj(0x1234_5678_u32, GuestAddress(0x3000)).unwrap();
    drop(memory);
    let mut bytes = Vec::new();
    engine.copy_out(PageRange { region: 0, first_page: 2, pages: 1 }, &mut bytes).unwrap();
    assert_eq!(bytes[..4], 0x1234_5678_u32.to_ne_bytes());
}

#[test]
fn files_and_their_offsets_are_passed_on() {
    use std::os::fd::AsRawFd;
    use vm_memory::FileOffset;

    let path = std::env::temp_dir().join(format!("pageferry-memory-{}", std::process::id()));
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(0x8000).unwrap();
    let fd = file.as_raw_fd();
    let region = (GuestAddress(0), 0x4000, Some(FileOffset::new(file, 0x3000)));
    let memory = GuestMemoryMmap::<()>::from_ranges_with_files(&[region]).unwrap();
    let engine = guest_memory(Arc::new(memory)).unwrap();
    let backing = engine.regions()[0].file.unwrap();
    assert_eq!((backing.fd, backing.offset_bytes), (fd, 0x3000));
}

#[test]
fn a_vmms_own_regions_work_in_any_order() {
    let memory = OddMemory(vec![odd(1 << 20), odd(0)]);
    let engine = guest_memory(Arc::new(memory)).unwrap();
    assert_eq!(engine.layout().to_string(), "0x0..0x10000, 0x100000..0x110000");
}

#[test]
fn what_is_not_mapped_memory_is_refused() {
    let no_address = OddMemory(vec![Odd { host_address: false, ..odd(0x5000) }]);
    let error = guest_memory(Arc::new(no_address)).unwrap_err();
    assert!(matches!(error, MemoryError::NoHostAddress { guest_addr: 0x5000, .. }), "{error}");

    let shifted = OddMemory(vec![Odd { shifted: true, ..odd(0) }]);
    let error = guest_memory(Arc::new(shifted)).unwrap_err();
    assert!(matches!(error, MemoryError::NotMapped { guest_addr: 0, .. }), "{error}");

    let overlap = OddMemory(vec![odd(0), odd(0x1000)]);
    let error = guest_memory(Arc::new(overlap)).unwrap_err();
    assert!(matches!(error, MemoryError::Layout(LayoutError::Overlap { .. })), "{error}");

    let unaligned = OddMemory(vec![odd(0x10)]);
    let error = guest_memory(Arc::new(unaligned)).unwrap_err();
    assert!(matches!(error, MemoryError::Layout(LayoutError::BadRegion { .. })), "{error}");

    let empty = guest_memory(Arc::new(OddMemory(Vec::new()))).unwrap_err();
    assert!(matches!(empty, MemoryError::Layout(LayoutError::Empty)), "{empty}");
}

/// Two regions over one mapping: the engine would read and write each page twice.
#[test]
fn one_mapping_in_two_regions_is_refused() {
    struct Twice(GuestRegionMmap);
    struct View(Arc<Twice>, u64);
    struct Views(Vec<View>);

    impl GuestMemoryRegion for View {
        type B = ();
        fn len(&self) -> GuestUsize {
            self.0.0.len()
        }
        fn start_addr(&self) -> GuestAddress {
            GuestAddress(self.1)
        }
        fn bitmap(&self) -> BS<'_, ()> {}
        fn get_host_address(&self, addr: MemoryRegionAddress) -> GuestMemoryResult<*mut u8> {
            self.0.0.get_host_address(addr)
        }
        fn get_slice(
            &self,
            offset: MemoryRegionAddress,
            count: usize,
        ) -> GuestMemoryResult<VolatileSlice<'_, BS<'_, ()>>> {
            self.0.0.get_slice(offset, count)
        }
    }
    impl GuestMemoryRegionBytes for View {}
    impl GuestMemoryBackend for Views {
        type R = View;
        fn iter(&self) -> impl Iterator<Item = &View> {
            self.0.iter()
        }
    }

    let region = GuestRegionMmap::from_range(GuestAddress(0), 1 << 16, None).unwrap();
    let twice = Arc::new(Twice(region));
    let views = Views(vec![View(Arc::clone(&twice), 0), View(twice, 1 << 20)]);
    let error = guest_memory(Arc::new(views)).unwrap_err();
    assert!(matches!(error, MemoryError::HostOverlap { .. }), "{error}");
}
