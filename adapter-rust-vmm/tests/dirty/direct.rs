//! Reads of a file with `O_DIRECT` into guest memory: what is lost where a harvest falls into one, and
//! that nothing is with `DirectWrites`.
#![expect(unsafe_code, reason = "system calls on guest memory, and slots for KVM")]

mod process;

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;

use crate::guest::{Guest, Rings};
use crate::suite::{self, Bench, Writer, copy_page};
use crate::threads::Threads;
use pageferry::dirty::{DirtyBitmap, DirtySource, DirtySources};
use pageferry::memory::{GuestMemory, PAGE_BYTES, PageRange};
use pageferry_rust_vmm::foreign::{Pulsed, Standstill};
use pageferry_rust_vmm::{
    AtomicBitmapSource, DirectWrites, KvmDirtyLog, KvmDirtyRing, PagemapScan, UffdWp, guest_memory,
};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of a page.
const BYTES: usize = 4096;

/// Bytes of a read.
const READ_BYTES: usize = 1 << 20;
const READ_PAGES: u32 = 256;

/// Contents to read: more than one, so that each read changes every page.
const CONTENTS: u64 = 3;

/// Reads into which harvests fall, with the source of the VMM's.
const READS: u64 = 50;

/// Reads until one page must have been lost without it.
const TRIES: u64 = 500;

/// A file that is read around the kernel's cache.
struct Disk(File);

impl Disk {
    /// Where this build's files are. `None`, said loudly, if that file system copies.
    fn new(name: &str) -> Option<Self> {
        let name = format!("{name}-{}", std::process::id());
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        let mut written = File::create(&path).unwrap();
        for content in 0..CONTENTS {
            for page in 0..u64::from(READ_PAGES) {
                let word = (content << 32 | page) + 1;
                written.write_all(&word.to_ne_bytes().repeat(512)).unwrap();
            }
        }
        written.sync_all().unwrap();
        let tmpfs = rustix::fs::fstatfs(&written).unwrap().f_type == libc::TMPFS_MAGIC;
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path);
        std::fs::remove_file(&path).unwrap();
        match opened {
            Ok(file) if !tmpfs => Some(Self(file)),
            other => {
                let why = other.err().map_or("tmpfs copies".to_owned(), |error| error.to_string());
                eprintln!("skipped, because there is no O_DIRECT in {}: {why}", path.display());
                None
            }
        }
    }

    /// Reads one of the contents to `page` of region 0 and those behind it.
    fn read(&self, memory: &GuestMemory, page: u64, number: u64) {
        let range = PageRange { region: 0, first_page: page, pages: READ_PAGES };
        let span = memory.span(range).unwrap();
        let offset = i64::try_from(number % CONTENTS * READ_BYTES as u64).unwrap();
        // SAFETY: the span is guest memory of that length, mapped as long as `memory`.
        let read =
            unsafe { libc::pread(self.0.as_raw_fd(), span.addr.cast(), span.len_bytes, offset) };
        let error = std::io::Error::last_os_error();
        assert_eq!(usize::try_from(read), Ok(READ_BYTES), "{error}");
    }
}

/// Harvests, re-arms and copies what was found: a round of a migration.
fn round(memory: &GuestMemory, sources: &DirtySources, shadow: &mut [u8]) {
    let mut found = DirtyBitmap::new(memory.layout());
    sources.harvest(&mut found).unwrap();
    sources.rearm(0, 0, found.region_words(0)).unwrap();
    for (page, shadow) in (0..).zip(shadow.as_chunks_mut::<BYTES>().0) {
        if found.get(0, page) {
            copy_page(memory, PageRange { region: 0, first_page: page, pages: 1 }, shadow);
        }
    }
}

/// Pages of a memory of one read that are not what was written to them last, after up to so many reads
/// with rounds back to back; the first read that loses some is the last.
fn lost_in(reads: u64, memory: &GuestMemory, sources: &DirtySources, read: impl Fn(u64)) -> usize {
    let mut shadow = vec![0; READ_BYTES];
    let mut now = vec![0; READ_BYTES];
    sources.start().unwrap();
    round(memory, sources, &mut shadow);
    let mut lost = 0;
    for number in 0..reads {
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            let (begun_in, begun) = mpsc::sync_channel(1);
            let (ended, shadow) = (&ended, &mut shadow);
            scope.spawn(move || {
                while !ended.load(Ordering::Acquire) {
                    round(memory, sources, shadow);
                    let _ = begun_in.try_send(());
                }
            });
            begun.recv().unwrap();
            read(number);
            ended.store(true, Ordering::Release);
        });
        // Nothing is under way: the last round.
        round(memory, sources, &mut shadow);
        for (page, now) in (0..).zip(now.as_chunks_mut::<BYTES>().0) {
            copy_page(memory, PageRange { region: 0, first_page: page, pages: 1 }, now);
        }
        let pages = |bytes: &[u8]| bytes.as_chunks::<BYTES>().0.to_vec();
        lost = pages(&now).iter().zip(pages(&shadow)).filter(|(now, then)| *now != then).count();
        if lost > 0 {
            eprintln!("  {sources:?}: {lost} of {READ_PAGES} pages of read {number} are old");
            break;
        }
    }
    sources.stop().unwrap();
    lost
}

