//! What tracking costs, printed. Run with
//! `cargo test --release -p pageferry-rust-vmm --test dirty -- --ignored --nocapture --test-threads 1`.
#![expect(unsafe_code, reason = "KvmDirtyLog relies on the slots it is given")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::guest::{Guest, Rings};
use crate::suite::Writer;
use pageferry::dirty::{DirtyBitmap, DirtySource};
use pageferry::memory::{GuestMemory, PAGE_BYTES, PageRange};
use pageferry_rust_vmm::{
    AtomicBitmapSource, KvmDirtyLog, KvmDirtyRing, LogProtocol, PagemapScan, UffdWp, guest_memory,
};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const LEN_BYTES: usize = 512 << 20;
const PAGES: u32 = 131_072;
/// Words in 2 MiB of guest memory.
const STRIPE_WORDS: usize = 8;

fn timed<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let result = run();
    eprintln!("{what}: {:?}", begin.elapsed());
    result
}

/// Re-arms stripe by stripe, as senders do.
fn rearm(source: &dyn DirtySource, pages: &DirtyBitmap) {
    let mut spent = Duration::ZERO;
    let mut calls = 0;
    for (stripe, words) in (0..).zip(pages.region_words(0).chunks(STRIPE_WORDS)) {
        if words.iter().any(|word| *word != 0) {
            let begin = Instant::now();
            source.rearm(0, stripe * STRIPE_WORDS as u64 * 64, words).unwrap();
            spent += begin.elapsed();
            calls += 1;
        }
    }
    eprintln!("  re-arm, {calls} stripes of 2 MiB: {spent:?}, {:?} each", spent / calls.max(1));
}

fn harvest(what: &str, memory: &GuestMemory, source: &dyn DirtySource) -> DirtyBitmap {
    let mut found = DirtyBitmap::new(memory.layout());
    timed(what, || source.harvest(&mut found).unwrap());
    eprintln!("    {} pages", found.count());
    found
}

/// Clean, one page in eight, and all pages, with `write` as the writer.
fn measure(memory: &GuestMemory, source: &dyn DirtySource, write: impl Fn(PageRange)) {
    let all = PageRange { region: 0, first_page: 0, pages: PAGES };
    timed("  write all pages, untracked", || write(all));
    timed("  start", || source.start().unwrap());
    let found = harvest("  harvest after start", memory, source);
    rearm(source, &found);
    harvest("  harvest, clean", memory, source);
    timed("  write all pages, first time", || write(all));
    let found = harvest("  harvest, all dirty", memory, source);
    rearm(source, &found);
    timed("  write all pages, re-armed", || write(all));
    let found = harvest("  harvest, all dirty", memory, source);
    rearm(source, &found);
    for page in (0..u64::from(PAGES)).step_by(1024) {
        write(PageRange { region: 0, first_page: page, pages: 1 });
    }
    let found = harvest("  harvest, one page in 1024 dirty", memory, source);
    rearm(source, &found);
    timed("  stop", || source.stop().unwrap());
}

#[test]
#[ignore = "prints times and checks nothing: ci/test measure"]
fn kvm_dirty_log() {
    for protocol in
        [LogProtocol::ManualClearInitiallySet, LogProtocol::ManualClear, LogProtocol::GetClears]
    {
        for slots in [vec![(0, 0, u64::from(PAGES))], vec![(0, 0, 100), (0, 100, 130_972)]] {
            let all = PageRange { region: 0, first_page: 0, pages: PAGES };
            let Some(guest) = Guest::new(&[(0, LEN_BYTES)], &slots, vec![all]) else { return };
            let (vm, memory) = (Arc::clone(&guest.vm), &guest.memory);
            // SAFETY: these are the guest's slots, and stay so.
            let source = unsafe { KvmDirtyLog::with_protocol(vm, memory, &guest.slots, protocol) };
            eprintln!("kvm dirty log, {protocol:?}, {} slots, 512 MiB", guest.slots.len());
            measure(memory, &source.unwrap(), |range| guest.touch(range));
        }
    }
}

#[test]
#[ignore = "prints times and checks nothing: ci/test measure"]
fn kvm_dirty_ring() {
    // With a pause after each page, so that no ring runs over.
    for entries in [4096, 65_536] {
        let all = PageRange { region: 0, first_page: 0, pages: PAGES };
        let slots = [(0, 0, u64::from(PAGES))];
        let rings = Some(Rings { entries, pausing: true });
        let Some(guest) = Guest::with_rings(&[(0, LEN_BYTES)], &slots, vec![all], rings) else {
            return;
        };
        let rings = guest.rings.as_ref().unwrap();
        // SAFETY: these are the guest's slots, and stay so.
        let source = unsafe { KvmDirtyRing::new(rings, &guest.memory, &guest.slots) };
        eprintln!("kvm dirty ring, {entries} entries, 512 MiB");
        let source = source.unwrap();
        measure(&guest.memory, &source, |range| guest.touch(range));
        // As many as fit, so that one harvest takes them all.
        source.start().unwrap();
        guest.touch(PageRange { pages: entries - 1024, ..guest.ranges()[0] });
        harvest("  harvest of a ring that is nearly full", &guest.memory, &source);
        let (full, run_over) = (rings.times_full(), rings.times_run_over());
        eprintln!("  {full} times full, {run_over} run over");
    }
}

#[test]
#[ignore = "prints times and checks nothing: ci/test measure"]
fn vmm_bitmap() {
    let regions = [(GuestAddress(0), LEN_BYTES)];
    let memory = Arc::new(GuestMemoryMmap::<AtomicBitmap>::from_ranges(&regions).unwrap());
    let guest = guest_memory(Arc::clone(&memory)).unwrap();
    let source = AtomicBitmapSource::new(Arc::clone(&memory), &guest).unwrap();
    eprintln!("vmm bitmap, 512 MiB");
    measure(&guest, &source, |range| {
        for page in range.first_page..range.first_page + u64::from(range.pages) {
            memory.write_obj(1_u8, GuestAddress(page * PAGE_BYTES)).unwrap();
        }
    });
}

/// Sources over this process's memory.
fn over_process_memory(what: &str, source_of: fn(Arc<GuestMemory>) -> Box<dyn DirtySource>) {
    for huge in [false, true] {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), LEN_BYTES)]).unwrap();
        let memory = Arc::new(guest_memory(Arc::new(memory)).unwrap());
        if huge {
            let addr = memory.regions()[0].host_addr.cast();
            // SAFETY: advice on a mapping that lives; it changes no byte.
            assert_eq!(unsafe { libc::madvise(addr, LEN_BYTES, libc::MADV_HUGEPAGE) }, 0);
        }
        eprintln!("{what}, 512 MiB, transparent huge pages: {huge}");
        measure(&memory, source_of(Arc::clone(&memory)).as_ref(), |range| {
            let first = memory.span(range).unwrap().addr;
            for page in 0..range.pages as usize {
                // SAFETY: inside the range.
                let byte = unsafe { first.add(page * usize::try_from(PAGE_BYTES).unwrap()) };
                // SAFETY: mapped; nobody else accesses it.
                unsafe { byte.write_volatile(1) };
            }
        });
    }
}

#[test]
#[ignore = "prints times and checks nothing: ci/test measure"]
fn pagemap_scan() {
    over_process_memory("pagemap scan", |memory| Box::new(PagemapScan::new(memory)));
}

#[test]
#[ignore = "prints times and checks nothing: ci/test measure"]
fn uffd_wp() {
    over_process_memory("uffd write-protect", |memory| Box::new(UffdWp::new(memory)));
}
