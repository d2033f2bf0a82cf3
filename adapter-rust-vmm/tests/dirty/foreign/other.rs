//! The other process, which is this test program once more, told to be [`the_other_process`].
#![expect(unsafe_code, reason = "signals, and a filter of system calls")]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::{Child, ChildStderr, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pageferry::memory::{GuestMemory, PAGE_BYTES, PageRange};
use pageferry_rust_vmm::foreign::ForeignError;
use pageferry_rust_vmm::{ForeignPagemapScan, ForeignProcess, ForeignUserfaultfd, guest_memory};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::suite::Writer;
use crate::threads::Threads;

pub(super) const MIB: u64 = 1 << 20;

/// Guest memory: where in the file, how long, and at which guest address. The second region is not a whole number
/// of words.
pub(super) const REGIONS: [(u64, u64, u64); 2] =
    [(0, 4 * MIB, 0), (4 * MIB, MIB + 5 * PAGE_BYTES, 1 << 32)];

/// Where the other process finds the file of guest memory.
const FILE: &str = "PAGEFERRY_TEST_FILE";

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
pub(super) struct Other {
    pub(super) child: Child,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) talk: Mutex<(ChildStdin, BufReader<ChildStderr>)>,
    pub(super) ranges: Vec<PageRange>,
}

impl Other {
    /// One that has mapped the file of some guest memory.
    pub(super) fn start() -> Self {
        let file = memfd(8 * MIB);
        let memory = Arc::new(memory_of(&file, &REGIONS));
        let mut child = Command::new(std::env::current_exe().unwrap())
            // One test at a time is made by the main thread, so that there is no other.
            .args([
                "--exact",
                "foreign::other::the_other_process",
                "--nocapture",
                "--test-threads=1",
            ])
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
    pub(super) fn tell(&self, what: &str) -> u32 {
        let (commands, answers) = &mut *self.talk.lock().unwrap();
        writeln!(commands, "{what}").unwrap();
        let mut line = String::new();
        answers.read_line(&mut line).unwrap();
        line.trim_end().parse().unwrap_or_else(|_| panic!("it says: {line}"))
    }

    pub(super) fn process(&self) -> ForeignProcess {
        ForeignProcess::open(self.child.id()).unwrap()
    }

    pub(super) fn signal(&self, signal: libc::c_int) {
        let pid = i32::try_from(self.child.id()).unwrap();
        // SAFETY: sends a signal to a process that this one started.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    pub(super) fn queue_signal(&self, value: u32) {
        let pid = i32::try_from(self.child.id()).unwrap();
        let value = libc::sigval { sival_ptr: std::ptr::without_provenance_mut(value as usize) };
        // SAFETY: as above; the value is a number.
        assert_eq!(unsafe { libc::sigqueue(pid, libc::SIGRTMIN(), value) }, 0);
    }

    pub(super) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// The letter of its state in /proc.
    /// Whether it has stopped by a signal, or does within half a minute.
    pub(super) fn stops(&self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.state() != 'T' {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    fn state(&self) -> char {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let state = status.lines().find_map(|line| line.strip_prefix("State:")).unwrap();
        state.trim().chars().next().unwrap()
    }

    pub(super) fn scan(&self) -> Result<ForeignPagemapScan, ForeignError> {
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

pub(super) fn memfd(len_bytes: u64) -> File {
    // SAFETY: a string literal and no flags.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), 0) };
    assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
    // SAFETY: just opened, and owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len_bytes).unwrap();
    file
}

/// Parts of a file as guest memory.
pub(super) fn memory_of(file: &File, regions: &[(u64, u64, u64)]) -> GuestMemory {
    let region = |&(offset, len_bytes, guest_addr): &(u64, u64, u64)| {
        let backing = FileOffset::new(file.try_clone().unwrap(), offset);
        let mapped = MmapRegion::from_file(backing, usize::try_from(len_bytes).unwrap()).unwrap();
        GuestRegionMmap::new(mapped, GuestAddress(guest_addr)).unwrap()
    };
    let regions = regions.iter().map(region).collect();
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_regions(regions).unwrap();
    guest_memory(Arc::new(memory)).unwrap()
}
