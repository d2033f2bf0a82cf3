//! What another process writes, by `ForeignPagemapScan` and `SoftDirty`.
//!
//! The other process is this test program once more, told to be [`the_other_process`].
#![expect(unsafe_code, reason = "signals, and a filter of system calls")]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::{Child, ChildStderr, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pageferry::dirty::{DirtyBitmap, DirtySource};
use pageferry::memory::{GuestMemory, PAGE_BYTES, PageRange};
use pageferry_rust_vmm::foreign::{ForeignError, SoftDirtyError, Standstill};
use pageferry_rust_vmm::{
    ForeignPagemapScan, ForeignProcess, ForeignUserfaultfd, PagemapScan, SoftDirty, guest_memory,
};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::suite::{self, Bench, Writer};
use crate::threads::Threads;

const MIB: u64 = 1 << 20;

/// Guest memory: where in the file, how long, and at which guest address. The second region is not a whole number
/// of words.
const REGIONS: [(u64, u64, u64); 2] = [(0, 4 * MIB, 0), (4 * MIB, MIB + 5 * PAGE_BYTES, 1 << 32)];

/// Where the other process finds the file of guest memory.
const FILE: &str = "PAGEFERRY_TEST_FILE";

// --- the other process --------------------------------------------------------------------------------

/// No test, but what the others start: does what it reads from its standard input.
#[test]
fn the_other_process() {
    let Ok(file) = std::env::var(FILE) else { return };
    let file = File::options().read(true).write(true).open(file).unwrap();
    // All of it at once, and in several mappings nevertheless: each page has another address than in the process
    // that tracks, and another place in what it belongs to.
    let memory = memory_of(&file, &[(0, 8 * MIB, 0)]);
    let apart = memory.regions()[0].host_addr.wrapping_add(3 << 20);
    // SAFETY: advice on a mapping that lives; it changes no byte.
    assert_eq!(unsafe { libc::madvise(apart.cast(), 1 << 20, libc::MADV_DONTFORK) }, 0);
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<_> = line.split(' ').collect();
        let number = |index: usize| words[index].parse::<u64>().unwrap();
        let answer = match words[0] {
            "touch" => {
                let pages = u32::try_from(number(2)).unwrap();
                let range = PageRange { region: 0, first_page: number(1), pages };
                Threads { memory: &memory, ranges: Vec::new() }.touch(range);
                0
            }
            "sleep" => (0..number(1)).filter(|_| !sleep_once()).count(),
            "poll" => (0..number(1)).filter(|_| !poll_once()).count(),
            "futex" => (0..number(1)).filter(|_| !futex_once()).count(),
            "count" => count_signals(),
            "counted" => SIGNALS.load(Ordering::SeqCst) as usize,
            "forbid" => forbid_userfaultfd(),
            other => panic!("{other}?"),
        };
        writeln!(std::io::stderr(), "{answer}").unwrap();
    }
}

// Each of them is made again by the kernel in a way of its own, when it was interrupted without a signal. They
// say whether they came to their end.

fn sleep_once() -> bool {
    let wanted = libc::timespec { tv_sec: 0, tv_nsec: 5_000_000 };
    // SAFETY: reads a timespec. What is left of the time is not asked for.
    unsafe { libc::nanosleep(&raw const wanted, std::ptr::null_mut()) == 0 }
}

fn poll_once() -> bool {
    // SAFETY: no descriptors.
    unsafe { libc::poll(std::ptr::null_mut(), 0, 5) == 0 }
}

fn futex_once() -> bool {
    let (word, wanted) = (0_u32, libc::timespec { tv_sec: 0, tv_nsec: 5_000_000 });
    let (word, wanted) = (&raw const word, &raw const wanted);
    // SAFETY: reads a word and a timespec.
    let woken = unsafe { libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAIT, 0, wanted) };
    woken == -1 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ETIMEDOUT)
}

static SIGNALS: AtomicU32 = AtomicU32::new(0);

