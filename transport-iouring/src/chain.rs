//! Requests that the kernel does one after another, and the memory they use.
#![expect(unsafe_code, reason = "addresses of guest memory become requests")]

use std::marker::PhantomData;
use std::time::Duration;

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, Timespec};
use io_uring::{opcode, types};

/// Whether a send is complete or has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sends {
    /// It is: the kernel goes on by itself after a partial one, and a link breaks behind one that failed.
    Whole,
    /// Not so: it may send less, and nothing can be linked behind it that is to follow. A socket that encrypts takes
    /// no `MSG_WAITALL` (`tls_sw_sendmsg` in net/tls/tls_sw.c).
    InPart,
}

impl Sends {
    /// No SIGPIPE either way.
    fn flags(self) -> i32 {
        match self {
            Self::Whole => libc::MSG_NOSIGNAL | libc::MSG_WAITALL,
            Self::InPart => libc::MSG_NOSIGNAL,
        }
    }
}

/// How long a receive waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Until {
    /// Takes what is there.
    Now,
    /// Until there is something.
    Some,
    /// Until all is there.
    All,
}

impl Until {
    fn flags(self) -> i32 {
        match self {
            Self::Now => libc::MSG_DONTWAIT,
            Self::Some => 0,
            Self::All => libc::MSG_WAITALL,
        }
    }
}

/// A zero-copy send, for the account of those under way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ZeroCopySend {
    /// The batch it belongs to.
    pub(crate) ticket: u64,
    /// Where in the table of registered buffers. Without: the kernel pins for this send alone.
    pub(crate) buffer: Option<u16>,
}

#[derive(Debug, Clone, Copy)]
enum Work {
    Send { bytes: *const u8, len: u32, flags: i32 },
    SendVectors { first: *mut libc::iovec, count: usize, flags: i32 },
    SendZeroCopy { bytes: *const u8, len: u32, send: ZeroCopySend },
    Receive { bytes: *mut u8, len: u32, until: Until },
    ReceiveVectors { first: *mut libc::iovec, count: usize, until: Until },
    LinkTimeout(Timespec),
}

#[derive(Debug)]
struct Step {
    work: Work,
    link: Flags,
}

/// Requests on one socket, in the order in which they were added. All but the zero-copy ones use
/// memory that is borrowed for `'a`; a ring completes them all before it gives the chain back.
#[derive(Debug)]
pub(crate) struct Chain<'a> {
    steps: Vec<Step>,
    headers: Vec<libc::msghdr>,
    memory: PhantomData<&'a mut [u8]>,
}

impl<'a> Chain<'a> {
    pub(crate) fn new() -> Self {
        Self { steps: Vec::new(), headers: Vec::new(), memory: PhantomData }
    }

    pub(crate) fn len(&self) -> usize {
        self.steps.len()
    }

    fn add(&mut self, work: Work) {
        self.steps.push(Step { work, link: Flags::empty() });
    }

    /// The next request begins when the one before has succeeded in full, and is cancelled if
    /// that has not.
    pub(crate) fn then(&mut self) -> &mut Self {
        if let Some(step) = self.steps.last_mut() {
            step.link = Flags::IO_LINK;
        }
        self
    }

    /// Sends eight bytes or so, if there is room for them now.
    pub(crate) fn send_now(&mut self, bytes: &'a [u8]) {
        let len = length(bytes.len());
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        self.add(Work::Send { bytes: bytes.as_ptr(), len, flags });
    }

    pub(crate) fn receive(&mut self, into: &'a mut [u8], until: Until) {
        let len = length(into.len());
        self.add(Work::Receive { bytes: into.as_mut_ptr(), len, until });
    }

    /// Cancels the receive before it, which must be linked to it, when the time is over.
    pub(crate) fn time_out(&mut self, after: Duration) {
        /// The kernel refuses what it cannot count.
        const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
        self.add(Work::LinkTimeout(after.min(LONGEST).into()));
    }

    /// Sends what the vectors cover.
    ///
    /// # Safety
    ///
    /// The vectors and the memory they name stay as they are for `'a`, and no one has a mutable
    /// reference to that memory.
    pub(crate) unsafe fn send_vectors(&mut self, vectors: &'a [libc::iovec], sends: Sends) {
        let (first, count, flags) = (vectors.as_ptr().cast_mut(), vectors.len(), sends.flags());
        self.add(Work::SendVectors { first, count, flags });
    }

