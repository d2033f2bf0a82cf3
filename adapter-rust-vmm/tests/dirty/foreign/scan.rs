//! What another process writes, by `ForeignPagemapScan`, and what it notices of that.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use pageferry::dirty::{DirtyBitmap, DirtySource};
use pageferry::memory::PageRange;
use pageferry_rust_vmm::foreign::ForeignError;
use pageferry_rust_vmm::{
    ForeignPagemapScan, ForeignProcess, ForeignUserfaultfd, PagemapScan, guest_memory,
};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, MmapRegion};

use super::other::{MIB, Other, REGIONS, memfd, memory_of};
use crate::suite::{self, Bench, Writer};

/// Says so if another process cannot be scanned here.
fn can_scan() -> bool {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    if matches!(scope.trim(), "2" | "3") && !rustix::process::geteuid().is_root() {
        eprintln!(
            "skipped, because kernel.yama.ptrace_scope is {} and this is not root",
            scope.trim()
        );
        return false;
    }
    let supported = PagemapScan::supported();
    if let Err(error) = &supported {
        eprintln!("skipped, because pages cannot be tracked here: {error}");
    }
    supported.is_ok()
}

#[test]
fn passes_all() {
    if !can_scan() {
        return;
    }
    let other = Other::start();
    let source = other.scan().unwrap();
    let memory = &other.memory;
    suite::passes_all(&Bench { memory, source: &source, writer: &other, granule_pages: 1 });
}

#[test]
fn what_reads_guest_memory_here_is_not_reported() {
    if !can_scan() {
        return;
    }
    let other = Other::start();
    let source = other.scan().unwrap();
    source.start().unwrap();
    let pages = other.memory.layout().regions()[0].pages();
    assert_eq!((0..pages).filter(|page| !other.memory.is_zero(0, *page).unwrap()).count(), 1);
    let mut found = DirtyBitmap::new(other.memory.layout());
    source.harvest(&mut found).unwrap();
    assert_eq!(found.count(), 0);
}

/// A thread that is borrowed in the middle of a wait waits on, whichever way the kernel has of making it again.
#[test]
fn waits_are_not_interrupted_by_being_borrowed() {
    if !can_scan() {
        return;
    }
    let other = Other::start();
    let process = other.process();
    let before = other.descriptors();
    for wait in ["sleep", "poll", "futex"] {
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| other.tell(&format!("{wait} 60")));
            let mut borrowed = 0;
            while !waiting.is_finished() {
                ForeignUserfaultfd::made_in(&process).unwrap();
                borrowed += 1;
            }
            eprintln!("{wait}: borrowed {borrowed} times");
            assert_eq!(waiting.join().unwrap(), 0, "waits by {wait} were interrupted");
        });
    }
    assert_eq!(other.descriptors(), before);
}

/// Signals that come while its only thread is borrowed arrive, each of them, with what it brings.
#[test]
fn signals_arrive_all_the_same() {
    const TIMES: u32 = 200;
    if !can_scan() {
        return;
    }
    let other = Other::start();
    other.tell("count");
    let process = other.process();
    let (sent, over) = (AtomicU32::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                // Real-time signals are queued, so that each counts.
                other.queue_signal(sent.fetch_add(1, Ordering::Relaxed) + 1);
                std::thread::yield_now();
            }
        });
        let mut borrowed = 0;
        while borrowed < TIMES || sent.load(Ordering::Relaxed) < TIMES {
            ForeignUserfaultfd::made_in(&process).unwrap();
            borrowed += 1;
        }
        over.store(true, Ordering::Relaxed);
        eprintln!("borrowed {borrowed} times");
    });
    let sent = sent.into_inner();
    eprintln!("{sent} signals");
    assert_eq!(other.tell("counted"), (1..=sent).fold(0, u32::wrapping_add));
}

/// A process that somebody has stopped is stopped afterwards, and goes on when it is told to.
#[test]
fn a_process_that_is_stopped_stays_so() {
    if !can_scan() {
        return;
    }
    let other = Other::start();
    other.signal(libc::SIGSTOP);
    assert!(other.stops());
    let source = other.scan().unwrap();
    source.start().unwrap();
    // Who lets it go leaves it to stop by itself: for a moment it runs, in the kernel.
    assert!(other.stops());
    other.signal(libc::SIGCONT);
    other.touch(PageRange { region: 0, first_page: 9, pages: 1 });
    let mut found = DirtyBitmap::new(other.memory.layout());
    source.harvest(&mut found).unwrap();
    assert!(found.get(0, 9) && found.count() == 1);
}