/// From now on adds up what signals bring.
fn count_signals() -> usize {
    extern "C" fn count(_: libc::c_int, info: *const libc::siginfo_t, _: *const libc::c_void) {
        // SAFETY: the kernel gives it to a handler that asked for it.
        let info = unsafe { &*info };
        // SAFETY: it was sent by sigqueue, and so has a value.
        let value = unsafe { info.si_value() };
        let value = u32::try_from(value.sival_ptr.addr()).unwrap_or_default();
        SIGNALS.fetch_add(value, Ordering::SeqCst);
    }
    // SAFETY: a zeroed sigaction is one without flags and with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = count as *const () as usize;
    action.sa_flags = libc::SA_RESTART | libc::SA_SIGINFO;
    // SAFETY: the handler does nothing but add to an atomic number.
    let set = unsafe { libc::sigaction(libc::SIGRTMIN(), &raw const action, std::ptr::null_mut()) };
    assert_eq!(set, 0);
    0
}

/// From now on all threads get EPERM for a userfaultfd.
fn forbid_userfaultfd() -> usize {
    const LOAD_NUMBER: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let statement = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        statement(LOAD_NUMBER, 0, 0, 0),
        statement(JUMP_IF_EQUAL, 0, 1, u32::try_from(libc::SYS_userfaultfd).unwrap()),
        statement(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned()),
        statement(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: sets a flag of this process.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: reads a program of four statements.
    let set = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_TSYNC,
            &raw const program,
        )
    };
    assert_eq!(set, 0);
    0
}

/// The process, and what it is told by.
struct Other {
    child: Child,
    memory: Arc<GuestMemory>,
    talk: Mutex<(ChildStdin, BufReader<ChildStderr>)>,
    ranges: Vec<PageRange>,
}

