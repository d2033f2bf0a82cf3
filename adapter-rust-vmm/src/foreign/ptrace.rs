//! A thread of another process that makes a system call for us, and then goes on as if nothing had been: by
//! ptrace(2).
#![expect(unsafe_code, reason = "ptrace takes pointers whose type depends on the request")]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::without_provenance_mut;
use std::time::{Duration, Instant};

use libc::{c_int, c_uint, c_void, pid_t, user_regs_struct};

/// How long a thread may take to stop: one that sleeps in the kernel and cannot be interrupted does not.
const STOPS_WITHIN: Duration = Duration::from_secs(2);
/// Between two looks whether it has. (There is no wait with a time limit for one thread.)
const LOOK_AGAIN: Duration = Duration::from_micros(50);

/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
const SYSCALL_BYTES: u64 = SYSCALL.len() as u64;
/// Code segment of 64-bit code.
const CODE_64: u64 = 0x33;
/// No system call.
const NONE: u64 = u64::MAX;

/// Requests whose data is a number.
#[derive(Debug, Clone, Copy)]
enum Request {
    /// Begins to trace; data are options.
    Seize,
    /// Makes it stop.
    Interrupt,
    /// Lets it go on; data is a signal for it, as in the next two.
    Continue,
    /// Until it enters or leaves a system call.
    ToCall,
    /// For good.
    Detach,
}

/// What a traced thread stopped for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// It was asked to, or all its process stands still.
    Event,
    /// It enters or leaves a system call.
    Call,
    /// It got this signal.
    Signal(c_int),
}

/// A thread of another process that stands still in the middle of a system call, which it will make again
/// when it is let go.
///
/// # Thread safety
///
/// Stays with the thread that made it, as ptrace wants it; when that thread ends, the kernel lets the other go.
#[derive(Debug)]
pub(super) struct Borrowed {
    tid: pid_t,
    registers: user_regs_struct,
    /// Signals it had blocked. None reaches it while it is borrowed.
    blocked: u64,
    called: bool,
}

impl Borrowed {
    /// Stops a thread; `None` if it is not where it can be borrowed, and goes on.
    pub(super) fn stop(tid: pid_t) -> io::Result<Option<Self>> {
        request(Request::Seize, tid, libc::PTRACE_O_TRACESYSGOOD)?;
        request(Request::Interrupt, tid, 0)?;
        let deadline = Instant::now() + STOPS_WITHIN;
        loop {
            match wait(tid, Some(deadline))? {
                // It came first, and goes where it was going.
                Stop::Signal(signal) => request(Request::Continue, tid, signal)?,
                Stop::Call => request(Request::Continue, tid, 0)?,
                Stop::Event => break,
            }
        }
        let registers = registers(tid)?;
        let in_a_call = registers.orig_rax.cast_signed() >= 0 && registers.cs == CODE_64;
        if !in_a_call || instruction_before(tid, registers.rip)? != SYSCALL {
            request(Request::Detach, tid, 0)?;
            return Ok(None);
        }
        let blocked = signal_mask(tid)?;
        set_signal_mask(tid, u64::MAX)?;
        Ok(Some(Self { tid, registers, blocked, called: false }))
    }

    /// Makes a system call there and returns what came of it. The call must be one that does not wait:
    /// there is no way back from the middle of it.
    pub(super) fn call(&mut self, number: libc::c_long, arguments: [u64; 3]) -> io::Result<u64> {
        let mut registers = self.registers;
        registers.rip -= SYSCALL_BYTES;
        registers.rax = number.cast_unsigned();
        registers.orig_rax = NONE;
        [registers.rdi, registers.rsi, registers.rdx] = arguments;
        set_registers(self.tid, &registers)?;
        self.called = true;
        // It begins, and it is over.
        for _ in 0..2 {
            self.resume_to(Request::ToCall, Stop::Call)?;
        }
        let result = self::registers(self.tid)?.rax.cast_signed();
        if (-4095..0).contains(&result) {
            // It is in -4095..0.
            return Err(io::Error::from_raw_os_error(i32::try_from(-result).unwrap_or(0)));
        }
        Ok(result.cast_unsigned())
    }

    /// Lets the thread go on with what it did.
    pub(super) fn release(self) -> io::Result<()> {
        if self.called {
            // The kernel makes the call of before again where it looks for signals, so that is where the thread
            // has to stop. (Letting it go at the end of a call makes it look too, in kernels that were tried;
            // no documentation says so.)
            request(Request::Interrupt, self.tid, 0)?;
            self.resume_to(Request::Continue, Stop::Event)?;
        }
        set_registers(self.tid, &self.registers)?;
        set_signal_mask(self.tid, self.blocked)?;
        request(Request::Detach, self.tid, 0)
    }

