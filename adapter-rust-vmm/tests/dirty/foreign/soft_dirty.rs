//! What another process writes, by `SoftDirty`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pageferry::dirty::{DirtyBitmap, DirtySource};
use pageferry::memory::PageRange;
use pageferry_rust_vmm::SoftDirty;
use pageferry_rust_vmm::foreign::{SoftDirtyError, Standstill};

use super::other::Other;
use crate::suite::{self, Bench, Writer};

/// Says so if this kernel has no soft-dirty bits.
fn has_soft_dirty() -> bool {
    let supported = SoftDirty::supported();
    if let Err(error) = &supported {
        assert!(matches!(error, SoftDirtyError::Unsupported), "{error}");
        eprintln!("skipped, because {error}");
    }
    supported.is_ok()
}

/// Has the other process stand still by keeping it from being told anything.
struct NotTold<'o>(&'o Other);

impl Standstill for NotTold<'static> {
    fn hold(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.0.signal(libc::SIGSTOP);
        // All threads, of which each has a state of its own.
        let stopped = |other: &Other| {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", other.child.id())).unwrap();
            tasks.into_iter().all(|task| {
                let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
                stat.rsplit_once(") ").unwrap().1.starts_with('T')
            })
        };
        while !stopped(self.0) {
            std::thread::yield_now();
        }
        Ok(())
    }

    fn let_go(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.0.signal(libc::SIGCONT);
        Ok(())
    }
}

#[test]
fn passes_all() {
    if !has_soft_dirty() {
        return;
    }
    // For as long as this process lives.
    let other: &'static Other = Box::leak(Box::new(Other::start()));
    let memory = &other.memory;
    let source = SoftDirty::new(other.process(), memory, Arc::new(NotTold(other))).unwrap();
    suite::passes_all(&Bench { memory, source: &source, writer: other, granule_pages: 1 });
    other.signal(libc::SIGKILL);
}

/// Who does not stand still is not harvested, and what was written is not lost by that.
#[test]
fn who_does_not_stand_still_is_not_harvested() {
    struct Restless(AtomicBool);
    impl Standstill for Restless {
        fn hold(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            if self.0.load(Ordering::SeqCst) { Err("no".into()) } else { Ok(()) }
        }
        fn let_go(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            Ok(())
        }
    }
    if !has_soft_dirty() {
        return;
    }
    let other = Other::start();
    let restless = Arc::new(Restless(AtomicBool::new(false)));
    let source =
        SoftDirty::new(other.process(), &other.memory, Arc::clone(&restless) as _).unwrap();
    source.start().unwrap();
    restless.0.store(true, Ordering::SeqCst);
    other.touch(PageRange { region: 0, first_page: 9, pages: 1 });
    let mut found = DirtyBitmap::new(other.memory.layout());
    source.harvest(&mut found).unwrap_err();
    assert_eq!(found.count(), 0);
    restless.0.store(false, Ordering::SeqCst);
    source.harvest(&mut found).unwrap();
    assert!(found.get(0, 9) && found.count() == 1);
}
