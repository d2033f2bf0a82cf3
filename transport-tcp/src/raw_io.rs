//! The only unsafe code of this crate: `sendmsg` and `recvmsg` with iovecs over guest memory.
//!
//! Guest memory may not be borrowed as a slice (vCPUs write to it meanwhile), so the safe
//! vectored calls of the standard library cannot be used. [`GuestVectors`] keeps the memory
//! alive and only ever holds addresses that the memory itself vouched for, which makes its
//! methods safe to call.
#![expect(unsafe_code, reason = "the kernel gets raw iovecs over guest memory")]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;
use std::sync::Arc;

use libc::{c_int, iovec};
use pageferry::memory::{GuestMemory, OutOfRange};
use pageferry::transport::{Run, RunKind};

const NO_VECTOR: iovec = iovec { iov_base: ptr::null_mut(), iov_len: 0 };

/// How many bytes one call moved, of either sort.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moved {
    /// Of the small buffer: the head of a batch sent, or the head of the next one received.
    pub(crate) head_bytes: usize,
    /// Of guest memory.
    pub(crate) guest_bytes: usize,
}

/// The data runs of one batch as iovecs, and how far they have been moved.
pub(crate) struct GuestVectors {
    memory: Arc<GuestMemory>,
    /// `vectors[first..]` is what is left to move, all of it inside `memory`. What lies before
    /// is spare: slot `first - 1` takes the head of a batch, so that head and pages are one array.
    vectors: Vec<iovec>,
    first: usize,
    left_bytes: usize,
}

// SAFETY: the iovecs hold addresses of guest memory, which any thread may use (GuestMemory is
// Send and Sync); what a spare slot holds is never read.
unsafe impl Send for GuestVectors {}

impl fmt::Debug for GuestVectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestVectors").field("left_bytes", &self.left_bytes).finish_non_exhaustive()
    }
}

impl GuestVectors {
    pub(crate) fn new(memory: Arc<GuestMemory>) -> Self {
        Self { memory, vectors: vec![NO_VECTOR], first: 1, left_bytes: 0 }
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Forgets what was there.
    pub(crate) fn clear(&mut self) {
        self.vectors.clear();
        self.vectors.push(NO_VECTOR);
        self.first = 1;
        self.left_bytes = 0;
    }

    /// Takes the data runs of a batch. All runs, zero runs too, are checked to be inside guest
    /// memory and not empty.
    pub(crate) fn load(&mut self, runs: &[Run]) -> Result<(), OutOfRange> {
        self.clear();
        for run in runs {
            let loaded = self.memory.span(run.range).and_then(|span| {
                if span.len_bytes == 0 { Err(OutOfRange { range: run.range }) } else { Ok(span) }
            });
            let span = match loaded {
                Ok(span) => span,
                Err(error) => {
                    self.clear();
                    return Err(error);
                }
            };
            if run.kind == RunKind::Data {
                self.vectors.push(iovec { iov_base: span.addr.cast(), iov_len: span.len_bytes });
                self.left_bytes += span.len_bytes;
            }
        }
        Ok(())
    }

    /// Guest bytes not yet moved.
    pub(crate) fn left_bytes(&self) -> usize {
        self.left_bytes
    }

    /// Sends `head`, then what is left, with one system call. May send less than all of it.
    pub(crate) fn send(&mut self, socket: impl AsFd, head: &[u8]) -> io::Result<Moved> {
        let start = self.first - 1;
        self.vectors[start] =
            iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() };
        let message = message_of(&mut self.vectors[start..]);
        // SAFETY: the iovecs are `head`, which is borrowed for the call and only read, and spans
        // inside guest memory, which `self.memory` keeps mapped. The message and its iovecs
        // outlive the call.
        let sent = unsafe {
            libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL)
        };
        let sent = usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
        let head_bytes = sent.min(head.len());
        let guest_bytes = sent - head_bytes;
        self.advance(guest_bytes);
        Ok(Moved { head_bytes, guest_bytes })
    }

    /// Receives what is left, then into `head`, with one system call. May receive less.
    pub(crate) fn receive_with_head(
        &mut self,
        socket: impl AsFd,
        head: &mut [u8],
    ) -> io::Result<Moved> {
        let left_bytes = self.left_bytes;
        self.vectors.push(iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() });
        // SAFETY: the last iovec is `head`, which is borrowed mutably for the call; the others
        // are spans inside guest memory, see `receive_vectors`.
        let received = unsafe { receive_vectors(&socket, &mut self.vectors[self.first..], 0) };
        self.vectors.pop();
        let received = received?;
        let guest_bytes = received.min(left_bytes);
        self.advance(guest_bytes);
        Ok(Moved { head_bytes: received - guest_bytes, guest_bytes })
    }

    /// Receives the next `limit_bytes` (or what is left, if that is less), waiting for all of
    /// them. Gets less only when the connection ends or a signal comes.
    pub(crate) fn receive_all(
        &mut self,
        socket: impl AsFd,
        limit_bytes: usize,
    ) -> io::Result<usize> {
        let mut room = limit_bytes.min(self.left_bytes);
        let mut end = self.first;
        let mut cut = 0;
        while room > 0 {
            let vector = &mut self.vectors[end];
            cut = vector.iov_len.saturating_sub(room);
            vector.iov_len -= cut;
            room -= vector.iov_len;
            end += 1;
        }
        // SAFETY: spans inside guest memory, the last one possibly shortened.
        let received = unsafe {
            receive_vectors(&socket, &mut self.vectors[self.first..end], libc::MSG_WAITALL)
        };
        // What was cut off belongs to the vector again, before it is advanced.
        if cut > 0 {
            self.vectors[end - 1].iov_len += cut;
        }
        let received = received?;
        self.advance(received);
        Ok(received)
    }

    /// Drops the first `bytes` of what is left.
    fn advance(&mut self, mut bytes: usize) {
        self.left_bytes -= bytes;
        while bytes > 0 {
            let vector = &mut self.vectors[self.first];
            if bytes < vector.iov_len {
                vector.iov_base = vector.iov_base.wrapping_byte_add(bytes);
                vector.iov_len -= bytes;
                return;
            }
            bytes -= vector.iov_len;
            self.first += 1;
        }
    }
}

/// Receives into iovecs.
///
/// # Safety
///
/// Every iovec must be writable memory that stays mapped during the call, and no Rust reference
/// to it may be in use meanwhile.
unsafe fn receive_vectors(
    socket: impl AsFd,
    vectors: &mut [iovec],
    flags: c_int,
) -> io::Result<usize> {
    let mut message = message_of(vectors);
    // SAFETY: the caller vouches for the iovecs; the message outlives the call.
    let received = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, flags) };
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}

fn message_of(vectors: &mut [iovec]) -> libc::msghdr {
    // SAFETY: msghdr is a C struct of integers and pointers, all of which may be zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    // Its type differs between C libraries; MAX_BATCH_RUNS + 1 fits in every one.
    message.msg_iovlen = vectors.len() as _;
    message
}