/// Without `DirectWrites` pages are lost, with it none.
fn is_needed_and_enough(
    memory: &GuestMemory,
    tracker: impl Fn() -> Box<dyn DirtySource>,
    read: impl Fn(u64),
) {
    let alone = DirtySources::new(vec![tracker()]);
    let lost = lost_in(TRIES, memory, &alone, &read);
    assert!(lost > 0, "the tracker sees such writes by itself, after all: say so");
    drop(alone);
    let direct = DirectWrites::new(memory);
    let both = DirtySources::new(vec![tracker(), Box::new(direct.clone())]);
    let lost = lost_in(READS, memory, &both, |number| {
        let guest_addr = memory.layout().regions()[0].guest_addr;
        let _write = direct.begin(guest_addr, READ_BYTES as u64).unwrap();
        read(number);
    });
    assert_eq!(lost, 0);
}

fn anonymous(bytes: usize) -> Arc<GuestMemory> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
    Arc::new(guest_memory(Arc::new(memory)).unwrap())
}

#[test]
fn beside_pagemap_scan() {
    if let Err(error) = PagemapScan::supported() {
        return eprintln!("skipped, because pages cannot be tracked here: {error}");
    }
    let Some(disk) = Disk::new("pagemap") else { return };
    let memory = anonymous(READ_BYTES);
    let tracker = || -> Box<dyn DirtySource> { Box::new(PagemapScan::new(Arc::clone(&memory))) };
    is_needed_and_enough(&memory, tracker, |number| disk.read(&memory, 0, number));
}

/// Either reads are under way, or it is looked at what they wrote: a guest that stands still meanwhile.
#[derive(Default)]
struct Turns {
    taken: Mutex<bool>,
    free: Condvar,
}

impl Standstill for Turns {
    fn hold(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let taken = self.taken.lock().unwrap();
        *self.free.wait_while(taken, |taken| *taken).unwrap() = true;
        Ok(())
    }

    fn let_go(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        *self.taken.lock().unwrap() = false;
        self.free.notify_all();
        Ok(())
    }
}

/// What `beside_pagemap_scan` shows to be lost is not where nobody looks while it is under way.
#[test]
fn in_pulses_nothing_is_lost() {
    if let Err(error) = PagemapScan::supported() {
        return eprintln!("skipped, because pages cannot be tracked here: {error}");
    }
    let Some(disk) = Disk::new("pulses") else { return };
    let memory = anonymous(READ_BYTES);
    let turns = Arc::new(Turns::default());
    let tracker = Pulsed::by(PagemapScan::new(Arc::clone(&memory)), Arc::clone(&turns) as _);
    let lost = lost_in(READS, &memory, &DirtySources::new(vec![Box::new(tracker)]), |number| {
        turns.hold().unwrap();
        disk.read(&memory, 0, number);
        turns.let_go().unwrap();
    });
    assert_eq!(lost, 0);
}

/// Who did not stand still is not looked at, and is let go.
#[test]
fn who_does_not_stand_still_is_let_go() {
    #[derive(Default)]
    struct Restless(Mutex<Vec<&'static str>>);
    impl Standstill for Restless {
        fn hold(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            self.0.lock().unwrap().push("hold");
            Err("no".into())
        }
        fn let_go(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            self.0.lock().unwrap().push("let go");
            Ok(())
        }
    }
    let memory = anonymous(READ_BYTES);
    let restless = Arc::new(Restless::default());
    let direct = DirectWrites::new(&memory);
    let source = Pulsed::by(direct.clone(), Arc::clone(&restless) as _);
    let refused = source.start().unwrap_err();
    assert!(refused.cause.to_string().contains("make the guest stand still"), "{refused}");
    direct.start().expect("it was not started");
    source.harvest(&mut DirtyBitmap::new(memory.layout())).unwrap_err();
    assert_eq!(*restless.0.lock().unwrap(), ["hold", "let go", "hold", "let go"]);
}

/// It pins many pages before it copies to the first.
#[test]
fn beside_pagemap_scan_with_writes_by_process_vm_writev() {
    if let Err(error) = PagemapScan::supported() {
        return eprintln!("skipped, because pages cannot be tracked here: {error}");
    }
    let memory = anonymous(READ_BYTES);
    let tracker = || -> Box<dyn DirtySource> { Box::new(PagemapScan::new(Arc::clone(&memory))) };
    is_needed_and_enough(&memory, tracker, |number| {
        let span = memory.span(PageRange { region: 0, first_page: 0, pages: READ_PAGES }).unwrap();
        let mut bytes = (number + 1).to_ne_bytes().repeat(READ_BYTES / 8);
        let from = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: READ_BYTES };
        let to = libc::iovec { iov_base: span.addr.cast(), iov_len: READ_BYTES };
        let process = libc::pid_t::try_from(std::process::id()).unwrap();
        // SAFETY: reads `bytes`, and writes to guest memory of that length, which is this process's.
        let written =
            unsafe { libc::process_vm_writev(process, &raw const from, 1, &raw const to, 1, 0) };
        let error = std::io::Error::last_os_error();
        assert_eq!(usize::try_from(written), Ok(READ_BYTES), "{error}");
    });
}