impl Other {
    /// One that has mapped the file of some guest memory.
    fn start() -> Self {
        let file = memfd(8 * MIB);
        let memory = Arc::new(memory_of(&file, &REGIONS));
        let mut child = Command::new(std::env::current_exe().unwrap())
            // One test at a time is made by the main thread, so that there is no other.
            .args(["--exact", "foreign::the_other_process", "--nocapture", "--test-threads=1"])
            .env(FILE, format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let talk = (child.stdin.take().unwrap(), BufReader::new(child.stderr.take().unwrap()));
        let ranges = (0..).zip(memory.layout().regions()).map(|(region, layout)| PageRange {
            region,
            first_page: 3,
            pages: u32::try_from(layout.pages() - 8).unwrap(),
        });
        let ranges = ranges.collect();
        let other = Self { child, memory, talk: Mutex::new(talk), ranges };
        // It has mapped the memory, and waits.
        other.touch(PageRange { region: 0, first_page: 3, pages: 1 });
        other
    }

    /// Has it do something, and says what it answers.
    fn tell(&self, what: &str) -> u32 {
        let (commands, answers) = &mut *self.talk.lock().unwrap();
        writeln!(commands, "{what}").unwrap();
        let mut line = String::new();
        answers.read_line(&mut line).unwrap();
        line.trim_end().parse().unwrap_or_else(|_| panic!("it says: {line}"))
    }

    fn process(&self) -> ForeignProcess {
        ForeignProcess::open(self.child.id()).unwrap()
    }

    fn signal(&self, signal: libc::c_int) {
        let pid = i32::try_from(self.child.id()).unwrap();
        // SAFETY: sends a signal to a process that this one started.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    fn queue_signal(&self, value: u32) {
        let pid = i32::try_from(self.child.id()).unwrap();
        let value = libc::sigval { sival_ptr: std::ptr::without_provenance_mut(value as usize) };
        // SAFETY: as above; the value is a number.
        assert_eq!(unsafe { libc::sigqueue(pid, libc::SIGRTMIN(), value) }, 0);
    }

    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// The letter of its state in /proc.
    fn state(&self) -> char {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let state = status.lines().find_map(|line| line.strip_prefix("State:")).unwrap();
        state.trim().chars().next().unwrap()
    }

    fn scan(&self) -> Result<ForeignPagemapScan, ForeignError> {
        ForeignPagemapScan::new(self.process(), &self.memory, ForeignUserfaultfd::made_in)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Writer for Other {
    fn ranges(&self) -> Vec<PageRange> {
        self.ranges.clone()
    }

    fn touch(&self, range: PageRange) {
        let PageRange { region, first_page, pages } = range;
        let page_of_file = first_page + REGIONS[usize::from(region)].0 / PAGE_BYTES;
        self.tell(&format!("touch {page_of_file} {pages}"));
    }

    fn hammer(&self, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            self.ranges.iter().for_each(|range| self.touch(*range));
        }
    }
}

fn memfd(len_bytes: u64) -> File {
    // SAFETY: a string literal and no flags.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), 0) };
    assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
    // SAFETY: just opened, and owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len_bytes).unwrap();
    file
}

/// Parts of a file as guest memory.
fn memory_of(file: &File, regions: &[(u64, u64, u64)]) -> GuestMemory {
    let region = |&(offset, len_bytes, guest_addr): &(u64, u64, u64)| {
        let backing = FileOffset::new(file.try_clone().unwrap(), offset);
        let mapped = MmapRegion::from_file(backing, usize::try_from(len_bytes).unwrap()).unwrap();
        GuestRegionMmap::new(mapped, GuestAddress(guest_addr)).unwrap()
    };
    let regions = regions.iter().map(region).collect();
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_regions(regions).unwrap();
    guest_memory(Arc::new(memory)).unwrap()
}

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

/// Says so if this kernel has no soft-dirty bits.
fn has_soft_dirty() -> bool {
    let supported = SoftDirty::supported();
    if let Err(error) = &supported {
        assert!(matches!(error, SoftDirtyError::Unsupported), "{error}");
        eprintln!("skipped, because {error}");
    }
    supported.is_ok()
}

// --- by PAGEMAP_SCAN ----------------------------------------------------------------------------------

#[test]
fn scan_passes_all() {
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
    while other.state() != 'T' {
        std::thread::yield_now();
    }
    let source = other.scan().unwrap();
    source.start().unwrap();
    assert_eq!(other.state(), 'T');
    other.signal(libc::SIGCONT);
    other.touch(PageRange { region: 0, first_page: 9, pages: 1 });
    let mut found = DirtyBitmap::new(other.memory.layout());
    source.harvest(&mut found).unwrap();
    assert!(found.get(0, 9) && found.count() == 1);
}

/// Nor is a stop lost that comes while its thread is borrowed.
#[test]
fn a_process_that_is_stopped_meanwhile_stops() {
    const PATIENCE: Duration = Duration::from_secs(30);
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
            let began = Instant::now();
            while other.state() != 'T' {
                if began.elapsed() > PATIENCE {
                    over.store(true, Ordering::Relaxed);
                    panic!("it was stopped {stopped} times, and then not");
                }
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

// --- where its memory is ------------------------------------------------------------------------------

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

// --- by soft-dirty bits -------------------------------------------------------------------------------

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
fn soft_dirty_passes_all() {
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
fn soft_dirty_bits_of_who_does_not_stand_still_are_not_read() {
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
    let restless = Arc::new(Restless(AtomicBool::new(true)));
    let source =
        SoftDirty::new(other.process(), &other.memory, Arc::clone(&restless) as _).unwrap();
    source.start().unwrap();
    other.touch(PageRange { region: 0, first_page: 9, pages: 1 });
    let mut found = DirtyBitmap::new(other.memory.layout());
    source.harvest(&mut found).unwrap_err();
    assert_eq!(found.count(), 0);
    restless.0.store(false, Ordering::SeqCst);
    source.harvest(&mut found).unwrap();
    assert!(found.get(0, 9) && found.count() == 1);
}