/// Nor is a stop lost that comes while its thread is borrowed.
#[test]
fn a_process_that_is_stopped_meanwhile_stops() {
    if !can_scan() {
        return;
    }
    let other = Other::start();
    let process = other.process();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let borrowing = scope.spawn(|| {
            let mut borrowed = 0;
            while !over.load(Ordering::Relaxed) {
                ForeignUserfaultfd::made_in(&process).unwrap();
                borrowed += 1;
            }
            borrowed
        });
        for stopped in 0..200 {
            other.signal(libc::SIGSTOP);
            if !other.stops() {
                over.store(true, Ordering::Relaxed);
                panic!("it was stopped {stopped} times, and then not");
            }
            other.signal(libc::SIGCONT);
        }
        over.store(true, Ordering::Relaxed);
        eprintln!("borrowed {} times", borrowing.join().unwrap());
    });
    other.touch(PageRange { region: 0, first_page: 9, pages: 1 });
}

#[test]
fn who_may_have_no_userfaultfd_is_named() {
    if !can_scan() {
        return;
    }
    let other = Other::start();
    other.tell("forbid");
    let refused = other.scan().unwrap_err();
    assert!(matches!(refused, ForeignError::Userfaultfd { .. }), "{refused}");
    // It goes on.
    other.touch(PageRange { region: 0, first_page: 9, pages: 1 });
}

/// A shell that does nothing but count makes no system call.
#[test]
fn who_makes_no_system_call_is_not_borrowed() {
    if !can_scan() {
        return;
    }
    let mut busy = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
    let process = ForeignProcess::open(busy.id()).unwrap();
    // Until the shell has begun.
    let refused = loop {
        match ForeignUserfaultfd::made_in(&process) {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    busy.kill().unwrap();
    busy.wait().unwrap();
    assert!(matches!(refused, ForeignError::Busy { .. }), "{refused}");
}

#[test]
fn a_process_that_has_ended_is_not_taken_for_a_quiet_one() {
    if !can_scan() {
        return;
    }
    let mut other = Other::start();
    let source = other.scan().unwrap();
    source.start().unwrap();
    other.child.kill().unwrap();
    other.child.wait().unwrap();
    let mut found = DirtyBitmap::new(other.memory.layout());
    let error = source.harvest(&mut found).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(cause, format!("process {} has ended", other.child.id()));
    source.stop().unwrap();
    let error = ForeignProcess::open(other.child.id()).unwrap_err();
    assert!(matches!(error, ForeignError::Open { .. }), "{error}");
}

#[test]
fn memory_that_the_process_has_not_is_refused() {
    let other = Other::start();
    let elsewhere = memory_of(&memfd(8 * MIB), &REGIONS);
    let made = |_: &ForeignProcess| -> Result<ForeignUserfaultfd, ForeignError> {
        panic!("it is not to be touched for that")
    };
    let refused = ForeignPagemapScan::new(other.process(), &elsewhere, made).unwrap_err();
    assert!(
        matches!(&refused, ForeignError::NotMapped { guest_addr: 0, missing, .. } if *missing == (0..1024)),
        "{refused}"
    );
    // Its own memory, which is in no file.
    let anonymous = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let anonymous = guest_memory(Arc::new(anonymous)).unwrap();
    let refused = ForeignPagemapScan::new(other.process(), &anonymous, made).unwrap_err();
    assert!(matches!(refused, ForeignError::NoFile { guest_addr: 0 }), "{refused}");
}

/// A process that has mapped its memory so that what it writes is in the file for nobody else.
#[test]
fn memory_that_is_mapped_privately_is_refused() {
    let file = memfd(8 * MIB);
    let memory = memory_of(&file, &REGIONS);
    let private = MmapRegion::<()>::build(
        Some(FileOffset::new(file.try_clone().unwrap(), 0)),
        8 << 20,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE,
    );
    let _private = private.unwrap();
    // This process has it both ways, and it is the private one that is not seen.
    let this = ForeignProcess::open(std::process::id()).unwrap();
    let refused = ForeignPagemapScan::new(this, &memory, |_| unreachable!()).unwrap_err();
    assert!(matches!(refused, ForeignError::Private { guest_addr: 0, .. }), "{refused}");
}

#[test]
fn what_another_process_has_touched_is_told() {
    let other = Other::start();
    let touched = || {
        let ranges = other.process().touched(&other.memory).unwrap();
        move |region, page| {
            let has = |range: &PageRange| {
                let pages = range.first_page..range.first_page + u64::from(range.pages);
                range.region == region && pages.contains(&page)
            };
            ranges.iter().any(has)
        }
    };
    let before = touched();
    assert!(before(0, 3) && !before(0, 500) && !before(1, 100));
    other.touch(PageRange { region: 0, first_page: 500, pages: 4 });
    other.touch(PageRange { region: 1, first_page: 100, pages: 1 });
    let after = touched();
    assert!((500..504).all(|page| after(0, page)) && after(1, 100));
    assert!(!after(0, 900) && !after(1, 200));
}