/// That the first write to each page is waited for does not help: it is that of giving the page away.
#[test]
fn beside_uffd_wp() {
    if let Err(error) = UffdWp::supported() {
        return eprintln!("skipped, because pages cannot be tracked here: {error}");
    }
    let Some(disk) = Disk::new("uffd-wp") else { return };
    let memory = anonymous(READ_BYTES);
    let tracker = || -> Box<dyn DirtySource> { Box::new(UffdWp::new(Arc::clone(&memory))) };
    is_needed_and_enough(&memory, tracker, |number| disk.read(&memory, 0, number));
}

fn guest(rings: Option<Rings>) -> Option<Guest> {
    let range = PageRange { region: 0, first_page: 0, pages: READ_PAGES };
    let slots = [(0, 0, u64::from(READ_PAGES))];
    Guest::with_rings(&[(0, READ_BYTES)], &slots, vec![range], rings)
}

#[test]
fn beside_kvm_dirty_log() {
    let (Some(guest), Some(disk)) = (guest(None), Disk::new("kvm-log")) else { return };
    let tracker = || -> Box<dyn DirtySource> {
        let vm = Arc::clone(&guest.vm);
        // SAFETY: these are the guest's slots, and stay so.
        Box::new(unsafe { KvmDirtyLog::new(vm, &guest.memory, &guest.slots) }.unwrap())
    };
    is_needed_and_enough(&guest.memory, tracker, |number| disk.read(&guest.memory, 0, number));
}

#[test]
fn beside_kvm_dirty_ring() {
    let rings = Some(Rings { entries: 4096, pausing: true });
    let (Some(guest), Some(disk)) = (guest(rings), Disk::new("kvm-ring")) else { return };
    let rings = guest.rings.as_ref().unwrap();
    let tracker = || -> Box<dyn DirtySource> {
        // SAFETY: these are the guest's slots, and stay so.
        Box::new(unsafe { KvmDirtyRing::new(rings, &guest.memory, &guest.slots) }.unwrap())
    };
    is_needed_and_enough(&guest.memory, tracker, |number| disk.read(&guest.memory, 0, number));
}

/// vm-memory sets bits after a read, so its own reads are seen with `O_DIRECT` too.
#[test]
fn vm_memorys_own_reads_need_no_telling() {
    let Some(disk) = Disk::new("bitmap") else { return };
    let regions = [(GuestAddress(0), READ_BYTES)];
    let ram = Arc::new(GuestMemoryMmap::<AtomicBitmap>::from_ranges(&regions).unwrap());
    let memory = guest_memory(Arc::clone(&ram)).unwrap();
    let source = AtomicBitmapSource::new(Arc::clone(&ram), &memory).unwrap();
    let sources = DirtySources::new(vec![Box::new(source)]);
    let lost = lost_in(READS, &memory, &sources, |number| {
        let mut file = &disk.0;
        file.seek(SeekFrom::Start(number % CONTENTS * READ_BYTES as u64)).unwrap();
        ram.read_exact_volatile_from(GuestAddress(0), &mut file, READ_BYTES).unwrap();
    });
    assert_eq!(lost, 0);
}

/// Writes as a device does that is asked by the VMM.
struct Told<'m> {
    memory: &'m GuestMemory,
    direct: &'m DirectWrites,
    ranges: Vec<PageRange>,
}

impl Writer for Told<'_> {
    fn ranges(&self) -> Vec<PageRange> {
        self.ranges.clone()
    }

    fn touch(&self, range: PageRange) {
        let region = self.memory.layout().regions()[usize::from(range.region)];
        let guest_addr = region.guest_addr + range.first_page * PAGE_BYTES;
        let _write = self.direct.begin(guest_addr, range.len_bytes()).unwrap();
        Threads { memory: self.memory, ranges: vec![range] }.touch(range);
    }

    fn hammer(&self, stop: &AtomicBool) {
        loop {
            self.ranges.iter().for_each(|range| self.touch(*range));
            if stop.load(Ordering::Relaxed) {
                return;
            }
        }
    }
}

#[test]
fn direct_writes_are_a_dirty_source() {
    let regions = [(GuestAddress(0), 4 << 20), (GuestAddress(1 << 32), (1 << 20) + (5 << 12))];
    let memory = GuestMemoryMmap::<()>::from_ranges(&regions).unwrap();
    let memory = guest_memory(Arc::new(memory)).unwrap();
    let direct = DirectWrites::new(&memory);
    let range = |region, pages| PageRange { region, first_page: 3, pages };
    let writer =
        Told { memory: &memory, direct: &direct, ranges: vec![range(0, 1019), range(1, 250)] };
    suite::passes_all(&Bench {
        memory: &memory,
        source: &direct,
        writer: &writer,
        granule_pages: 1,
    });
}