    /// Sends all of it, copied by the kernel.
    ///
    /// # Safety
    ///
    /// The bytes stay mapped for `'a`, and no one has a mutable reference to them.
    pub(crate) unsafe fn send(&mut self, bytes: *const u8, len: u32) {
        self.add(Work::Send { bytes, len, flags: Sends::Whole.flags() });
    }

    /// Sends without a copy, if the kernel can.
    ///
    /// # Safety
    ///
    /// The bytes are inside the buffer `send.buffer` of the ring that runs this, if there is one.
    /// They are pinned, by their registration or by the request, so it is enough if they stay
    /// mapped until the request itself has completed.
    pub(crate) unsafe fn send_zero_copy(&mut self, bytes: *const u8, len: u32, send: ZeroCopySend) {
        self.add(Work::SendZeroCopy { bytes, len, send });
    }

    /// Receives into what the vectors cover.
    ///
    /// # Safety
    ///
    /// The vectors and the memory they name stay as they are for `'a`, and no one has a reference
    /// to that memory.
    pub(crate) unsafe fn receive_vectors(&mut self, vectors: &'a [libc::iovec], until: Until) {
        let (first, count) = (vectors.as_ptr().cast_mut(), vectors.len());
        self.add(Work::ReceiveVectors { first, count, until });
    }

    /// Whether a step is a zero-copy send, and what of.
    pub(crate) fn zero_copy_send(&self, step: usize) -> Option<ZeroCopySend> {
        match self.steps.get(step)?.work {
            Work::SendZeroCopy { send, .. } => Some(send),
            _ => None,
        }
    }

    /// The entries for the submission queue. They point into the chain, which must not be touched
    /// until they have completed.
    pub(crate) fn entries(&mut self, fd: Fd, report_usage: bool) -> Vec<Entry> {
        // All headers first: once entries point at them they may not move.
        self.headers.clear();
        self.headers.extend(self.steps.iter().filter_map(|step| match step.work {
            Work::SendVectors { first, count, .. } | Work::ReceiveVectors { first, count, .. } => {
                Some(header_of(first, count))
            }
            _ => None,
        }));
        let mut headers = self.headers.iter_mut().map(|header| &raw mut *header);
        let mut header = || headers.next().unwrap_or(std::ptr::null_mut());
        let zc_flags = if report_usage { REPORT_USAGE } else { 0 };
        self.steps
            .iter()
            .map(|step| {
                let entry = match &step.work {
                    Work::Send { bytes, len, flags } => {
                        opcode::Send::new(fd, *bytes, *len).flags(*flags).build()
                    }
                    Work::SendVectors { flags, .. } => {
                        opcode::SendMsg::new(fd, header()).flags(flags.cast_unsigned()).build()
                    }
                    Work::SendZeroCopy { bytes, len, send } => {
                        opcode::SendZc::new(fd, *bytes, *len)
                            .buf_index(send.buffer)
                            .flags(Sends::Whole.flags())
                            .zc_flags(zc_flags)
                            .build()
                    }
                    Work::Receive { bytes, len, until } => {
                        opcode::Recv::new(fd, *bytes, *len).flags(until.flags()).build()
                    }
                    Work::ReceiveVectors { until, .. } => {
                        let flags = until.flags().cast_unsigned();
                        opcode::RecvMsg::new(fd, header()).flags(flags).build()
                    }
                    Work::LinkTimeout(after) => opcode::LinkTimeout::new(&raw const *after)
                        .flags(types::TimeoutFlags::empty())
                        .build(),
                };
                entry.flags(step.link)
            })
            .collect()
    }
}

/// `IORING_SEND_ZC_REPORT_USAGE`: the notification says whether the kernel copied.
pub(crate) const REPORT_USAGE: u16 = 1 << 3;

/// Lengths of requests: batches are far below 4 GiB.
fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

fn header_of(first: *mut libc::iovec, count: usize) -> libc::msghdr {
    // SAFETY: msghdr is a C struct of integers and pointers, all of which may be zero.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = first;
    // Its type differs between C libraries; the vectors of a batch fit in every one.
    header.msg_iovlen = count as _;
    header
}