    /// Lets it go on until it stops for that. It cannot be left anywhere else, so there is no time limit; what is
    /// waited for takes microseconds once it has a CPU.
    fn resume_to(&self, how: Request, wanted: Stop) -> io::Result<()> {
        let mut signal = 0;
        loop {
            request(how, self.tid, signal)?;
            signal = match wait(self.tid, None)? {
                stop if stop == wanted => return Ok(()),
                // A stop of the whole process, for all else is blocked. This thread joins it once it is let go.
                Stop::Signal(signal) => signal,
                Stop::Call | Stop::Event => 0,
            };
        }
    }
}

/// Waits until the thread stops.
fn wait(tid: pid_t, deadline: Option<Instant>) -> io::Result<Stop> {
    loop {
        let mut status = 0;
        let options = libc::__WALL | if deadline.is_some() { libc::WNOHANG } else { 0 };
        // SAFETY: writes one int, which is ours.
        match unsafe { libc::waitpid(tid, &raw mut status, options) } {
            0 if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            0 => std::thread::sleep(LOOK_AGAIN),
            -1 => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
            _ if !libc::WIFSTOPPED(status) => {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            _ => return Ok(stop_of(status)),
        }
    }
}

fn stop_of(status: c_int) -> Stop {
    let signal = libc::WSTOPSIG(status);
    if status >> 16 == libc::PTRACE_EVENT_STOP {
        Stop::Event
    } else if signal == libc::SIGTRAP | 0x80 {
        Stop::Call
    } else {
        Stop::Signal(signal)
    }
}

/// The two bytes before an address.
fn instruction_before(tid: pid_t, address: u64) -> io::Result<[u8; 2]> {
    let mut bytes = [0; 2];
    let memory = File::open(format!("/proc/{tid}/mem"))?;
    memory.read_exact_at(&mut bytes, address.saturating_sub(SYSCALL_BYTES))?;
    Ok(bytes)
}

fn request(what: Request, tid: pid_t, data: c_int) -> io::Result<()> {
    let request = match what {
        Request::Seize => libc::PTRACE_SEIZE,
        Request::Interrupt => libc::PTRACE_INTERRUPT,
        Request::Continue => libc::PTRACE_CONT,
        Request::ToCall => libc::PTRACE_SYSCALL,
        Request::Detach => libc::PTRACE_DETACH,
    };
    let data = without_provenance_mut(usize::try_from(data).unwrap_or_default());
    // SAFETY: the data of these requests are numbers, nothing is read or written by their address.
    unsafe { ptrace(request, tid, 0, data) }
}

fn registers(tid: pid_t) -> io::Result<user_regs_struct> {
    // SAFETY: registers are numbers, which may be 0.
    let mut registers: user_regs_struct = unsafe { std::mem::zeroed() };
    // SAFETY: writes a user_regs_struct, which is ours.
    unsafe { ptrace(libc::PTRACE_GETREGS, tid, 0, (&raw mut registers).cast()) }?;
    Ok(registers)
}

fn set_registers(tid: pid_t, registers: &user_regs_struct) -> io::Result<()> {
    // SAFETY: reads a user_regs_struct. What the other process does with them is its own memory's affair.
    unsafe { ptrace(libc::PTRACE_SETREGS, tid, 0, (&raw const *registers).cast_mut().cast()) }
}

/// The signals a thread has blocked.
fn signal_mask(tid: pid_t) -> io::Result<u64> {
    let mut mask = 0_u64;
    // SAFETY: writes as many bytes as is said, which are ours.
    unsafe { ptrace(libc::PTRACE_GETSIGMASK, tid, size_of::<u64>(), (&raw mut mask).cast()) }?;
    Ok(mask)
}

fn set_signal_mask(tid: pid_t, mut mask: u64) -> io::Result<()> {
    // SAFETY: reads as many bytes as is said, which are ours.
    unsafe { ptrace(libc::PTRACE_SETSIGMASK, tid, size_of::<u64>(), (&raw mut mask).cast()) }
}

/// # Safety
///
/// `data` must be what the request reads or writes.
unsafe fn ptrace(request: c_uint, tid: pid_t, addr: usize, data: *mut c_void) -> io::Result<()> {
    let addr = without_provenance_mut::<c_void>(addr);
    // SAFETY: as the caller promises.
    let done = unsafe { libc::ptrace(request, tid, addr, data) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
